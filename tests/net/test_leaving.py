"""Whoever works for a caller stops when the caller leaves, and only then."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from herd_node.net.exchange import ClientGone, Exchange
from herd_node.net.leaving import UntilGone


class Caller:
    """What `UntilGone` needs of an exchange."""

    def __init__(self, *, gone: bool = False) -> None:
        self.gone = gone
        self.leave: Callable[[], None] = lambda: None

    def on_gone(self, callback: Callable[[], None]) -> None:
        self.leave = callback


def until_gone(caller: Caller) -> UntilGone:
    exchange: Exchange = caller  # type: ignore[assignment]
    return UntilGone(exchange)


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


def cancellations() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_a_caller_that_leaves_ends_the_work_wherever_it_waits():
    caller = Caller()
    with pytest.raises(ClientGone), until_gone(caller):
        asyncio.get_running_loop().call_soon(lambda: caller.leave())
        await forever()
    assert cancellations() == 0
    await asyncio.sleep(0)


async def test_work_for_a_caller_that_has_left_does_not_begin():
    began = False
    with pytest.raises(ClientGone), until_gone(Caller(gone=True)):
        began = True
    assert not began


async def test_who_leaves_after_the_end_interrupts_nothing():
    caller = Caller()
    with until_gone(caller):
        await asyncio.sleep(0)
    caller.leave()
    await asyncio.sleep(0)
    assert cancellations() == 0


async def test_an_error_of_the_work_comes_out_although_the_caller_left():
    caller = Caller()
    with pytest.raises(KeyError), until_gone(caller):
        asyncio.get_running_loop().call_soon(lambda: caller.leave())
        try:
            await forever()
        finally:
            raise KeyError("x")
    assert cancellations() == 0
    await asyncio.sleep(0)


@pytest.mark.parametrize("leaves_first", [True, False])
async def test_a_cancellation_from_outside_passes(leaves_first: bool):
    caller = Caller()

    async def work() -> None:
        with until_gone(caller):
            await forever()

    task = asyncio.ensure_future(work())
    await asyncio.sleep(0)
    for leaves in (leaves_first, not leaves_first):
        if leaves:
            caller.leave()
        else:
            task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
