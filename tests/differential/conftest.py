"""Both fleets, each started when its first request is compared; at the end of the run: what was compared."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.differential import corpus
from tests.differential.differences import Tally
from tests.differential.sides import Sides, llama_sides, ollama_sides

_TALLY = pytest.StashKey[Tally]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fleets live in one loop, so these tests must run there."""
    for item in items:
        if "tests/differential" in item.path.as_posix() and "case" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
            item.add_marker(pytest.mark.e2e)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def ollama(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Sides]:
    async with ollama_sides(tmp_path_factory.mktemp("ollama"), corpus.read()) as sides:
        yield sides


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def llama(tmp_path_factory: pytest.TempPathFactory, small_model_path: Path) -> AsyncIterator[Sides]:
    async with llama_sides(tmp_path_factory.mktemp("llama"), small_model_path) as sides:
        yield sides


@pytest.fixture(scope="session")
def tally(pytestconfig: pytest.Config) -> Tally:
    return pytestconfig.stash.setdefault(_TALLY, Tally())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tally = config.stash.get(_TALLY, None)
    if tally is not None and tally.compared:
        terminalreporter.section("differential suite")
        for line in tally.lines():
            terminalreporter.write_line(line)
