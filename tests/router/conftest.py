"""One fleet for all tests of the router; each test gets it fresh."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.router.kit import Fleet, two_nodes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The fleet lives in one loop, so its tests must run there."""
    for item in items:
        if "tests/router" in item.path.as_posix():
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
            item.add_marker(pytest.mark.e2e)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def started_fleet(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    async with two_nodes(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest_asyncio.fixture(loop_scope="session")
async def fleet(started_fleet: Fleet) -> AsyncIterator[Fleet]:
    await started_fleet.reset()
    yield started_fleet
