"""One fleet for every client, and at the end of the run: which cells ran."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

from tests.clients.cells import Tally
from tests.clients.kit import Absent, Program, Stage, staged

_TALLY = pytest.StashKey[Tally]()


@pytest.fixture(scope="package")
def stage(tmp_path_factory: pytest.TempPathFactory, small_model_path: Path) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("clients"), small_model_path) as stage:
        yield stage


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Tally:
    return pytestconfig.stash.setdefault(_TALLY, Tally())


@pytest.fixture
def program(stage: Stage, tally: Tally) -> Callable[[str], Program]:
    """The program of a client; started when it is first wanted."""

    def started(client: str) -> Program:
        try:
            return stage.program(client)
        except Absent as absent:
            tally.absent[client] = str(absent)
            pytest.skip(f"NOT RUN: {client}: {absent}")

    return started


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    cell = getattr(item, "callspec", None) and item.callspec.params.get("cell")
    if report.when == "call" and report.passed and cell is not None:
        item.config.stash[_TALLY].done.add(cell)
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tally = config.stash.get(_TALLY, None)
    if tally is not None and (tally.done or tally.absent):
        terminalreporter.section("client suite")
        for line in tally.lines():
            terminalreporter.write_line(line)
