"""Several implementations side by side: runs and shards from files, history, the page, the picture, the command."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from refpeft.cli import app
from refpeft.conformance import render
from refpeft.conformance.report import LEVELS, Report, build
from refpeft.conformance.site import gathered, read_runs
from tests.conformance.test_report import FAILED, FOOTER, HEADER, Page, lines, result


def run(name: str, version: str, *results: Any, ok: bool = True, day: int = 1, **header: Any) -> list[Any]:
    about = {"target": {"name": name, "version": version, "spec": name}, "started": f"2026-01-{day:02}T00:00:00"}
    return [HEADER | about | header, *results, FOOTER | {"ok": ok}]


WRONG = result("merge", "fail", **FAILED)
RUNS = (
    run("mine", "1.0", result(), WRONG, result("logits", level="model"), ok=False, day=1),
    run("mine", "1.1", result(ratio=4.9), result("merge"), result("logits", level="model"), day=2),
    run("theirs", "3", result(status="known", detail="as they document"), result(method="dora", status="undeclared")),
    run("theirs", "3", result(method="dora"), shard=[2, 2]),
    run("theirs", "3", result("merge"), shard=[1, 2]),
)


def reports(*kept: int) -> list[Report]:
    return [build(RUNS[n]) for n in kept]


def test_files_are_runs_and_shards_of_runs(tmp_path: Path) -> None:
    files = [lines(tmp_path / f"{n}.jsonl", events) for n, events in enumerate(RUNS)]
    found = read_runs([files[0], files[1], files[3], files[4]])
    assert [(run.target, len(run.results), run.complete) for run in found] == [
        ("mine 1.0", 3, True), ("mine 1.1", 3, True), ("theirs 3", 2, True),
    ]  # fmt: skip
    assert [run.complete for run in read_runs([files[1], files[3]])] == [True, False]


def test_the_newest_run_counts_and_the_others_are_history() -> None:
    site = gathered(reports(1, 0, 2))
    mine, theirs = site.implementations
    assert (mine.version, [run.target for run in mine.runs]) == ("1.1", ["mine 1.0", "mine 1.1"])
    assert site.ok
    assert site.verdict == "2 implementations, all as expected."
    assert site.methods == ["lora"]  # nobody declares DoRA
    cell = mine.cell("lora")
    assert [cell.worst(level) for level in ("layer", "model", "export")] == ["pass", "pass", "undeclared"]
    assert (cell.near("layer"), cell.near("model")) == (0.98, 0.16)
    assert [(run.target, then.worst("layer")) for run, then in mine.history("lora")] == [
        ("mine 1.1", "pass"), ("mine 1.0", "fail"),
    ]  # fmt: skip
    assert theirs.cell("lora").text == "1 known"
    assert theirs.cell("dora").text == "not declared"
    old = gathered(reports(0, 2))
    assert not old.ok
    assert "mine 1.0" in old.verdict


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    text = render.site_html(gathered(reports(0, 1, 2)))
    page = Page(text)
    assert not page.loads
    assert not re.search(r"https?://|@import|url\(", text)
    assert len(page.ids) == len(set(page.ids))
    assert all(href.startswith("#") and href[1:] in page.ids for href in page.hrefs)
    assert {"mine-lora", "cell-mine-lora", "theirs-lora"} <= set(page.ids)
    assert "as they document" in page.text
    assert "History" in page.text
    assert page.text.count("1.0") >= 2  # in the history and among the runs
    assert 'data-text="mine lora layer merge pass"' in text


def test_what_a_target_says_is_text_and_not_markup() -> None:
    bad = run("<b>x</b>", "1", result("merge", "fail", **FAILED | {"detail": "<script>alert(1)</script>"}), ok=False)
    text = render.site_html(gathered([build(bad)]))
    assert "<script>alert(1)" not in text
    assert "<b>x</b>" not in text
    ElementTree.fromstring(render.site_svg(gathered([build(bad)])))


def test_the_picture_has_a_part_for_each_level() -> None:
    svg = ElementTree.fromstring(render.site_svg(gathered(reports(1, 2))))
    space = "{http://www.w3.org/2000/svg}"
    classes = [rect.get("class") for rect in svg.iter(space + "rect")]
    rest = len(LEVELS) - 2
    assert classes == ["frame", "pass", "pass", *["undeclared"] * rest, "known", *["undeclared"] * (rest + 1)]
    words = " ".join(text for element in svg.iter(space + "text") for text in element.itertext())
    assert "mine" in words
    assert "a known failure, as recorded" in words


@pytest.mark.parametrize(("kept", "code"), [((1, 2), 0), ((0, 2), 1)])
def test_the_command(tmp_path: Path, kept: tuple[int, ...], code: int) -> None:
    files = [str(lines(tmp_path / f"{n}.jsonl", RUNS[n])) for n in kept]
    views = ["--html", str(tmp_path / "who.html"), "--svg", str(tmp_path / "who.svg")]
    done = CliRunner().invoke(app, ["report", *files, *views])
    assert done.exit_code == code, done.output
    assert "2 implementations" in done.stdout
    assert "Who computes what" in (tmp_path / "who.html").read_text()
    assert (tmp_path / "who.svg").read_text().startswith("<svg")
    junit = CliRunner().invoke(app, ["report", *files, "--junit", str(tmp_path / "j.xml")])
    assert junit.exit_code == 2
    assert "--junit is of one run, and these are 2" in junit.stderr


def test_one_run_is_shown_as_ever(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(lines(tmp_path / "r.jsonl", RUNS[1]))])
    assert done.exit_code == 0
    assert "mine 1.1 against the specification" in done.stdout
    assert json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])["type"] == "header"
