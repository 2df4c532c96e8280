"""The same run on a Dask cluster of separate processes, also when one of them dies in the middle."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from refpeft.cli import app
from refpeft.conformance import engine
from refpeft.conformance.report import build

pytestmark = [pytest.mark.dask, pytest.mark.filterwarnings("ignore")]  # of Dask's own about ports and clocks
ASKED: Mapping[str, Any] = {"methods": ["lora", "dora"], "levels": ["layer"], "seed": 5, "examples": 6}
TIMES = ("spec_seconds", "target_seconds", "engine_seconds")


def plain(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in row.items() if name not in TIMES}


def test_a_worker_that_is_killed_loses_nothing_and_doubles_nothing() -> None:
    """All the rows of a run in one process, each once, and a complete report."""
    from distributed import Client, LocalCluster

    expected = {(r["method"], r["property"]): plain(r) for r in engine.check("spec", **ASKED) if r["type"] == "result"}
    separate = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
    with separate as cluster, Client(cluster) as client:
        pids = client.run(os.getpid)
        events = []
        for event in engine.check("spec", **ASKED, executor=client.get_executor()):
            events.append(event)
            if len(events) == 4:  # a header and three results; the others are in work, or wait
                os.kill(next(iter(pids.values())), signal.SIGKILL)
        new = client.run(os.getpid)
    assert set(new.values()) != set(pids.values())  # it was killed, and another came
    rows = [e for e in events if e["type"] == "result"]
    assert len(rows) == len(expected)
    assert {(r["method"], r["property"]): plain(r) for r in rows} == expected
    report = build(events)
    assert report.complete
    assert report.ok
    assert sum(report.counts.values()) == len(expected)


def test_the_command_line_works_on_a_cluster(tmp_path: Path) -> None:
    from distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        words = ["check", "spec", "-m", "lora", "-l", "layer", "--examples", "1", "--dask", cluster.scheduler_address]
        done = CliRunner().invoke(app, [*words, "--json", str(tmp_path / "r.jsonl")])
    assert done.exit_code == 0, done.output
    assert "All as expected" in done.output
    assert "of the time in the target" in done.output
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) > 5
