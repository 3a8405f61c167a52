import asyncio
import gc
import logging

import pytest

from herd_node.runtime.clock import ManualClock
from herd_node.runtime.tasks import Tasks, supervise


async def test_a_task_is_kept_until_it_is_done_and_then_let_go():
    tasks = Tasks("test")
    go_on = asyncio.Event()
    done: list[int] = []

    async def work() -> int:
        await go_on.wait()
        done.append(1)
        return 7

    tasks.spawn(work(), name="work")
    gc.collect()
    assert len(tasks) == 1
    kept = tasks.spawn(work(), name="more work")
    assert kept.get_name() == "test/more work"
    go_on.set()
    assert await kept == 7
    await asyncio.sleep(0)
    assert (done, len(tasks)) == ([1, 1], 0)


async def test_an_exception_that_nobody_awaits_is_logged_with_its_task(caplog):
    tasks = Tasks("test")

    async def fails() -> None:
        raise KeyError("lost")

    with caplog.at_level(logging.ERROR):
        await asyncio.wait([tasks.spawn(fails(), name="careless")])
        await asyncio.sleep(0)
    (record,) = caplog.records
    assert "test/careless" in record.message
    assert record.exc_info is not None
    assert len(tasks) == 0


async def test_closing_cancels_everything_waits_for_it_and_admits_nothing_more(caplog):
    tasks = Tasks("test")
    tidied: list[str] = []

    async def tidy(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            tidied.append(name)

    tasks.spawn(tidy("a"), name="a")
    tasks.spawn(tidy("b"), name="b")
    await asyncio.sleep(0)
    await tasks.close()
    assert sorted(tidied) == ["a", "b"]
    assert len(tasks) == 0
    with pytest.raises(RuntimeError, match="test is closed"):
        tasks.spawn(tidy("c"), name="c")
    await tasks.close()
    assert caplog.records == []


async def test_a_task_that_swallows_its_cancellation_is_named_and_cancelled_again(caplog):
    tasks = Tasks("test", patience_s=0.001)

    async def stubborn() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.Event().wait()

    tasks.spawn(stubborn(), name="stubborn")
    await asyncio.sleep(0)
    async with asyncio.timeout(5):
        await tasks.close()
    assert "test/stubborn goes on" in caplog.text


async def test_a_task_may_close_its_own_owner():
    tasks = Tasks("test")

    async def closes() -> str:
        await tasks.close()
        return "still here"

    assert await tasks.spawn(closes(), name="closes") == "still here"


async def test_a_supervised_loop_is_started_again_after_pauses_that_double(caplog):
    clock = ManualClock(now_s=0.0)
    starts: list[float] = []
    crashes: list[tuple[str, str]] = []

    async def crashing() -> None:
        starts.append(clock.now_s())
        raise OSError("no network")

    tasks = Tasks("test")
    tasks.spawn(
        supervise(
            crashing,
            name="beats",
            clock=clock,
            on_crash=lambda name, error: crashes.append((name, str(error))),
            first_delay_s=0.5,
            max_delay_s=3.0,
        ),
        name="beats",
    )
    for pause_s in (0.5, 1.0, 2.0, 3.0, 3.0):
        await clock.until_sleeping()
        clock.advance(pause_s)
    await clock.until_sleeping()
    await tasks.close()
    assert starts == [0.0, 0.5, 1.5, 3.5, 6.5, 9.5]
    assert crashes == [("beats", "no network")] * 6
    assert [record.exc_info is not None for record in caplog.records] == [True] + [False] * 5
    assert "beats failed and starts again in 0.5 s: OSError('no network')" in caplog.text


async def test_a_long_good_run_earns_the_short_pause_and_a_traceback_again(caplog):
    clock = ManualClock(now_s=0.0)
    lasts_s = iter([0.0, 0.0, 60.0, 0.0])

    async def crashing() -> None:
        if seconds := next(lasts_s):
            await clock.sleep(seconds)
        raise OSError("no network")

    tasks = Tasks("test")
    tasks.spawn(supervise(crashing, name="beats", clock=clock), name="beats")
    for pause_s in (0.5, 1.0, 60.0, 0.5):
        await clock.until_sleeping()
        clock.advance(pause_s)
    await clock.until_sleeping()
    await tasks.close()
    pauses = [record.getMessage().split(" again in ")[1].split(" s")[0] for record in caplog.records]
    assert pauses == ["0.5", "1.0", "0.5", "1.0"]
    assert [record.exc_info is not None for record in caplog.records] == [True, False, True, False]


async def test_a_loop_that_returns_is_started_again_too(caplog):
    clock = ManualClock()
    starts: list[float] = []

    async def returns() -> None:
        starts.append(clock.now_s())

    tasks = Tasks("test")
    tasks.spawn(supervise(returns, name="sweep", clock=clock), name="sweep")
    await clock.until_sleeping()
    clock.advance(0.5)
    await clock.until_sleeping()
    await tasks.close()
    assert starts == [1000.0, 1000.5]
    assert "sweep ended by itself" in caplog.text


async def test_cancelling_a_supervised_loop_ends_it_wherever_it_is():
    clock = ManualClock()
    running = asyncio.Event()

    async def runs() -> None:
        running.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(supervise(runs, name="x", clock=clock))
    await running.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
