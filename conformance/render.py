"""A report as files: JUnit for CI, one HTML page for people, a picture of the matrix and a badge for a README."""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from refpeft.conformance.case import Case
from refpeft.conformance.docs import doc
from refpeft.conformance.report import LEVELS, STATUSES, Event, Report, key, unique
from refpeft.conformance.site import Site
from refpeft.methods import METHODS

# ── JUnit ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def junit(report: Report) -> str:
    """A suite for each level, a test for each property of a method. What proves nothing counts as skipped."""
    root = ElementTree.Element("testsuites", name=f"refpeft check {report.target}")
    for level in report.levels:
        root.append(suite(level, [junit_case(result) for result in report.results if result["level"] == level]))
    if not report.complete:
        case = ElementTree.Element("testcase", classname="refpeft", name="complete")
        ElementTree.SubElement(case, "error", message=report.verdict)
        root.append(suite("run", [case]))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def suite(name: str, cases: Sequence[ElementTree.Element]) -> ElementTree.Element:
    element = ElementTree.Element("testsuite", name=name, tests=str(len(cases)))
    for kind, total in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        element.set(total, str(sum(case.find(kind) is not None for case in cases)))
    element.extend(cases)
    return element


def junit_kind(result: Event) -> str | None:
    match result["status"]:
        case "fail" | "unexpected-pass":
            return "failure"
        case "error":
            return "error"
        case "pass":
            return None
    return "skipped"


def junit_case(result: Event) -> ElementTree.Element:
    seconds = result.get("spec_seconds", 0) + result.get("target_seconds", 0)
    name = f"{result['level']}.{result['method']}"
    case = ElementTree.Element("testcase", classname=name, name=result["property"], time=f"{seconds:.3f}")
    if kind := junit_kind(result):
        message = printable(result.get("detail") or STATUSES[result["status"]][1])
        found = ElementTree.SubElement(case, kind, message=message, type=result.get("kind") or result["status"])
        found.text = printable("\n".join(filter(None, (result["statement"], result.get("case"), result.get("replay")))))
    return case


def printable(text: str) -> str:
    """XML has no control characters."""
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


# ── the page ─────────────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = 32  # arrays up to this size are shown in full


def html(report: Report) -> str:
    return environment().get_template("report.html.jinja").render(report=report, statuses=STATUSES)


def site_html(site: Site) -> str:
    """Several implementations as one page."""
    return environment().get_template("site.html.jinja").render(**shown(site))


def shown(site: Site) -> dict[str, Any]:
    present = {result["status"] for _, result in site.statements}
    return {"site": site, "statuses": STATUSES, "levels": LEVELS, "present": present}


def environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=lambda name: name is not None and not name.endswith((".css.jinja", ".js.jinja")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {
        "number": number,
        "seconds": seconds,
        "anchor": anchor,
        "near": near,
        "along": along,
        "quoted": shlex.quote,
    }
    environment.filters.update(filters, claims=claims, case=case)
    return environment


def number(x: float) -> str:
    """Three figures: 0.812, 5, 3.1e+04."""
    return f"{x:.3g}"


def seconds(x: float) -> str:
    return f"{1000 * x:.0f} ms" if x < 1 else f"{x:.1f} s"


def anchor(result: Event) -> str:
    return "-".join(key(result))


def near(result: Event) -> float:
    """How near the limit a ratio is, from 0 to 1."""
    return round(min(1.0, result["ratio"] / result["limit"]), 3) if result["limit"] else 0.0


def along(result: Event) -> float:
    """Where on the gauge a ratio lies, in percent; the limit lies at 60."""
    return round(min(100.0, 60 * math.log1p(result["ratio"]) / math.log1p(result["limit"])), 1)


def claims(result: Event) -> Mapping[str, str]:
    """The text of the claims that a result cites, from the method's docstring."""
    said = doc(result["method"]).claims if result["method"] in METHODS else {}
    return {label: said.get(label, "") for label in result.get("claims") or ()}


# fields of a case that the panel shows elsewhere, or that say nothing to a person
HIDDEN = ("spec_version", "id", "level", "method", "property", "claims", "statement", "structure", "params", "active")


def case(result: Event) -> Mapping[str, Any] | None:
    """What the case file of a result holds, to be looked at: its question and its arrays, small ones in full."""
    if not result.get("case"):
        return None
    try:
        found = Case.read(result["case"])
    except ValueError:
        return {"about": {"file": f"{result['case']} (not there when this page was made)"}, "arrays": []}
    about = {
        name: plain(name, value)
        for name, value in found.meta.items()
        if name not in HIDDEN and value not in (None, "none")
    }
    return {"about": about, "arrays": [view(name, array) for name, array in sorted(found.arrays.items())]}


def plain(name: str, value: Any) -> str:
    """A field of the question as text: r = 2, lora_alpha = 3; each step and each adapter on a line of its own."""
    if name == "steps":
        rest = [{n: v for n, v in step.items() if n != "do"} for step in value]
        return "\n".join(
            f"{k} {step['do']} {fields(more)}" for k, (step, more) in enumerate(zip(value, rest, strict=True))
        )
    if name == "adapters":
        return "\n".join(f"{n} ({a['method']}): {fields(a['config'])}" for n, a in value.items())
    if isinstance(value, Mapping):
        return fields(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def fields(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {plain('', value)}" for name, value in values.items())


def view(name: str, array: np.ndarray[Any, Any]) -> Mapping[str, str | None]:
    kind = f"{array.dtype} [{', '.join(map(str, array.shape))}]"
    text = np.array2string(array, precision=6, max_line_width=64, separator=" ") if 0 < array.size <= SMALL else None
    return {"name": name, "kind": kind, "text": text}


# ── the picture ──────────────────────────────────────────────────────────────────────────────────────────────────────

STEP, MARGIN, GAP, WIDTH = 21, 20, 24, 1060  # pixels: from cell to cell, around everything, between levels, of a row
TILT = math.radians(55)  # of the labels
LETTER = 6.3  # the width of one, about


def svg(report: Report) -> str:
    """The matrix, for a README: a block for each level, side by side as far as they fit. A level, a method or a
    property of which the target declares nothing has no place; the verdict above counts it."""
    declared = [result for result in report.results if result["status"] != "undeclared"]
    levels = unique(result["level"] for result in declared)
    longest = LETTER * max((len(result["property"]) for result in declared), default=0)
    head, lean = math.ceil(longest * math.sin(TILT)) + 10, math.ceil(longest * math.cos(TILT))
    blocks: list[dict[str, Any]] = []
    x, y, widest, tallest = MARGIN, 50, 640, 0
    for level in levels:
        own = {(result["method"], result["property"]) for result in declared if result["level"] == level}
        methods = [method for method in report.methods(level) if method in {m for m, _ in own}]
        properties = [name for name in report.properties(level) if name in {n for _, n in own}]
        left = math.ceil(max(map(len, methods)) * LETTER) + 12
        wide = left + len(properties) * STEP
        if x > MARGIN and x + wide + lean > WIDTH:
            x, y, tallest = MARGIN, y + tallest, 0
        named = x == MARGIN or blocks[-1]["methods"] != methods  # the names stand once in a row of blocks
        left = left if named else GAP
        blocks.append(
            {"level": level, "methods": methods, "properties": properties, "named": named, "x": x + left, "y": y}
        )
        x += left + len(properties) * STEP
        widest, tallest = max(widest, x + lean), max(tallest, head + len(methods) * STEP + 34)
    layout = {"blocks": blocks, "head": head, "step": STEP, "width": widest, "height": y + tallest}
    return environment().get_template("matrix.svg.jinja").render(report=report, statuses=STATUSES, **layout)


PART = 13


def site_svg(site: Site) -> str:
    """Several implementations as one picture."""
    left = MARGIN + math.ceil(LETTER * max(map(len, site.methods), default=0)) + 10
    longest = LETTER * max(len(f"{i.name} {i.version}") for i in site.implementations)
    wide, top = len(LEVELS) * PART + 12, 58 + math.ceil(longest * math.sin(math.radians(40)))
    width = max(720, left + len(site.implementations) * wide + math.ceil(longest * 0.77))
    layout = {"left": left, "top": top, "wide": wide, "part": PART, "step": STEP, "width": width}
    height = top + len(site.methods) * STEP + 40
    return environment().get_template("site.svg.jinja").render(**shown(site), **layout, height=height)


def badge(report: Report) -> str:
    """A small picture: refpeft | 90 of 92 as specified."""
    passed, asked = report.counts.get("pass", 0), sum(n for s, n in report.counts.items() if s != "undeclared")
    text = f"{passed} of {asked} as specified" if report.complete else "incomplete"
    colour = "#2f7d4f" if report.ok else "#c1352b"
    widths = {"left": 58, "right": math.ceil(len(text) * LETTER) + 16}
    return environment().get_template("badge.svg.jinja").render(text=text, colour=colour, **widths)
