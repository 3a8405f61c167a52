"""The bench: its smoke run works and ends clean, it sees errors, and its verdicts are right."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench import goals, report
from bench.build import Tools, build
from bench.errors import BenchError
from bench.goals import GOALS
from bench.processes import Program
from bench.rounds import Cell, Round
from bench.scenarios import BY_NAME

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="epoll and /proc")


def bench(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Its temporary files, and so the command lines of what it starts, name this folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "bench", "--json", str(folder / "out.json"), *arguments],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def leftovers(folder: Path) -> list[object]:
    running = [
        process.info["cmdline"]
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in word for word in process.info["cmdline"] or ())
    ]
    return [*running, *folder.glob("herd-bench-*")]


@pytest.mark.slow
def test_the_quick_run_measures_every_cell_without_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    process = bench(tmp_path, "--quick")
    try:
        said, progress = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    assert process.returncode == 0, progress
    assert leftovers(tmp_path) == []
    found = json.loads((tmp_path / "out.json").read_text())
    (done,) = found["rounds"]
    assert set(done) == {"short-8", "stream-16", "slow-100", "image-8m"}
    for row in done.values():
        assert set(row) == {"direct", "router", "agent"}
        assert all(cell["raw"]["errors"] == 0 and cell["raw"]["requests"] > 0 for cell in row.values())
        assert row["router"]["figures"]["cpu_us"] > 0
        agent = row["agent"]["figures"]
        assert agent["cpu_us"] == pytest.approx(agent["cpu_us_router"] + agent["cpu_us_agent"])
    assert found["memory"]["after_bytes"] > found["memory"]["fresh_bytes"] > 1_000_000
    assert "| short chats, 8 connections | CPU µs a request |" in said


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_running(tmp_path: Path) -> None:
    arguments = ("--only", "short-1", "--targets", "direct,router", "--rounds", "9", "--no-memory")
    process = bench(tmp_path, *arguments)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("round"):
                break
        process.send_signal(signal.SIGINT)
        _, progress = process.communicate(timeout=30)
    finally:
        process.terminate()
    assert process.returncode == 130, progress
    assert leftovers(tmp_path) == []


@pytest.fixture(scope="module")
def tools() -> Tools:
    try:
        return build()
    except BenchError as error:
        pytest.skip(str(error))


@pytest.fixture
def backend_port(tools: Tools, tmp_path: Path) -> Iterator[int]:
    command = [str(tools.backend), "--port", "0"]
    with Program("backend", command, tmp_path / "backend.log", pipe_output=True) as program:
        yield int(program.first_line())


def load(tools: Tools, folder: Path, port: int, name: str, *options: str) -> dict[str, Any]:
    path = folder / "request"
    path.write_bytes(BY_NAME[name].request("bench"))
    command = [str(tools.load), "--port", str(port), "--request", str(path), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_streams_are_counted_record_by_record(tools: Tools, tmp_path: Path, backend_port: int) -> None:
    options = ("--connections", "3", "--requests", "30", "--records", "131")
    found = load(tools, tmp_path, backend_port, "stream-1", *options)
    assert (found["requests"], found["chunks"], found["errors"]) == (30, 30 * 131, 0)


def test_a_stream_with_a_record_too_few_is_an_error(tools: Tools, tmp_path: Path, backend_port: int) -> None:
    found = load(tools, tmp_path, backend_port, "stream-1", "--requests", "5", "--records", "132")
    assert (found["requests"], found["errors"]) == (0, 5)
    assert "131 records" in found["first_error"]


def test_a_port_where_nobody_listens_is_an_error(tools: Tools, tmp_path: Path) -> None:
    found = load(tools, tmp_path, 1, "short-1", "--requests", "2")
    assert (found["requests"], found["errors"]) == (0, 2)


def test_what_has_not_ended_in_time_is_an_error(tools: Tools, tmp_path: Path, backend_port: int) -> None:
    options = ("--once", "--connections", "4", "--records", "103", "--limit-s", "0.2")
    found = load(tools, tmp_path, backend_port, "slow-500", *options)
    assert (found["requests"], found["errors"]) == (0, 4)


def one_round(**cpu_us: float) -> Round:
    return {"short-8": {name: Cell({"cpu_us": value, "errors": 0.0}, {}) for name, value in cpu_us.items()}}


def test_a_goal_is_the_median_of_the_ratios_within_each_round() -> None:
    rounds = [
        one_round(router=90, sglang=100),
        one_round(router=70, sglang=140),
        one_round(router=60, sglang=80),
    ]
    result = goals.judge(rounds, (), None)[0]
    assert result.by_round == (0.9, 0.5, 0.75)
    assert (result.actual, result.verdict) == ("0.75 × sglang-router", "met")


@pytest.mark.parametrize(("cpu_us", "verdict"), [(80, "met"), (100, "within 1.3 ×"), (110, "missed")])
def test_a_verdict_says_how_far_the_goal_is(cpu_us: float, verdict: str) -> None:
    assert goals.judge([one_round(router=cpu_us, sglang=100)], (), None)[0].verdict == verdict


def test_without_its_peer_a_goal_is_not_measured() -> None:
    assert goals.judge([one_round(router=80)], (), None)[0].verdict == "not measured"


def test_every_goal_names_a_scenario_that_exists() -> None:
    assert {goal.scenario for goal in GOALS} <= BY_NAME.keys()


def test_the_tables_replace_what_lies_between_the_markers(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.into_readme(path, "new")
    assert path.read_text() == f"before\n{report.BEGIN}\nnew\n{report.END}\nafter\n"
    path.write_text("no place")
    with pytest.raises(BenchError):
        report.into_readme(path, "new")
