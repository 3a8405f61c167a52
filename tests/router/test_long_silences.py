"""R-1, the early commit: event streams that are silent for long begin before anybody serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.router.kit import LLAMA, OLLAMA, TEXT, Answer, Fleet, Question, until

QUESTION = Question("openai", OLLAMA, True)
ANTHROPIC = {
    "model": OLLAMA,
    "max_tokens": 9,
    "messages": [{"role": "user", "content": "hi"}],
    "stream": True,
}
ONLY_A = Question("openai", "only-a:1", True)


@pytest.fixture
def hasty(fleet: Fleet) -> Iterator[None]:
    """Silences of a fifth of a second are long."""
    with fleet.deadlines(early_sent_s=0.15, early_waiting_s=0.2, ping_s=0.05):
        yield


def parts(answer: Answer) -> list[bytes]:
    return [part for part in answer.body.split(b"\n\n") if part]


async def test_f16_a_slow_start_is_bridged_with_pings_and_says_then_what_served_it(fleet: Fleet, hasty: None):
    fleet.fail_all(QUESTION, "slow_tokens", delay_s=0.3)
    answer = await fleet.ask(QUESTION)
    assert (answer.status, answer.whole, answer.text, answer.ends) == (200, True, TEXT, 1)
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert "x-request-id" in answer.headers
    assert "x-fleet-node" not in answer.headers  # nobody served it when the head went out
    found = parts(answer)
    pings = [part for part in found if part == b": ping"]
    assert 1 <= len(pings) <= 30
    assert found[: len(pings)] == pings
    comment = found[len(pings)].decode()
    [row] = await fleet.check(answer)
    assert comment.startswith(f": x-fleet-node={row['node_id']} x-fleet-model={OLLAMA} x-fleet-score=")
    assert comment.endswith(" x-fleet-attempts=1")
    assert row["status"] == "completed"


async def test_a_stream_that_begins_in_time_says_all_in_its_head(fleet: Fleet, hasty: None):
    answer = await fleet.ask(QUESTION)
    assert (answer.status, answer.headers["x-fleet-attempts"]) == (200, "1")
    assert answer.headers["x-accel-buffering"] == "no"
    assert b": " not in answer.body.split(b"data:")[0]
    await fleet.check(answer)


async def test_anthropics_clients_get_ping_events(fleet: Fleet, hasty: None):
    for fake in fleet.fakes(OLLAMA):
        fake.fault("slow_tokens", path="/v1/messages", delay_s=0.3, count=None)
    answer = await fleet.request("/v1/messages", ANTHROPIC)
    found = parts(answer)
    assert found[0] == b'event: ping\ndata: {"type": "ping"}'
    assert found[-1].startswith(b"event: message_stop")
    assert b": x-fleet-node=" in answer.body
    await fleet.check(answer)


async def test_a_retry_after_pings_is_still_possible(fleet: Fleet, hasty: None):
    fleet.fail_first(QUESTION, "rst_before_headers", wait_s=0.35)
    answer = await fleet.ask(QUESTION)
    assert (answer.status, answer.text, answer.ends) == (200, TEXT, 1)
    rows = await fleet.check(answer)
    assert [row["status"] for row in rows] == ["retried", "completed"]
    assert parts(answer)[0] == b": ping"
    assert b" x-fleet-attempts=2\n" in answer.body


async def test_a_failure_after_pings_is_one_record_with_the_status_as_its_code(fleet: Fleet, hasty: None):
    fleet.fail_all(QUESTION, "status", status=400, body='{"error": {"message": "no"}}', wait_s=0.35)
    answer = await fleet.ask(QUESTION)
    assert (answer.status, answer.whole, answer.ends) == (200, True, 0)
    [error] = [record["error"] for record in answer.records if record != "[DONE]"]
    assert (error["code"], error["message"]) == (400, "no")
    rows = await fleet.check(answer)
    assert rows[-1]["status"] == "failed"


@pytest.mark.parametrize(
    "question", [Question("ollama", OLLAMA, True), Question("openai", OLLAMA, False)], ids=str
)
async def test_what_is_no_event_stream_never_begins_early(fleet: Fleet, hasty: None, question: Question):
    fleet.fail_all(question, "slow_tokens", delay_s=0.5)
    call = await fleet.begin(question.path, question.body)
    await asyncio.sleep(0.4)
    assert not call.reader._buffer  # type: ignore[attr-defined]
    answer = await call.head()
    assert (answer.status, "x-fleet-node" in answer.headers) == (200, True)
    await call.rest()
    await fleet.check(answer)


async def test_who_is_held_can_still_be_refused_with_a_status(fleet: Fleet, hasty: None):
    fleet.fail_all(QUESTION, "queue_full")
    answer = await fleet.ask(QUESTION)  # the hold of this fleet is 0.6 s
    assert answer.status == 503
    await fleet.check(answer)


async def test_who_waits_for_a_busy_node_gets_pings_and_then_the_answer(fleet: Fleet, hasty: None):
    fleet.fail_all(ONLY_A, "slow_tokens", delay_s=0.12)
    calls = [await fleet.begin(ONLY_A.path, ONLY_A.body) for _ in range(4)]
    await until(lambda: fleet.live() == 4, "all slots to be taken")
    answer = await fleet.ask(ONLY_A)
    assert (answer.status, answer.text, answer.ends) == (200, TEXT, 1)
    assert parts(answer)[0] == b": ping"
    for call in calls:
        await call.head()
        await call.rest()
        await fleet.check(call.answer)
    await fleet.check(answer)


async def test_a_wait_that_is_too_long_ends_in_an_error_record_once_it_has_begun(fleet: Fleet, hasty: None):
    fleet.fail_all(ONLY_A, "slow_tokens", delay_s=30)
    calls = [await fleet.begin(ONLY_A.path, ONLY_A.body) for _ in range(4)]
    await until(lambda: fleet.live() == 4, "all slots to be taken")
    answer = await fleet.ask(ONLY_A)  # the wait of this fleet is 2 s
    assert (answer.status, answer.ends) == (200, 0)
    [record] = answer.records[-1:]
    assert (record["error"]["code"], "stayed busy" in record["error"]["message"]) == (503, True)
    for call in calls:
        call.hang_up()
    for call in calls:
        await fleet.check(call.answer)
    await fleet.check(answer)


@pytest.mark.parametrize("model", [OLLAMA, LLAMA])
async def test_who_leaves_among_pings_frees_the_slot_within_a_second(fleet: Fleet, hasty: None, model: str):
    question = Question("openai", model, True)
    fleet.fail_all(question, "slow_tokens", delay_s=30)
    call = await fleet.begin(question.path, question.body)
    await call.head()
    assert await call.piece() == b": ping\n\n"
    call.hang_up()
    await until(lambda: not fleet.router.dispatcher.live, "the router to notice", patience_s=1.0)
    [row] = await fleet.check(call.answer)
    assert row["status"] == "client_gone"


async def test_the_end_of_the_router_is_said_in_the_stream(fleet: Fleet, hasty: None):
    fleet.fail_all(QUESTION, "slow_tokens", delay_s=30)
    call = await fleet.begin(QUESTION.path, QUESTION.body)
    await call.head()
    fleet.router.dispatcher.drain()
    answer: Any = await call.rest()
    assert answer.records[-1]["error"]["code"] == 503
    rows = await fleet.check(answer)
    assert rows[-1]["status"] == "failed"
