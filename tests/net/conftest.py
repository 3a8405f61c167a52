"""The network tests run on both event loops: uvloop serves in production, asyncio on Windows."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncIterator, Callable, Mapping

import pytest

from herd_node.net.pool import Pool


@pytest.hookimpl
def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if sys.platform != "win32":
        loops["uvloop"] = importlib.import_module("uvloop").new_event_loop
    return loops


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    """A pool that must end without a connection in use."""
    pool = Pool(idle_s=60)
    yield pool
    in_use = pool.live_count
    await pool.close(force=True)
    assert in_use == 0, "a connection leaked"
    assert not pool._open
