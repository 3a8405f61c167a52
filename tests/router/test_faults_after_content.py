"""Backends that fail in the middle: no second try, no splice, one error record, and nothing left running."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any

import orjson
import pytest

from tests.fakes.faults import Fault
from tests.router.kit import LLAMA, OLLAMA, QUESTIONS, STREAMS, TEXT, WHOLES, Answer, Fleet, Question, until
from tests.router.test_faults_before_content import one_of, refused, served_by_another, shape_of

BEGINNING = "t0000 t0001 "


async def broke_off(fleet: Fleet, question: Question, answer: Answer, *, text: str = BEGINNING) -> str:
    """What came, exactly one error record as the last one, a proper end of the body, no end mark."""
    assert (answer.status, answer.text, answer.whole) == (200, text, True), answer
    assert (answer.ends, len(answer.errors)) == (0, 1), answer.body
    last = answer.records[-1]
    if question.dialect == "ollama":
        assert last == {"error": answer.errors[0]}
        assert answer.body.endswith(b"\n")
    else:
        assert list(last["error"]) == ["message", "type", "param", "code"]
        assert answer.body.endswith(b"\n\n")
    assert "127.0.0.1" not in answer.errors[0]
    [row] = await fleet.check(answer)
    assert (row["status"], row["node_id"]) == ("failed", answer.headers["x-fleet-node"])
    assert row["error_message"]
    assert row["time_to_first_token_ms"] is not None
    assert fleet.requests(question) == 1
    return answer.errors[0]


@one_of(*STREAMS)
@pytest.mark.parametrize("kind", ["rst_after_n", "fin_after_n", "bad_chunk_size"])
async def test_f18_f23_a_stream_that_is_cut_ends_with_one_error_record(
    fleet: Fleet, question: Question, kind: str
):
    fleet.fail_all(question, kind, after=2)
    sentence = await broke_off(fleet, question, await fleet.ask(question))
    assert "broke off in the middle" in sentence


@one_of(*STREAMS)
async def test_f19_a_stream_without_its_end_mark_is_not_complete(fleet: Fleet, question: Question):
    fleet.fail_all(question, "clean_eof_after_n", after=2)
    answer = await fleet.ask(question)
    if question.model == LLAMA:
        await broke_off(fleet, question, answer)
        return
    # Ollama stops so on a repeated token: it would do it again, and the answer is ended as a client expects
    assert (answer.status, answer.text, answer.whole, answer.errors, answer.ends) == (
        200,
        BEGINNING,
        True,
        [],
        1,
    )
    [row] = await fleet.check(answer)
    assert (row["status"], row["finish_reason"]) == ("completed", "repeat_abort")
    if question.dialect == "ollama":
        assert answer.records[-1]["done_reason"] == "stop"
    else:
        assert answer.records[-2]["choices"][0]["finish_reason"] == "stop"


@one_of(*[question for question in WHOLES if (question.model, question.dialect) == (OLLAMA, "ollama")])
async def test_f19_a_whole_answer_that_ollama_stopped_is_ended_too(fleet: Fleet, question: Question):
    said = {
        "model": question.model,
        "message": {"role": "assistant", "content": '"done":false'},
        "done": False,
    }
    headers = (("Content-Type", "application/json; charset=utf-8"),)
    fleet.fail_all(question, "status", status=200, body=json.dumps(said), headers=headers)
    answer = await fleet.ask(question)
    assert (answer.status, answer.json()) == (200, {**said, "done": True, "done_reason": "stop"})
    [row] = await fleet.check(answer)
    assert (row["status"], row["finish_reason"]) == ("completed", "repeat_abort")


@one_of(*STREAMS)
async def test_f20_a_stream_that_stalls_ends_at_the_gap_deadline(fleet: Fleet, question: Question):
    fleet.fail_all(question, "stall_after_n", after=2)
    with fleet.deadlines(gap_s=0.3):
        answer = await fleet.ask(question)
    assert "fell silent" in await broke_off(fleet, question, answer)


@one_of(STREAMS[0])
async def test_f20_tools_and_structured_output_may_be_silent_for_longer(fleet: Fleet, question: Question):
    fleet.fail_all(question, "slow_tokens", delay_s=0.3)
    await fleet.fakes(question.model)[0].control({"tokens": 3})
    await fleet.fakes(question.model)[1].control({"tokens": 3})
    with fleet.deadlines(gap_s=0.1, gap_buffered_s=5):
        answer = await fleet.ask(question, response_format={"type": "text"})
        assert (answer.text, answer.ends) == ("t0000 t0001 t0002 ", 1)
        plain = await fleet.ask(question)
        assert (plain.text, plain.ends, len(plain.errors)) == ("t0000 ", 0, 1)


@one_of(*STREAMS)
async def test_f21_an_error_in_the_stream_is_told_with_its_cause(fleet: Fleet, question: Question):
    fleet.fail_all(question, "error_after_n", after=2)
    sentence = await broke_off(fleet, question, await fleet.ask(question))
    if (question.model, question.dialect) != (OLLAMA, "openai"):  # there Ollama itself loses the cause
        assert "injected error" in sentence


@one_of(*STREAMS)
async def test_f22_a_record_that_cannot_be_read_is_not_skipped(fleet: Fleet, question: Question):
    fleet.fail_all(question, "malformed_at", after=2)
    await broke_off(fleet, question, await fleet.ask(question))


@one_of(*WHOLES)
@pytest.mark.parametrize(
    "kind", ["rst_after_n", "fin_after_n", "bad_chunk_size", "malformed_at", "error_after_n"]
)
async def test_f18_a_whole_answer_that_broke_off_is_tried_elsewhere(
    fleet: Fleet, question: Question, kind: str
):
    fleet.fail_first(question, kind)
    await served_by_another(fleet, question, await fleet.ask(question))


@one_of(*WHOLES)
@pytest.mark.parametrize("kind", ["fin_after_n", "malformed_at", "error_after_n"])
async def test_f18_when_every_whole_answer_breaks_off_the_caller_gets_502_and_nothing_partial(
    fleet: Fleet, question: Question, kind: str
):
    fleet.fail_all(question, kind)
    answer = await fleet.ask(question)
    await refused(fleet, answer, 502)
    shape_of(question, answer, "server_error", "upstream_failed")
    assert b"t0000" not in answer.body


@one_of(*QUESTIONS)
@pytest.mark.parametrize("manner", ["byte_drip", "coalesce", "split_utf8"])
async def test_f24_the_text_is_exact_however_it_is_cut(fleet: Fleet, question: Question, manner: str):
    fleet.fail_all(question, manner)
    answer = await fleet.ask(question)
    text = TEXT
    if manner == "split_utf8" and (question.stream or question.model == LLAMA):
        text = TEXT.replace("t0", "ü0")
    assert (answer.status, answer.text, answer.whole, answer.errors) == (200, text, True, [])
    await fleet.check(answer)


@one_of(STREAMS[0], STREAMS[-1])
async def test_f25_slow_tokens_pass_as_they_come(fleet: Fleet, question: Question):
    fleet.fail_all(question, "slow_tokens", delay_s=0.1)
    for fake in fleet.fakes(question.model):
        await fake.control({"tokens": 4})
    with fleet.deadlines(gap_s=0.5):
        answer = await fleet.ask(question)
    assert (answer.text, answer.ends, answer.errors) == ("t0000 t0001 t0002 t0003 ", 1, [])
    came_s = [at_s for at_s, piece in answer.pieces if b"t000" in piece]
    assert len(came_s) == 4
    assert min(later - earlier for earlier, later in pairwise(came_s)) > 0.05


@one_of(*STREAMS)
async def test_f26_two_ends_are_one(fleet: Fleet, question: Question):
    fleet.fail_all(question, "duplicate_done")
    answer = await fleet.ask(question)
    assert (answer.text, answer.ends, answer.whole, answer.errors) == (TEXT, 1, True, [])
    [row] = await fleet.check(answer)
    assert row["status"] == "completed"


@one_of(*QUESTIONS)
async def test_f26_an_answer_without_usage_has_none_in_its_row(fleet: Fleet, question: Question):
    fleet.fail_all(question, "no_usage")
    answer = await fleet.ask(question)
    assert (answer.text, answer.errors) == (TEXT, [])
    [row] = await fleet.check(answer)
    assert row["status"] == "completed"
    assert (row["prompt_tokens"], row["completion_tokens"]) == (None, None)


@one_of(*QUESTIONS)
async def test_the_rows_have_what_the_backend_counted(fleet: Fleet, question: Question):
    body = {"stream_options": {"include_usage": True}} if question.dialect == "openai" else {}
    answer = await fleet.ask(question, **body)
    [row] = await fleet.check(answer)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (12, 8), answer.body
    assert (row["model"], row["original_format"], row["kind"]) == (question.model, question.dialect, "chat")
    assert row["latency_ms"] > 0
    assert (row["time_to_first_token_ms"] is not None) is question.stream


@one_of(STREAMS[0], STREAMS[-1])
async def test_f27_an_endless_answer_ends_at_the_total_deadline(fleet: Fleet, question: Question):
    for fake in fleet.fakes(question.model):
        await fake.control({"tokens": 100_000, "token_delay_s": 0.005})
    with fleet.deadlines(total_s=0.5):
        answer = await fleet.ask(question)
    assert answer.text.startswith(BEGINNING)
    sentence = await broke_off(fleet, question, answer, text=answer.text)
    assert "longer than" in sentence


@one_of(*STREAMS)
async def test_f28_a_stream_beside_one_that_fails_is_not_touched(fleet: Fleet, question: Question):
    for fake in fleet.fakes(question.model):
        await fake.control({"tokens": 30, "token_delay_s": 0.01})
    bad = Fault("rst_after_n", count=1, after=5, path=question.backend_path)
    for fake in fleet.fakes(question.model):
        fake.faults.append(bad)
    answers = await asyncio.gather(*(fleet.ask(question) for _ in range(4)))
    failed = [answer for answer in answers if answer.errors]
    assert len(failed) == 1
    for answer in answers:
        await fleet.check(answer)
        if answer is failed[0]:
            continue
        assert (answer.text, answer.ends) == ("".join(f"t{n:04d} " for n in range(30)), 1)
        came_s = [at_s for at_s, _ in answer.pieces]
        assert max(b - a for a, b in pairwise(came_s)) < 0.5


async def test_many_at_once_are_all_answered_and_never_more_than_the_slots_run(fleet: Fleet):
    for fake in fleet.all_fakes:
        await fake.control({"token_delay_s": 0.01})
    asked = [question for question in QUESTIONS for _ in range(6)]
    answers = await asyncio.gather(*(fleet.ask(question) for question in asked))
    assert [(answer.status, answer.text) for answer in answers] == [(200, TEXT)] * len(asked)
    for fake in fleet.all_fakes:
        assert fake.counters.max_live <= 4
    status = await fleet.status()
    assert status["fleet"]["requests_active"] == status["fleet"]["requests_waiting"] == 0
    await until(lambda: not fleet.router.dispatcher.live, "the dispatcher to be idle")


async def test_embeddings_and_show_are_served_and_retried(fleet: Fleet):
    cases: list[tuple[str, dict[str, Any]]] = [
        ("/api/embed", {"model": "embed:1", "input": ["a", "b"]}),
        ("/api/embeddings", {"model": "embed:1", "prompt": "a"}),
        ("/v1/embeddings", {"model": "embed:1", "input": "a"}),
        ("/v1/embeddings", {"model": LLAMA, "input": "a"}),
        ("/api/embed", {"model": LLAMA, "input": "a"}),
    ]
    for path, body in cases:
        answer = await fleet.request(path, body)
        assert answer.status == 200, (path, answer)
        [row] = await fleet.check(answer)
        assert (row["status"], row["kind"]) == ("completed", "embedding")
        await fleet.reset()
        question = Question("openai", body["model"], False)
        for fake in fleet.fakes(question.model):
            fake.fault("status", status=500, count=None)
        answer = await fleet.request(path, body)
        assert answer.status == 502, (path, answer)
        await fleet.check(answer)
        await fleet.reset()
    for model in (OLLAMA, LLAMA):
        shown = await fleet.request("/api/show", {"model": model})
        assert shown.status == 200
        assert "completion" in shown.json()["capabilities"]
        await fleet.check(shown)


async def test_completions_and_generate_are_served_from_both_kinds(fleet: Fleet):
    for path, model in [
        ("/v1/completions", OLLAMA),
        ("/v1/completions", LLAMA),
        ("/api/generate", OLLAMA),
        ("/api/generate", LLAMA),
    ]:
        for stream in (True, False):
            answer = await fleet.request(path, {"model": model, "prompt": "hi", "stream": stream})
            assert (answer.status, answer.text, answer.errors) == (200, TEXT, []), (path, model)
            await fleet.check(answer)


async def test_a_preload_is_answered_in_ollamas_words(fleet: Fleet):
    for model in (OLLAMA, LLAMA):
        answer = await fleet.request("/api/generate", {"model": model})
        assert (answer.status, answer.json()["done_reason"]) == (200, "load")
        [row] = await fleet.check(answer)
        assert row["status"] == "completed"
        assert orjson.loads(answer.body)["model"] == model
