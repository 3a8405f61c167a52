"""The waiting room: late binding, held and waiting, and that nobody who leaves keeps a slot or a claim."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from herd.proxy.slots import Granted
from herd.scheduling.plan import History, Reject
from herd_node.protocol.routes import FORWARDED_BY_PATH
from tests.fleet.build import KEY, backend, beat, join, model
from tests.proxy.room_kit import House, request

Build = Callable[..., House]


@pytest.fixture
async def house() -> AsyncIterator[Build]:
    made: list[House] = []

    def build(*models: object, **more: object) -> House:
        one = House(**more)  # type: ignore[arg-type]
        if models:
            join(one.registry, beat("attic", *models), one.now_s)  # type: ignore[arg-type]
            one.registry.drain_events()
        made.append(one)
        return one

    yield build
    for one in made:
        await one.close()


def granted(task: asyncio.Task[Granted | Reject]) -> Granted:
    assert task.done()
    result = task.result()
    assert isinstance(result, Granted)
    return result


def rejected(task: asyncio.Task[Granted | Reject]) -> Reject:
    assert task.done()
    result = task.result()
    assert isinstance(result, Reject)
    return result


async def test_a_free_slot_is_granted_at_once(house: Build):
    one = house(model(slots=2))
    first, second = one.ask("1"), one.ask("2")
    await one.settle()
    for task in (first, second):
        got = granted(task)
        assert (got.step.node_id, got.step.instance_key, got.backend_kind, got.cold) == (
            "attic",
            KEY,
            "ollama",
            False,
        )
    assert (len(one.room), one.in_flight()) == (0, 2)


async def test_a_request_waits_and_is_sent_when_a_slot_is_freed(house: Build):
    one = house(model(slots=1))
    first, second = one.ask("1"), one.ask("2")
    await one.settle()
    assert not second.done()
    assert (len(one.room), one.room.claims_on("attic"), one.waiting_in_registry()) == (1, 1, {"llama3:8b": 1})
    await one.pass_time(7)
    assert one.room.queues()["llama3:8b"] == (1, 7.0)
    await one.end(granted(first))
    got = granted(second)
    assert got.history.waited_s == 7.0
    assert (len(one.room), one.room.claims_on("attic"), one.room.queues(), one.in_flight()) == (0, 0, {}, 1)
    assert one.waiting_in_registry() == {}


async def test_a_slot_is_given_once(house: Build):
    one = house(model(slots=1))
    first = one.ask("1")
    await one.settle()
    others = [one.ask(str(n)) for n in range(2, 7)]
    await one.settle()
    assert [task.done() for task in others] == [False] * 5
    running = granted(first)
    for number in range(5):
        await one.end(running)
        done = [task for task in others if task.done()]
        assert len(done) == number + 1
        assert one.in_flight() == 1
        running = granted(done[-1])


async def test_nobody_overtakes_the_one_that_waits_for_the_freed_slot(house: Build):
    one = house(model(slots=1))
    first, second = one.ask("1"), one.ask("2")
    await one.settle()
    one.registry.end_attempt(granted(first).token, one.now_s, _ok())
    third = one.ask("3")  # comes before anybody was planned again
    await asyncio.sleep(0)
    one.room.wake()
    await one.settle()
    assert (second.done(), third.done()) == (True, False)


def _ok() -> object:
    from herd.fleet.registry import AttemptResult

    return AttemptResult(ok=True, total_s=1.0)


async def test_a_request_is_sent_where_a_new_node_appears(house: Build):
    one = house(model(slots=1))
    one.ask("1")
    second = one.ask("2")
    await one.settle()
    other = beat("cellar", model(slots=1), boot="c" * 16)
    join(one.registry, other, one.now_s)
    one.room.wake()
    await one.settle()
    assert granted(second).step.node_id == "cellar"


async def test_without_a_node_a_request_is_held_and_then_refused(house: Build):
    one = house()
    task = one.ask("1")
    await one.settle()
    assert not task.done()
    assert (one.room.claims_on("attic"), one.room.queues()["llama3:8b"].waiting) == (0, 1)
    await one.pass_time(29.9)
    assert not task.done()
    await one.pass_time(0.2)
    reject = rejected(task)
    assert reject.status == 503
    assert reject.retry_after_s is not None
    assert "no node is online" in reject.message
    assert len(one.room) == 0


async def test_a_held_request_is_sent_when_a_node_comes(house: Build):
    one = house()
    task = one.ask("1")
    await one.pass_time(12)
    join(one.registry, beat("attic", model()), one.now_s)
    one.room.wake()
    await one.settle()
    got = granted(task)
    assert (got.history.held_s, got.history.waited_s) == (12.0, 0.0)


async def test_a_waiting_request_is_refused_when_its_time_is_up(house: Build):
    one = house(model(slots=1))
    one.ask("1")
    task = one.ask("2")
    await one.settle()
    for _ in range(299):
        await one.pass_time(1)
    assert not task.done()
    await one.pass_time(1.5)
    reject = rejected(task)
    assert (reject.status, "busy" in reject.message) == (503, True)
    assert (len(one.room), one.room.claims_on("attic")) == (0, 0)


async def test_the_settings_decide_how_long(house: Build):
    one = house(hold_timeout_s=3)
    task = one.ask("1")
    await one.pass_time(2.9)
    assert not task.done()
    await one.pass_time(0.2)
    assert rejected(task).status == 503


async def test_time_that_was_spent_before_counts(house: Build):
    """R-5: an attempt that failed does not give the request its budgets back."""
    one = house()
    task = one.ask("1", history=History(held_s=28.0))
    await one.pass_time(2.5)
    assert rejected(task).status == 503
    one = house(model(slots=1))
    one.ask("1")
    await one.settle()
    task = one.ask("2", history=History(waited_s=299.0))
    await one.pass_time(1.5)
    assert rejected(task).status == 503


async def test_an_unknown_model_is_refused_at_once(house: Build):
    one = house(model())
    task = one.ask("1", "nowhere")
    await one.settle()
    assert (rejected(task).status, rejected(task).message) == (
        404,
        "model 'nowhere' not found: no node of the fleet has it",
    )


async def test_the_next_model_of_the_chain_is_taken(house: Build):
    one = house(model())
    task = one.ask("1", "nowhere", "llama3:8b")
    await one.settle()
    assert (granted(task).step.model, granted(task).step.model_index) == ("llama3:8b", 1)


@pytest.mark.parametrize(("kind", "prompts"), [("ollama", "templated"), ("llama-server", "raw")])
async def test_the_first_attempt_of_a_text_completion_binds_the_later_ones(
    house: Build, kind: str, prompts: str
):
    one = house()
    join(one.registry, beat("attic", model(), backends=(backend(kind=kind),)), one.now_s)
    one.registry.drain_events()
    asked = request("1")._replace(route=FORWARDED_BY_PATH["/v1/completions"])
    got = await one.room.acquire(asked, History())
    assert isinstance(got, Granted)
    assert got.history.prompts == prompts
    other = History(prompts="raw" if prompts == "templated" else "templated", attempts=1)
    assert isinstance(await one.room.acquire(asked._replace(request_id="2"), other), Reject)
    chat = await one.room.acquire(request("3"), History())
    assert isinstance(chat, Granted)
    assert chat.history.prompts is None


async def test_one_more_than_may_wait_is_refused_at_once(house: Build):
    one = house(model(slots=1), max_waiting=2)
    waiting = [one.ask(str(n)) for n in range(3)]
    one_more = one.ask("x")
    await one.settle()
    assert [task.done() for task in waiting] == [True, False, False]
    assert (rejected(one_more).status, len(one.room)) == (503, 2)
    await one.end(granted(waiting[0]))
    again = one.ask("y")
    await one.settle()
    assert not again.done()


async def test_none_may_wait(house: Build):
    one = house(model(slots=1), max_waiting=0)
    first, second = one.ask("1"), one.ask("2")
    await one.settle()
    assert granted(first)
    assert rejected(second).status == 503


async def test_who_leaves_while_waiting_leaves_nothing_behind(house: Build):
    one = house(model(slots=1))
    first, leaver, third = one.ask("1"), one.ask("2"), one.ask("3")
    await one.settle()
    assert one.room.claims_on("attic") == 2
    leaver.cancel()
    await one.settle()
    assert leaver.cancelled()
    assert (len(one.room), one.room.claims_on("attic"), one.waiting_in_registry()) == (1, 1, {"llama3:8b": 1})
    await one.end(granted(first))
    assert granted(third)
    await one.end(granted(third))
    assert one.in_flight() == 0


async def test_who_leaves_while_held_leaves_nothing_behind(house: Build):
    one = house()
    leaver = one.ask("1")
    await one.settle()
    leaver.cancel()
    await one.settle()
    assert (len(one.room), one.room.queues(), one.waiting_in_registry()) == (0, {}, {})


async def test_who_leaves_in_the_very_moment_of_the_grant_gives_the_slot_back(house: Build):
    one = house(model(slots=1))
    first, leaver = one.ask("1"), one.ask("2")
    await one.settle()
    one.registry.end_attempt(granted(first).token, one.now_s, _ok())  # type: ignore[arg-type]
    one.room.wake()
    await asyncio.sleep(0)  # the plan has run: the slot is reserved, the waiter has not gone on yet
    assert one.in_flight() == 1
    assert not leaver.done()
    leaver.cancel()
    await one.settle()
    assert leaver.cancelled()
    assert one.in_flight() == 0
    again = one.ask("3")
    await one.settle()
    assert granted(again)


async def test_a_slot_that_is_given_back_goes_to_the_next(house: Build):
    one = house(model(slots=1))
    first, leaver, third = one.ask("1"), one.ask("2"), one.ask("3")
    await one.settle()
    one.registry.end_attempt(granted(first).token, one.now_s, _ok())  # type: ignore[arg-type]
    one.room.wake()
    await asyncio.sleep(0)
    leaver.cancel()
    await one.settle()
    assert granted(third)
    assert one.in_flight() == 1


async def test_a_busy_mark_holds_and_its_end_sends(house: Build):
    one = house(model(slots=1))
    one.registry.mark_busy("attic", KEY, one.now_s + 2.0)
    task = one.ask("1")
    await one.settle()
    assert not task.done()
    assert one.room.claims_on("attic") == 0
    await one.pass_time(1.9)
    assert not task.done()
    await one.pass_time(0.2)
    assert granted(task)


async def test_while_somebody_waits_the_fleet_is_looked_at_again_without_an_event(house: Build):
    """Marks end by time: nobody wakes the room for that."""
    one = house(model(slots=1))
    one.registry.mark_busy("attic", KEY, one.now_s + 2.0)
    task = one.ask("1")
    await one.settle()
    one.clock.advance(3)
    async with asyncio.timeout(3):
        assert isinstance(await task, Granted)


async def test_a_node_that_is_lost_turns_waiting_into_holding(house: Build):
    one = house(model(slots=1))
    one.ask("1")
    task = one.ask("2")
    await one.pass_time(10)
    one.registry.on_connect_failed("attic", one.now_s, "refused")
    await one.pass_time(0)
    assert one.room.claims_on("attic") == 0
    await one.pass_time(29)
    assert not task.done()
    await one.pass_time(2)
    assert rejected(task).status == 503


async def test_a_cold_model_is_granted_once_and_said_to_be_cold(house: Build):
    one = house(model(state="cold", slots=None))
    first, second = one.ask("1"), one.ask("2")
    await one.settle()
    assert granted(first).cold
    assert not second.done()  # one slot until it is loaded
    one.registry.first_record(granted(first).token, one.now_s)
    one.room.wake()
    await one.settle()
    assert one.in_flight() in (1, 2)


async def test_a_closed_room_refuses_everybody(house: Build):
    one = house(model(slots=1))
    running, waiting = one.ask("1"), one.ask("2")
    await one.settle()
    one.room.close("going home")
    await one.settle()
    late = one.ask("3")
    await one.settle()
    assert granted(running)
    assert [(rejected(task).status, rejected(task).message) for task in (waiting, late)] == [
        (503, "going home")
    ] * 2
    assert (len(one.room), one.room.claims_on("attic"), one.waiting_in_registry()) == (0, 0, {})


async def test_queues_are_counted_by_model(house: Build):
    one = house(model(slots=1), model("other:1b", weights="sha256-two", slots=1))
    for number in range(2):
        one.ask(f"a{number}")
        one.ask(f"b{number}", "other:1b")
    await one.settle()
    assert {name: row.waiting for name, row in one.room.queues().items()} == {"llama3:8b": 1, "other:1b": 1}
    assert one.room.claims_on("attic") == 2
    assert one.room.claims_on("elsewhere") == 0


async def test_a_backend_that_is_down_holds(house: Build):
    one = house()
    join(one.registry, beat("attic", model()), one.now_s)
    down = beat("attic", seq=2, backends=(backend(ready=False, reason="gone"),))
    one.registry.on_beat(down, "10.0.0.5", one.now_s)
    task = one.ask("1")
    await one.settle()
    assert not task.done()
    one.registry.on_beat(beat("attic", model(), seq=3), "10.0.0.5", one.now_s)
    one.room.wake()
    await one.settle()
    assert granted(task)


async def test_a_hundred_come_and_go_and_nothing_is_left(house: Build):
    one = house(model(slots=3))
    tasks = [one.ask(str(n)) for n in range(100)]
    await one.settle()
    for task in tasks[50::2]:
        task.cancel()
    seen = 0
    while running := [task for task in tasks if task.done() and not task.cancelled()]:
        assert one.in_flight() == min(3, len(running))
        for task in running[:3]:
            tasks.remove(task)
            seen += 1
            await one.end(granted(task))
        tasks = [task for task in tasks if not task.cancelled()]
    assert seen == 75
    assert (one.in_flight(), len(one.room), one.room.claims_on("attic")) == (0, 0, 0)
    assert request("x").chain == ("llama3:8b",)
