"""Backends that fail before the first word: another node answers, and if none does, the caller hears why.

The numbers are the faults of docs/behaviour.md. Everything runs through a real agent.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from tests.fakes.faults import Fault
from tests.router.kit import LLAMA, OLLAMA, QUESTIONS, STREAMS, TEXT, WHOLES, Answer, Fleet, Question, until


def one_of(*questions: Question) -> Any:
    return pytest.mark.parametrize("question", questions, ids=str)


async def served_by_another(fleet: Fleet, question: Question, answer: Answer) -> None:
    """200 and the whole text, from the second node that was asked."""
    assert (answer.status, answer.text, answer.whole, answer.errors) == (200, TEXT, True, []), answer
    assert answer.headers["x-fleet-attempts"] == "2"
    first, second = await fleet.check(answer)
    assert (first["status"], second["status"]) == ("retried", "completed")
    assert first["node_id"] != second["node_id"] == answer.headers["x-fleet-node"]
    assert (first["error_message"], second["error_message"]) == (first["error_message"] or "a reason", None)
    assert second["retry_count"] == 1


async def refused(fleet: Fleet, answer: Answer, status: int) -> list[dict[str, Any]]:
    """One error with its real status, in the caller's dialect, with every header that it must have."""
    assert (answer.status, answer.whole) == (status, True), answer
    assert answer.headers["content-type"].startswith("application/json")
    assert len(answer.headers["x-request-id"]) == 24
    assert answer.error
    assert "127.0.0.1" not in answer.error
    assert "://" not in answer.error
    rows = await fleet.check(answer)
    assert rows[-1]["request_id"] == answer.headers["x-request-id"]
    assert len([row for row in rows if row["node_id"]]) == int(answer.headers["x-fleet-attempts"])
    if status in (429, 503):
        assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert (answer.headers.get("x-should-retry") == "false") is (status in (400, 404))
    return rows


def shape_of(question: Question, answer: Answer, kind: str, code: str | None) -> None:
    if question.dialect == "ollama":
        assert answer.json() == {"error": answer.error}
    else:
        error = {"message": answer.error, "type": kind, "param": None, "code": code}
        assert answer.json() == {"error": error}


@one_of(*QUESTIONS)
@pytest.mark.parametrize(
    "fault",
    [
        *({"kind": "status", "status": status} for status in (500, 504)),
        {"kind": "status", "status": 401},
        {"kind": "status", "status": 403},
        {"kind": "queue_full"},
        {"kind": "model_missing"},
        {"kind": "status", "status": 429, "headers": (("Retry-After", "1"),)},
        {"kind": "rst_before_headers"},
        {"kind": "close_before_headers"},
        {"kind": "garbage_head"},
        {"kind": "header_bomb"},
        {"kind": "cl_and_te"},
    ],
    ids=lambda fault: fault["kind"] + str(fault.get("status", "")),
)
async def test_f04_f06_f07_f11_f14_another_node_answers(
    fleet: Fleet, question: Question, fault: dict[str, Any]
):
    if fault["kind"] == "model_missing" and question.model == LLAMA:
        fault = {"kind": "status", "status": 404}
    fleet.fail_first(question, **fault)
    answer = await fleet.ask(question)
    await served_by_another(fleet, question, answer)
    resent = fault["kind"] in (
        "rst_before_headers",
        "close_before_headers",
    )  # once more on a fresh connection
    assert fleet.requests(question) in ((2, 3) if resent else (2,))


@one_of(*QUESTIONS[::3], QUESTIONS[-1])
@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ({"kind": "status", "status": 500}, 502, "upstream_failed"),
        ({"kind": "status", "status": 504}, 504, "timeout"),
        ({"kind": "status", "status": 401}, 502, "upstream_failed"),
        ({"kind": "close_before_headers"}, 502, "upstream_failed"),
        ({"kind": "model_missing"}, 404, "model_not_found"),
    ],
    ids=lambda value: value["kind"] + str(value.get("status", "")) if isinstance(value, dict) else None,
)
async def test_when_all_fail_the_caller_hears_why(
    fleet: Fleet, question: Question, fault: dict[str, Any], status: int, code: str
):
    if fault["kind"] == "model_missing" and question.model == LLAMA:
        fault = {"kind": "status", "status": 404}
    fleet.fail_all(question, **fault)
    answer = await fleet.ask(question)
    rows = await refused(fleet, answer, status)
    assert [row["status"] for row in rows] == ["retried", "failed"]
    shape_of(question, answer, "invalid_request_error" if status == 404 else "server_error", code)
    if status == 404:
        assert answer.error == f"model '{question.model}' not found"


@one_of(*QUESTIONS[::3])
async def test_f08_when_all_are_busy_the_request_is_held_and_then_refused(fleet: Fleet, question: Question):
    fleet.fail_all(question, "queue_full")
    answer = await fleet.ask(question)
    rows = await refused(fleet, answer, 503)
    assert [row["status"] for row in rows] == ["retried", "failed"]
    assert fleet.requests(question) == 2
    shape_of(question, answer, "server_error", "overloaded")


@one_of(QUESTIONS[0], QUESTIONS[-1])
async def test_when_all_are_limited_the_caller_hears_that(fleet: Fleet, question: Question):
    body = orjson.dumps({"error": "slow down"}).decode()
    fleet.fail_all(question, "status", status=429, headers=(("Retry-After", "2"),), body=body)
    answer = await fleet.ask(question)
    await refused(fleet, answer, 429)
    assert answer.error == "slow down"
    shape_of(question, answer, "rate_limit_error", None)


@one_of(QUESTIONS[0])
async def test_a_busy_fleet_is_asked_again_when_its_mark_ends_and_the_hold_is_the_requests(
    fleet: Fleet, question: Question
):
    """R-5: two marks of two seconds do not make one hold of two times one second."""
    fleet.router.room._policy, before = (  # the planner's own value, for one test
        type(fleet.router.room._policy)(hold_timeout_s=3.0),
        fleet.router.room._policy,
    )
    try:
        fleet.fail_all(question, "queue_full")
        began_s = asyncio.get_running_loop().time()
        answer = await fleet.ask(question)
        took_s = asyncio.get_running_loop().time() - began_s
    finally:
        fleet.router.room._policy = before
    rows = await refused(fleet, answer, 503)
    assert 3.0 <= took_s < 4.5
    assert len(rows) == 4


@one_of(*QUESTIONS)
async def test_f12_the_callers_own_mistake_is_passed_on_and_not_tried_again(fleet: Fleet, question: Question):
    for status in (400, 422, 413):
        before = fleet.requests(question)
        said = {"message": "'hi' is wrong"} if question.model == LLAMA else "'hi' is wrong"
        body = orjson.dumps({"error": said})
        fleet.fail_all(question, "status", status=status, body=body.decode(), count=1)
        answer = await fleet.ask(question)
        [row] = await refused(fleet, answer, status)
        # the backend's sentence may quote the prompt, so it is in no row
        kept = f"the backend refused the request with status {status}"
        assert (row["status"], row["error_message"]) == ("failed", kept)
        assert answer.error == "'hi' is wrong"
        if question.dialect == ("openai" if question.model == LLAMA else "ollama"):
            assert answer.body == body  # the backend speaks the caller's dialect: as it came
        else:
            shape_of(question, answer, "invalid_request_error", None)
        assert fleet.requests(question) == before + 1
        for fake in fleet.fakes(question.model):
            fake.faults.clear()


@one_of(*QUESTIONS)
@pytest.mark.parametrize("status", [301, 302, 307])
async def test_f13_a_redirect_is_neither_followed_nor_tried_elsewhere(
    fleet: Fleet, question: Question, status: int
):
    connections = 0

    def accepted(_reader: object, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.close()

    async with await asyncio.start_server(accepted, "127.0.0.1", 0) as server:
        location = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        fleet.fail_all(question, "status", status=status, headers=(("Location", location),))
        answer = await fleet.ask(question)
        await refused(fleet, answer, 502)
        assert (connections, fleet.requests(question)) == (0, 1)
        assert "location" not in answer.headers


@one_of(*STREAMS)
async def test_f15_an_error_as_the_first_record_is_no_answer(fleet: Fleet, question: Question):
    fleet.fail_first(question, "error_after_n", after=0)
    await served_by_another(fleet, question, await fleet.ask(question))
    await fleet.reset()
    fleet.fail_all(question, "error_after_n", after=0)
    answer = await fleet.ask(question)
    await refused(fleet, answer, 502)
    if (question.model, question.dialect) != (OLLAMA, "openai"):  # there Ollama itself loses the cause
        assert "injected error" in answer.error
    assert fleet.requests(question) == 2


@one_of(*STREAMS)
@pytest.mark.parametrize(
    "kind", ["clean_eof_after_n", "fin_after_n", "rst_after_n", "malformed_at", "bad_chunk_size"]
)
async def test_an_answer_that_ends_before_its_first_word_is_no_answer(
    fleet: Fleet, question: Question, kind: str
):
    fleet.fail_first(question, kind, after=0, delay_s=0.0)
    await served_by_another(fleet, question, await fleet.ask(question))
    assert fleet.requests(question) == 2


@one_of(STREAMS[1], STREAMS[2])
@pytest.mark.parametrize("kind", ["hang_before_headers", "stall_after_n"])
async def test_f03_silence_ends_at_the_first_record_deadline(fleet: Fleet, question: Question, kind: str):
    fleet.fail_first(question, kind, after=0)
    with fleet.deadlines(first_record_s=0.2):
        answer = await fleet.ask(question)
    await served_by_another(fleet, question, answer)
    await fleet.reset()
    fleet.fail_all(question, kind, after=0)
    with fleet.deadlines(first_record_s=0.2):
        answer = await fleet.ask(question)
    await refused(fleet, answer, 504)
    assert "sent nothing for 0.2 s" in answer.error
    shape_of(question, answer, "server_error", "timeout")
    assert fleet.requests(question) == 2


@one_of(STREAMS[0], STREAMS[3])
async def test_f03_the_attempt_that_was_given_up_is_closed_before_the_next_begins(
    fleet: Fleet, question: Question
):
    fleet.fail_first(question, "stall_after_n", after=0)
    with fleet.deadlines(first_record_s=0.2):
        await served_by_another(fleet, question, await fleet.ask(question))
    assert sum(fake.counters.aborted for fake in fleet.fakes(question.model)) == 1


@one_of(WHOLES[0], WHOLES[-1])
@pytest.mark.parametrize("kind", ["hang_before_headers", "stall_after_n"])
async def test_f03_without_streaming_only_the_total_deadline_ends_silence(
    fleet: Fleet, question: Question, kind: str
):
    fleet.fail_all(question, kind, after=0)
    with fleet.deadlines(first_record_s=0.1, total_s=0.5):
        answer = await fleet.ask(question)
    [row] = await refused(fleet, answer, 504)
    assert (row["status"], "longer than" in answer.error) == ("failed", True)
    assert fleet.requests(question) == 1


async def test_f05_a_kept_connection_that_was_closed_costs_no_attempt(fleet: Fleet):
    for question in WHOLES[:1] + WHOLES[2:3]:  # Ollama keeps its connections
        for _ in range(4):  # both nodes have one
            assert (await fleet.ask(question)).status == 200
        fakes = fleet.fakes(question.model)
        race = Fault("keepalive_race", path=question.backend_path)
        for fake in fakes:
            fake.faults.append(race)
        before = [fake.counters.requests for fake in fakes]
        answer = await fleet.ask(question)
        assert (answer.status, answer.text, answer.headers["x-fleet-attempts"]) == (200, TEXT, "1")
        [row] = await fleet.check(answer)
        assert row["status"] == "completed"
        after = [fake.counters.requests for fake in fakes]
        # twice to the same node, and the other one was not asked
        assert sorted(now - then for now, then in zip(after, before, strict=True)) == [0, 2]


@one_of(*QUESTIONS[1::3])
async def test_f01_a_backend_that_refuses_connections_costs_nobody_an_answer(
    fleet: Fleet, question: Question
):
    down = fleet.fakes(question.model)[0]
    await down.refuse()
    down.cut_all()
    answers = [await fleet.ask(question) for _ in range(3)]
    assert [(answer.status, answer.text) for answer in answers] == [(200, TEXT)] * 3
    for answer in answers:
        rows = await fleet.check(answer)
        assert rows[-1]["status"] == "completed"

    # the beat says it: nobody is sent there any more
    def is_down() -> bool:
        node = fleet.router.registry.snapshot(fleet.router.clock.now_s()).nodes["a"]
        return not all(node.backends_ready.values())

    await until(is_down, "the beat that says so", patience_s=3)
    answer = await fleet.ask(question)
    assert (answer.headers["x-fleet-node"], answer.headers["x-fleet-attempts"]) == ("b", "1")


@one_of(QUESTIONS[0], QUESTIONS[-1])
async def test_f01_when_every_backend_refuses_the_request_is_held_then_refused(
    fleet: Fleet, question: Question
):
    for fake in fleet.fakes(question.model):
        await fake.refuse()
        fake.cut_all()
    answer = await fleet.ask(question)
    await refused(fleet, answer, 503)
    shape_of(question, answer, "server_error", "overloaded")


async def test_f01_a_held_request_is_answered_when_a_backend_comes_back(fleet: Fleet):
    question = QUESTIONS[0]
    for fake in fleet.fakes(question.model):
        await fake.refuse()
        fake.cut_all()
    fleet.router.room._policy, before = (
        type(fleet.router.room._policy)(hold_timeout_s=15.0),
        fleet.router.room._policy,
    )
    try:
        asking = asyncio.ensure_future(fleet.ask(question))
        await until(lambda: len(fleet.router.room) == 1, "the request to be held")
        assert (await fleet.status())["fleet"]["requests_waiting"] == 1
        await fleet.fakes(question.model)[1].listen()
        answer = await asking
    finally:
        fleet.router.room._policy = before
    assert (answer.status, answer.text, answer.headers["x-fleet-node"]) == (200, TEXT, "b")
    await fleet.check(answer)


@one_of(*QUESTIONS)
async def test_f17_an_empty_answer_is_an_answer(fleet: Fleet, question: Question):
    fleet.fail_all(question, "empty_done")
    answer = await fleet.ask(question)
    assert (answer.status, answer.text, answer.whole, answer.errors) == (200, "", True, [])
    assert answer.headers["x-fleet-attempts"] == "1"
    [row] = await fleet.check(answer)
    told = question.model == LLAMA or question.dialect == "ollama" or not question.stream
    assert row["status"] == ("no_output" if told else "completed")  # Ollama's /v1 streams carry no counts


@one_of(*[question for question in STREAMS if question.model == OLLAMA])
async def test_f16_a_cold_model_may_take_longer_than_a_hot_one(fleet: Fleet, question: Question):
    cold = Question(question.dialect, "only-a:1", question.stream)
    fake = fleet.ollama["a"]
    await fake.control({"models": [{"name": "only-a:1", "loaded": False}], "load_s": 0.8})
    await until(lambda: not is_hot(fleet, "only-a:1"), "the beat that says it is cold")
    with fleet.deadlines(first_record_s=0.2, cold_load_s=10):
        asking = asyncio.ensure_future(fleet.ask(cold))
        await until(lambda: len(fleet.router.dispatcher.live) == 1, "the cold one to be sent")
        hot = await fleet.ask(question)  # is not disturbed
        answer = await asking
    assert (hot.status, hot.text) == (200, TEXT)
    assert (answer.status, answer.text, answer.headers["x-fleet-attempts"]) == (200, TEXT, "1")
    await fleet.check(hot)
    await fleet.check(answer)
    assert (fake.counters.loads, is_hot(fleet, "only-a:1")) == (1, True)
    await fake.control({"load_s": 0.0})


@one_of(STREAMS[0])
async def test_f16_a_cold_load_ends_at_its_own_deadline(fleet: Fleet, question: Question):
    cold = Question(question.dialect, "only-a:1", True)
    fake = fleet.ollama["a"]
    await fake.control({"models": [{"name": "only-a:1", "loaded": False}], "load_s": 2.0})
    await until(lambda: not is_hot(fleet, "only-a:1"), "the beat that says it is cold")
    with fleet.deadlines(cold_load_s=0.4):
        answer = await fleet.ask(cold)
    await fake.control({"load_s": 0.0})
    assert (answer.status, "sent nothing for 0.4 s" in answer.error) == (504, True)
    await until(lambda: fleet.live() == 0, "the load to end")


def is_hot(fleet: Fleet, model: str) -> bool:
    holders = fleet.router.registry.snapshot(fleet.router.clock.now_s()).holders.get(model, ())
    return any(instance.state == "hot" for _, instance in holders)


@one_of(*[question for question in QUESTIONS if question.model == OLLAMA])
async def test_f41_a_model_that_was_deleted_is_looked_for_elsewhere(fleet: Fleet, question: Question):
    """The router hears of it only with the next beat."""
    fakes = fleet.fakes(question.model)
    gone = [fake.dialect.models.pop(0) for fake in fakes[:1]]
    try:
        answers = [await fleet.ask(question) for _ in range(2)]
        for answer in answers:
            assert (answer.status, answer.text) == (200, TEXT)
            rows = await fleet.check(answer)
            assert [row["status"] for row in rows][-1] == "completed"
        assert {answer.headers["x-fleet-node"] for answer in answers} == {"b"}
    finally:
        fakes[0].dialect.models[:0] = gone


async def test_a_fallback_model_is_tried_with_its_own_name(fleet: Fleet):
    question = Question("openai", "only-a:1", True)
    fleet.fail_all(question, "status", status=500)
    answer = await fleet.ask(question, fallback_models=["nowhere:1", LLAMA])
    assert (answer.status, answer.text, answer.headers["x-fleet-attempts"]) == (200, TEXT, "2")
    assert (answer.headers["x-fleet-fallback"], answer.headers["x-fleet-model"]) == ("only-a:1", LLAMA)
    asked = [
        orjson.loads(fake.counters.last[-1]["body"]) for fake in fleet.llama.values() if fake.counters.last
    ]
    assert [(body["model"], body["fallback_models"]) for body in asked] == [(LLAMA, ["nowhere:1", LLAMA])]
    first, second = await fleet.check(answer)
    assert (first["model"], second["model"]) == ("only-a:1", LLAMA)
    assert (first["fallback_used"], second["fallback_used"], second["original_model"]) == (
        False,
        True,
        "only-a:1",
    )


async def test_a_node_that_fails_for_one_reason_and_another_that_lacks_the_model_is_no_404(fleet: Fleet):
    question = STREAMS[0]
    fakes = fleet.fakes(question.model)
    for broken, lacking in (fakes, fakes[::-1]):
        broken.fault("status", status=500, count=None, path=question.backend_path)
        lacking.fault("model_missing", count=None, path=question.backend_path)
        answer = await fleet.ask(question)
        await refused(fleet, answer, 502)
        await fleet.reset()


async def test_a_call_that_takes_no_slot_asks_each_node_once(fleet: Fleet):
    """No mark holds it back, so nothing else would stop it."""
    shown = await fleet.request("/api/show", {"model": OLLAMA})
    assert (shown.status, "x-fleet-score" in shown.headers) == (200, False)
    for fake in fleet.ollama.values():
        await fake.refuse()
        fake.cut_all()
    answer = await fleet.request("/api/show", {"model": OLLAMA})
    assert (answer.status, int(answer.headers["x-fleet-attempts"]) <= 2) == (503, True), answer
    rows = await fleet.check(answer)
    assert len(rows) <= 2
