"""Blocking work beside the event loop, for files that somebody else opens afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def in_thread(work: Callable[[], _T]) -> _T:
    """`work` in a thread. Whoever is cancelled meanwhile leaves only when the work is done: `to_thread` would
    leave it behind, still writing to what is closed or given away by then."""
    running = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
