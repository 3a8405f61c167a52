import asyncio

import pytest

from herd_node.runtime.clock import Clock, ManualClock, SystemClock


async def test_the_system_clock_goes_on_by_itself():
    clock: Clock = SystemClock()
    before_s = clock.now_s()
    await clock.sleep(0.001)
    assert clock.now_s() - before_s >= 0.001
    assert clock.wall_s() > 1_700_000_000


async def test_a_manual_clock_stands_still_until_it_is_moved():
    clock = ManualClock(now_s=10.0, wall_s=500.0)
    assert (clock.now_s(), clock.wall_s()) == (10.0, 500.0)
    clock.advance(2.5)
    assert (clock.now_s(), clock.wall_s()) == (12.5, 502.5)
    clock.set_wall(0.0)
    assert (clock.now_s(), clock.wall_s()) == (12.5, 0.0)
    with pytest.raises(ValueError):
        clock.advance(-1)


async def test_sleepers_wake_in_the_order_of_their_time_and_not_before():
    clock = ManualClock()
    woken: list[str] = []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(name)

    async with asyncio.TaskGroup() as group:
        for name, seconds in (("late", 3.0), ("early", 1.0), ("also early", 1.0), ("never mind", 0.0)):
            group.create_task(sleeper(name, seconds))
        await clock.until_sleeping(3)
        await asyncio.sleep(0)
        assert woken == ["never mind"]
        clock.advance(0.999)
        await asyncio.sleep(0)
        assert (woken, clock.sleeping) == (["never mind"], 3)
        clock.advance(5.0)
    assert woken == ["never mind", "early", "also early", "late"]
    assert clock.sleeping == 0


async def test_a_cancelled_sleeper_is_forgotten():
    clock = ManualClock()
    sleeper = asyncio.create_task(clock.sleep(1.0))
    await clock.until_sleeping()
    sleeper.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sleeper
    assert clock.sleeping == 0
    clock.advance(2.0)


async def test_a_test_can_wait_for_the_next_round_of_a_loop():
    clock = ManualClock()
    rounds: list[float] = []

    async def loop() -> None:
        while True:
            rounds.append(clock.now_s())
            await clock.sleep(5.0)

    task = asyncio.create_task(loop())
    for _ in range(3):
        await clock.until_sleeping()
        clock.advance(5.0)
    await clock.until_sleeping()
    task.cancel()
    assert rounds == [1000.0, 1005.0, 1010.0, 1015.0]
