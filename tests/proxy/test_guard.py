"""The guard: one cause, the first one, and never the cancellation that somebody else meant."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from herd.proxy.guard import Cause, Guard, Tripped


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


def timers() -> int:
    """Handles that the loop still has to call."""
    return sum(not handle.cancelled() for handle in asyncio.get_running_loop()._scheduled)  # type: ignore[attr-defined]


async def cause_of(guard: Guard, block: Any) -> Cause | None:
    try:
        with guard:
            await block
    except Tripped as tripped:
        return tripped.cause
    return None


async def test_a_trip_ends_the_block_with_its_cause():
    guard = Guard()
    asyncio.get_running_loop().call_soon(guard.trip, "client_gone")
    assert await cause_of(guard, forever()) == "client_gone"


async def test_the_first_of_two_trips_wins():
    guard = Guard()
    loop = asyncio.get_running_loop()
    loop.call_soon(guard.trip, "gap")
    loop.call_soon(guard.trip, "total")
    assert await cause_of(guard, forever()) == "gap"
    await asyncio.sleep(0)  # nothing of it is left


async def test_a_block_that_ends_is_left_alone():
    guard = Guard()
    guard_task = asyncio.current_task()
    with guard:
        guard.deadline("total", 0.01, "total")
        guard.touch("gap", 0.01)
        await asyncio.sleep(0)
    assert timers() == 0
    guard.trip("gap")
    await asyncio.sleep(0.02)
    assert guard_task is not None
    assert guard_task.cancelling() == 0


async def test_no_timer_is_left_when_the_block_raises():
    guard = Guard()
    with pytest.raises(KeyError), guard:
        guard.deadline("total", 60, "total")
        guard.touch("gap", 60)
        raise KeyError("x")
    assert timers() == 0


async def test_a_deadline_trips_and_a_cleared_or_moved_one_does_not():
    guard = Guard()
    with pytest.raises(Tripped) as tripped, guard:
        guard.deadline("a", 0.001, "total")
        guard.clear("a")
        guard.clear("never set")
        guard.deadline("b", 0.001, "total")
        guard.deadline("b", 60, "total")
        guard.deadline("c", 0.005, "first_record")
        await forever()
    assert tripped.value.cause == "first_record"
    assert timers() == 0


async def test_silence_trips_with_what_it_is_blamed_on():
    for cause in ("gap", "client_stalled"):
        guard = Guard()
        with pytest.raises(Tripped) as tripped, guard:
            guard.touch("total", 60)
            guard.touch(cause, 0.005)  # type: ignore[arg-type]
            await forever()
        assert tripped.value.cause == cause
        assert timers() == 0


async def test_progress_keeps_the_block_alive_with_one_timer():
    guard = Guard()
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    with guard:
        while loop.time() - began_s < 0.06:
            guard.touch("gap", 0.02)
            await asyncio.sleep(0.001)
            assert timers() <= 1
        guard.touch("gap", 0.02)
        with pytest.raises(Tripped), Guard() as inner:  # an inner one has a silence of its own
            inner.touch("total", 0.001)
            await forever()
    assert timers() == 0


async def test_progress_of_the_same_kind_moves_the_silence_and_keeps_its_blame():
    guard = Guard()
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    with pytest.raises(Tripped) as tripped, guard:
        guard.touch("gap", 0.02)
        while loop.time() - began_s < 0.06:
            guard.again(0.02)
            await asyncio.sleep(0.001)
        await forever()
    assert tripped.value.cause == "gap"
    assert loop.time() - began_s >= 0.08 - 0.002
    assert timers() == 0


async def test_a_cancellation_from_outside_passes():
    guard = Guard()
    task = asyncio.ensure_future(cause_of(guard, forever()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("trip_first", [True, False])
async def test_a_cancellation_from_outside_passes_although_a_trip_came_too(trip_first: bool):
    guard = Guard()
    task = asyncio.ensure_future(cause_of(guard, forever()))
    await asyncio.sleep(0)
    for trip in (trip_first, not trip_first):
        if trip:
            guard.trip("gap")
        else:
            task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_nested_guards_each_catch_their_own():
    outer, inner = Guard(), Guard()
    loop = asyncio.get_running_loop()
    with outer:
        loop.call_soon(inner.trip, "first_record")
        assert await cause_of(inner, forever()) == "first_record"
        await asyncio.sleep(0)
    assert outer.cause is None

    outer, inner = Guard(), Guard()

    async def nested() -> None:
        with inner:
            await forever()

    loop.call_soon(outer.trip, "client_gone")
    assert await cause_of(outer, nested()) == "client_gone"
    assert inner.cause is None


@pytest.mark.parametrize("inner_first", [True, False])
async def test_when_both_trip_at_once_the_outer_one_is_what_happened(inner_first: bool):
    outer, inner = Guard(), Guard()

    async def nested() -> None:
        with inner:
            await forever()

    loop = asyncio.get_running_loop()
    order = [inner, outer] if inner_first else [outer, inner]
    for guard, cause in zip(order, ("gap", "total"), strict=True):
        loop.call_soon(guard.trip, cause)
    assert await cause_of(outer, nested()) == outer.cause
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def test_a_trip_of_the_task_itself_is_raised_by_check_and_by_nothing_else():
    guard = Guard()
    task = asyncio.current_task()
    assert task is not None
    with pytest.raises(Tripped) as tripped, guard:
        guard.trip("client_gone")
        await asyncio.sleep(0)
        guard.check()
    assert tripped.value.cause == "client_gone"
    assert task.cancelling() == 0
    await asyncio.sleep(0)  # no cancellation is left for later


async def test_a_trip_of_another_task_interrupts():
    guard = Guard()

    async def trip() -> None:
        guard.trip("client_gone")

    other = asyncio.ensure_future(trip())
    assert await cause_of(guard, forever()) == "client_gone"
    await other


async def test_what_the_block_raises_instead_of_the_trip_is_what_comes_out_and_no_cancellation_stays():
    guard = Guard()

    async def stubborn() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            raise KeyError("x") from None

    asyncio.get_running_loop().call_soon(guard.trip, "gap")
    with pytest.raises(KeyError):
        await cause_of(guard, stubborn())
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    async with asyncio.timeout(1):
        await asyncio.sleep(0)


async def test_a_call_is_made_once_after_its_time_and_not_when_cleared_or_after_the_end():
    guard = Guard()
    calls: list[str] = []
    with guard:
        guard.later("a", 0.001, lambda: calls.append("a"))
        guard.later("b", 0.001, lambda: calls.append("b"))
        guard.clear("b")
        guard.later("c", 0.02, lambda: calls.append("c"))
        guard.deadline("total", 60, "total")
        await asyncio.sleep(0.01)
        assert calls == ["a"]
    await asyncio.sleep(0.03)
    assert (calls, timers()) == (["a"], 0)
