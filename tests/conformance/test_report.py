"""Reports: what is read, joined, and shown of a run."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from refpeft.conformance import render, terminal
from refpeft.conformance.case import Case
from refpeft.conformance.docs import doc
from refpeft.conformance.report import Report, build, join, read, writer
from refpeft.conformance.site import read_runs
from refpeft.methods import METHODS

HEADER = {
    "type": "header", "target": {"name": "thing", "version": "1.2"}, "spec_version": "1", "seed": 0, "examples": None,
    "shard": [1, 1], "started": "2026-01-01T00:00:00", "versions": {"numpy": "2.0"},
}  # fmt: skip
FOOTER = {
    "type": "footer",
    "counts": {},
    "seconds": {"spec": 1.0, "target": 2.0, "engine": 0.5, "wall": 3.5},
    "ok": True,
}


def result(
    property: str = "forward", status: str = "pass", method: str = "lora", level: str = "layer", **more: Any
) -> Any:
    return {
        "type": "result", "method": method, "level": level, "property": property, "required": True, "status": status,
        "examples": 20, "ratio": 0.8 if status == "pass" else None, "limit": 5.0, "statement": "y is the formula's.",
        "claims": [], "case": None, "replay": None, "kind": None, "detail": "",
        "spec_seconds": 0.1, "target_seconds": 0.2,
    } | more  # fmt: skip


FAILED = {
    "ratio": 31000.0, "kind": "value", "detail": "W: off by 0.02 of its size", "claims": ["L2"],
    "replay": "refpeft replay c t",
}  # fmt: skip


def report(*results: Any, ok: bool = True, shard: tuple[int, int] = (1, 1), footer: bool = True) -> Report:
    return build([HEADER | {"shard": list(shard)}, *results, *([FOOTER | {"ok": ok}] if footer else [])])


def lines(path: Path, events: list[Any]) -> Path:
    path.write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    return path


# ── reading and joining ──────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_written_is_read(tmp_path: Path) -> None:
    events = [HEADER, result(), result("merge", "fail", **FAILED), FOOTER]
    with writer(tmp_path / "r.jsonl") as write:
        for event in events:
            write(event)
    found = read(tmp_path / "r.jsonl")
    assert [found.header, *found.results, found.footer] == events


def test_each_event_is_on_disk_at_once(tmp_path: Path) -> None:
    with writer(tmp_path / "r.jsonl") as write:
        write(HEADER)
        assert json.loads((tmp_path / "r.jsonl").read_text()) == HEADER


@pytest.mark.parametrize("cut", [1, 30, 200])
def test_a_report_that_was_cut_off_says_so(tmp_path: Path, cut: int) -> None:
    path = lines(tmp_path / "r.jsonl", [HEADER, result(), FOOTER])
    path.write_text(path.read_text()[:-cut])
    if cut == 1:
        assert read(path).ok  # only the newline is gone
        return
    found = read(path)
    assert not found.ok
    assert not found.complete
    assert "cut off" in found.verdict


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "expected a header first"),
        ("nonsense\n{}\n", "line 1: expected a JSON object"),
        ("[1]\n", "line 1: expected a JSON object"),
        (json.dumps(FOOTER), "expected one header"),
        (json.dumps(HEADER) + "\n" + json.dumps(HEADER), "expected one header"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path / "r.jsonl")


def test_shards_join_in_any_order(tmp_path: Path) -> None:
    first = [HEADER | {"shard": [1, 2]}, result("forward"), FOOTER]
    second = [HEADER | {"shard": [2, 2], "started": "later"}, result("merge", "fail", **FAILED), FOOTER | {"ok": False}]
    paths = [lines(tmp_path / "b.jsonl", second), lines(tmp_path / "a.jsonl", first)]
    (joined,) = read_runs(paths)
    assert joined.complete
    assert not joined.ok
    assert joined.counts == {"fail": 1, "pass": 1}
    assert joined.seconds == {"spec": 2.0, "target": 4.0, "engine": 1.0}
    assert [r["property"] for r in joined.results] == ["forward", "merge"]


def test_results_are_ordered_as_the_tables_are_whatever_the_order_in_which_they_came() -> None:
    cells = [("lifecycle", "switch", "dora"), ("layer", "merge", "dora"), ("layer", "merge", "lora"),
             ("layer", "mine", "zz"), ("layer", "forward", "rslora"), ("layer", "zero-row", "dora"),
             ("layer", "forward", "lora"), ("model", "logits", "dora")]  # fmt: skip
    rows = [result(name, method=method, level=level) for level, name, method in cells]
    halves = [report(*rows[1::2], shard=(2, 2)), report(*rows[::2], shard=(1, 2))]
    for found in (report(*rows), join(halves)):
        assert found.levels == ["layer", "model", "lifecycle"]
        assert found.methods("layer") == ["lora", "rslora", "dora", "zz"]
        assert found.properties("layer") == ["forward", "merge", "zero-row", "mine"]
        assert re.search(r"layer +lora +rslora +dora +zz", shown(found, 80))
        assert re.search(r"lora</th><th[^>]*>rslora</th><th[^>]*>dora</th>", render.html(found))
        root = ElementTree.fromstring(render.svg(found))
        names = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "method"]
        assert names[:4] == ["lora", "rslora", "dora", "zz"]


def test_seconds_of_processes_side_by_side_are_said_to_be_sums() -> None:
    found = build([HEADER, result(), FOOTER | {"seconds": {"spec": 4.0, "target": 3.0, "engine": 1.0, "wall": 4.2}}])
    assert "4.2 s: spec 4.0 s, target 3.0 s, engine 1.0 s in processes side by side" in shown(found, 80)
    assert "worked side by side, 4.2 s in all" in Page(render.html(found)).text
    assert "side by side" not in shown(report(result()), 80)


def test_a_missing_shard_is_named_and_is_not_ok() -> None:
    joined = join([report(result(), shard=(1, 3)), report(result("merge"), shard=(3, 3))])
    assert not joined.ok
    assert "shard 2 of 3 is missing" in joined.verdict


def test_one_shard_cut_off_is_all_cut_off() -> None:
    joined = join([report(result(), shard=(1, 2)), report(result("merge"), shard=(2, 2), footer=False)])
    assert not joined.complete


def test_parts_of_one_cell_join_to_the_worst() -> None:
    parts = [report(result(ratio=0.5), shard=(1, 2)), report(result(status="fail", **FAILED), shard=(2, 2))]
    (cell,) = join(parts).results
    assert (cell["status"], cell["examples"], cell["ratio"], cell["kind"]) == ("fail", 40, 31000.0, "value")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 1}, "seed is 0 in one, 1 in another"),
        ({"target": {"name": "other"}}, "target is"),
        ({"shard": [1, 2]}, "shard 1 of 2 is given twice"),
        ({"shard": [2, 3]}, "one has 2 shards, another 3"),
    ],
)
def test_reports_of_different_runs_do_not_join(change: Any, sentence: str) -> None:
    first = build([HEADER | {"shard": [1, 2]}, result(), FOOTER])
    other = build([HEADER | {"shard": [2, 2]} | change, result(), FOOTER])
    with pytest.raises(ValueError, match=sentence):
        join([first, other])


@pytest.mark.parametrize("status", ["skip", "undeclared"])
def test_where_nothing_was_tried_nothing_is_well(status: str) -> None:
    found = report(result(status=status), result("merge", status))
    assert not found.ok
    assert found.verdict.startswith("Nothing was shown to be right")


# ── the terminal ─────────────────────────────────────────────────────────────────────────────────────────────────────


def shown(found: Report, width: int, colour: bool = False) -> str:
    file = io.StringIO()
    terminal.show(
        found, Console(file=file, width=width, color_system="standard" if colour else None, force_terminal=colour)
    )
    return file.getvalue()


MIXED = [
    result("forward"), result("merge", "fail", **FAILED), result("unmerge", "known"), result("init", "skip"),
    result("frozen", "undeclared"), result("batch", "error", kind="error:KeyError", detail="KeyError: 'x'"),
    result("switch", "unexpected-pass", level="lifecycle"), result("forward", method="dora", required=False),
]  # fmt: skip


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_matrix_shows_every_status_within_the_width(width: int) -> None:
    text = shown(report(*MIXED, ok=False), width)
    for row in ("forward +✓ +✓", "merge +✗", "unmerge +k", "init +·", "frozen +–", "batch +!", "switch +u"):
        assert re.search(row, text), row
    assert all(len(line) <= width for line in text.splitlines() if not line.startswith("  replay"))
    assert "\x1b" not in text
    assert "Not as expected" in text.splitlines()[-2] + text.splitlines()[-1]


def test_a_failure_is_told_with_its_command_on_one_line() -> None:
    text = shown(report(result("merge", "fail", **FAILED | {"replay": "refpeft replay " + "x" * 200}), ok=False), 80)
    for said in ("y is the formula's.", "W: off by 0.02", "3.1e+04; a correct implementation stays below 5"):
        assert said in text
    assert "  replay  refpeft replay " + "x" * 200 + "\n" in text


def test_colours_where_there_are_colours() -> None:
    assert "\x1b[32m✓" in shown(report(result()), 80, colour=True)


def test_many_methods_make_several_tables() -> None:
    names = [f"method{n:02}" for n in range(25)]
    text = shown(report(*(result(method=name) for name in names)), 80)
    assert all(name in text for name in names)
    assert all(len(line) <= 80 for line in text.splitlines())


# ── JUnit, HTML, pictures ────────────────────────────────────────────────────────────────────────────────────────────


def test_junit_counts_what_failed_and_what_proves_nothing() -> None:
    root = ElementTree.fromstring(render.junit(report(*MIXED, ok=False)))
    suites = {suite.get("name"): suite.attrib for suite in root}
    assert suites["layer"] == {"name": "layer", "tests": "7", "failures": "1", "errors": "1", "skipped": "3"}
    assert suites["lifecycle"]["failures"] == "1"


def test_junit_of_an_incomplete_run_is_an_error() -> None:
    root = ElementTree.fromstring(render.junit(report(result(), footer=False)))
    assert root.find("./testsuite[@name='run']/testcase/error") is not None


def test_junit_holds_no_control_characters() -> None:
    text = render.junit(report(result("merge", "fail", detail="\x1b[31mbad\x00 <&>")))
    assert "bad  <&>" in (ElementTree.fromstring(text).find(".//failure").attrib["message"])  # type: ignore[union-attr]


class Page(HTMLParser):
    """Checks that tags nest, and keeps ids, links and what would need a network."""

    VOID = ("meta", "link", "br", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.hrefs: list[str] = []
        self.loads: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.hrefs += [values["href"]] if "href" in values else []
        self.loads += [values[name] for name in ("src", "srcset", "data") if name in values] + (
            [tag] if tag == "link" else []
        )
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    text = render.html(report(*MIXED, ok=False))
    page = Page(text)
    assert not page.loads
    assert not re.search(r"https?://|@import|url\(", text)
    assert len(page.ids) == len(set(page.ids))
    assert all(href.startswith("#") and href[1:] in page.ids for href in page.hrefs)


def test_every_cell_has_its_panel() -> None:
    page = Page(render.html(report(*MIXED, ok=False)))
    for cell in MIXED:
        name = "-".join((cell["level"], cell["method"], cell["property"]))
        assert {name, "cell-" + name} <= set(page.ids)
        assert "#" + name in page.hrefs


def test_the_panel_tells_claim_ratio_and_case(tmp_path: Path) -> None:
    meta = {
        "spec_version": "1",
        "level": "layer",
        "method": "lora",
        "property": "merge",
        "config": {"r": 2, "lora_alpha": 3},
    }
    Case(meta, {"W": np.array([[1.5, -2.0]]), "x": np.zeros((9, 9))}).save(tmp_path / "c.safetensors")
    failed = result("merge", "fail", **FAILED | {"case": str(tmp_path / "c.safetensors")})
    text = Page(render.html(report(failed, ok=False))).text
    for said in (doc("lora").claims["L2"], "3.1e+04", "r = 2, lora_alpha = 3", "[[ 1.5 -2. ]]", "float64 [9, 9]"):
        assert said in text
    assert "refpeft replay c t" in text


def test_a_case_that_is_gone_is_said_to_be_gone() -> None:
    text = render.html(report(result("merge", "fail", **FAILED | {"case": "nowhere.safetensors"}), ok=False))
    assert "not there when this page was made" in text


def test_what_a_target_says_is_text_and_not_markup() -> None:
    text = render.html(report(result("merge", "error", detail="<script>alert(1)</script>"), ok=False))
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_picture_has_a_mark_for_every_cell() -> None:
    cells = [*MIXED, result("frozen", method="dora")]
    root = ElementTree.fromstring(render.svg(report(*cells, ok=False)))
    marks = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text") if text.get("class") == "mark"]
    assert sorted(marks) == sorted(terminal.STATUSES[cell["status"]][0] for cell in cells)


def test_the_picture_leaves_out_of_what_nothing_is_declared() -> None:
    """Levels, methods and properties."""
    undeclared = [
        result("frozen", "undeclared"), result("onnx", "undeclared", level="export"),
        result("forward", "undeclared", method="dora"),
    ]  # fmt: skip
    root = ElementTree.fromstring(render.svg(report(result(), *undeclared)))
    text = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"layer", "lora", "forward"} <= text
    assert not text & {"export", "dora", "frozen", "onnx"}
    assert "3 undeclared" in "".join(root.itertext())


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (report(result(), result("merge", "fail"), result("init", "undeclared"), ok=False), "1 of 2 as specified"),
        (report(result(), footer=False), "incomplete"),
    ],
)
def test_the_badge(found: Report, text: str) -> None:
    assert text in "".join(ElementTree.fromstring(render.badge(found)).itertext())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_paper_a_formula_and_claims(method: str) -> None:
    said = doc(method)
    assert re.search(r"arXiv \d{4}\.\d{5}|there is no paper", said.paper)
    assert "=" in said.formulae
    assert said.claims
    assert all(text.endswith((".", ")")) for text in said.claims.values())
