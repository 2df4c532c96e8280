"""A report as files: JUnit for CI, one HTML page for people, a picture of the matrix and a badge for a README."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from refpeft.conformance.report import STATUSES, Event, Report

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
