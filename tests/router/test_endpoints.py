"""Anthropic's dialect, responses, what only some backends offer, and names that stand for others."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from herd.app import Router
from tests.fakes import endpoints
from tests.fakes.backend import FakeBackend
from tests.fakes.model import FakeModel
from tests.router.kit import (
    LLAMA,
    NAMED,
    OLLAMA,
    TEXT,
    Answer,
    Fleet,
    Question,
    running,
    settings,
    until,
)
from tests.router.test_faults_before_content import one_of, served_by_another

STREAMS = [question for question in NAMED if question.stream]
WHOLES = [question for question in NAMED if not question.stream]
MESSAGES = [question for question in NAMED if question.dialect == "anthropic"]


def kind_of(question: Question, answer: Answer) -> str:
    """The type of an error that is the whole answer, after a look at its shape."""
    body = answer.json()
    if question.dialect == "anthropic":
        assert list(body) == ["type", "error", "request_id"]
        assert (body["type"], body["request_id"]) == ("error", answer.headers["x-request-id"])
        assert list(body["error"]) == ["type", "message"]
    else:
        assert list(body["error"]) == ["message", "type", "param", "code"]
    assert "127.0.0.1" not in answer.error
    return str(body["error"]["type"])


# ---- what goes well


@one_of(*NAMED)
async def test_an_answer_comes_whole_in_its_dialect(fleet: Fleet, question: Question):
    answer = await fleet.ask(question)
    assert (answer.status, answer.text, answer.whole, answer.errors) == (200, TEXT, True, [])
    assert answer.ends == (1 if question.stream else 0)
    assert answer.headers["x-fleet-model"] == question.model
    [row] = await fleet.check(answer)
    assert (row["status"], row["node_id"]) == ("completed", answer.headers["x-fleet-node"])
    assert row["original_format"] == ("anthropic" if question.dialect == "anthropic" else "openai")
    assert row["prompt_tokens"] > 0
    assert row["completion_tokens"] == 8
    assert fleet.requests(question) == 1


@one_of(*MESSAGES)
async def test_body_and_versions_go_on_and_keys_do_not(fleet: Fleet, question: Question):
    body = question.body | {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}
    raw = json.dumps(body | {"unknown_field": [1.0, "ü"]}, indent=1).encode()
    sent = {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b", "x-api-key": "sk-secret"}
    answer = await fleet.request(question.path, raw, headers=sent)
    assert answer.status == 200
    fake = next(fake for fake in fleet.fakes(question.model) if fake.counters.last)
    seen = fake.counters.last[-1]
    assert seen["path"] == "/v1/messages"
    if question.stream or question.model == OLLAMA:  # a llama-server is always asked for a stream
        assert seen["body"].encode() == raw
    assert (seen["headers"]["anthropic-version"], seen["headers"]["anthropic-beta"]) == ("2023-06-01", "a,b")
    assert not {"x-api-key", "authorization"} & seen["headers"].keys()


@one_of(*NAMED)
async def test_a_fallback_is_used_here_too(fleet: Fleet, question: Question):
    body = question.body | {"model": "nowhere:1", "fallback_models": [question.model]}
    answer = await fleet.request(question.path, body)
    assert (answer.status, answer.text) == (200, TEXT)
    assert answer.headers["x-fleet-fallback"] == "nowhere:1"
    assert answer.headers["x-fleet-model"] == question.model


# ---- what fails


@one_of(*NAMED)
@pytest.mark.parametrize("kind", ["status", "rst_before_headers", "queue_full", "model_missing", "redirect"])
async def test_a_failure_before_content_goes_elsewhere(fleet: Fleet, question: Question, kind: str):
    fleet.fail_first(question, kind)
    answer = await fleet.ask(question)
    if kind == "redirect":
        assert (answer.status, kind_of(question, answer)) == (502, kind_of(question, answer))
        return
    await served_by_another(fleet, question, answer)


@one_of(*STREAMS)
@pytest.mark.parametrize(
    "kind",
    ["rst_after_n", "fin_after_n", "clean_eof_after_n", "error_after_n", "malformed_at", "bad_chunk_size"],
)
async def test_a_stream_that_breaks_ends_with_one_error_event_and_no_end_mark(
    fleet: Fleet, question: Question, kind: str
):
    fleet.fail_all(question, kind, after=2)
    answer = await fleet.ask(question)
    assert (answer.status, answer.text, answer.whole) == (200, "t0000 t0001 ", True)
    assert (answer.ends, len(answer.errors)) == (0, 1)
    last = answer.body.rstrip(b"\n").rpartition(b"\n\n")[2]
    assert last.startswith(b"event: error\ndata: {")
    assert answer.body.endswith(b"\n\n")
    assert answer.body.count(b"event: error") == 1
    if (kind, question.model) == ("error_after_n", LLAMA):
        assert "injected error" in answer.errors[0]
    [row] = await fleet.check(answer)
    assert row["status"] == "failed"
    assert fleet.requests(question) == 1


@one_of(*STREAMS)
async def test_a_stream_that_stalls_ends_at_the_gap_deadline(fleet: Fleet, question: Question):
    fleet.fail_all(question, "stall_after_n", after=2)
    with fleet.deadlines(gap_s=0.3):
        answer = await fleet.ask(question)
    assert (answer.text, answer.ends, len(answer.errors)) == ("t0000 t0001 ", 0, 1)
    assert "fell silent" in answer.errors[0]


@one_of(*WHOLES)
@pytest.mark.parametrize("kind", ["fin_after_n", "malformed_at", "error_after_n"])
async def test_half_a_whole_answer_is_tried_elsewhere(fleet: Fleet, question: Question, kind: str):
    fleet.fail_first(question, kind)
    await served_by_another(fleet, question, await fleet.ask(question))


@one_of(*NAMED)
async def test_when_everybody_fails_the_error_has_the_dialects_type(fleet: Fleet, question: Question):
    fleet.fail_all(question, "status", status=500)
    answer = await fleet.ask(question)
    assert answer.status == 502
    assert kind_of(question, answer) == ("api_error" if question.dialect == "anthropic" else "server_error")


@one_of(*NAMED)
async def test_a_busy_fleet_is_overloaded(fleet: Fleet, question: Question):
    fleet.fail_all(question, "queue_full")
    answer = await fleet.ask(question)
    if question.dialect == "anthropic":
        assert (answer.status, kind_of(question, answer)) == (529, "overloaded_error")
    else:
        assert (answer.status, kind_of(question, answer)) == (503, "server_error")
    assert 1 <= int(answer.headers["retry-after"]) <= 60


@one_of(*[question for question in MESSAGES if question.model == LLAMA])
@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "request (3031 tokens) exceeds the available context size (1024 tokens), try increasing it"),
        (500, "image input is not supported - hint: you may need to provide the mmproj"),
        (500, "'messages' is required"),
    ],
)
async def test_a_refusal_in_openais_shape_comes_in_anthropics(
    fleet: Fleet, question: Question, status: int, said: str
):
    """llama-server's own 400, and the caller's mistakes that it calls a 500."""
    body = json.dumps({"error": {"code": status, "message": said, "type": "x_error"}})
    fleet.fail_all(question, "status", status=status, body=body)
    answer = await fleet.ask(question)
    assert (answer.status, kind_of(question, answer)) == (400, "invalid_request_error")
    assert answer.error == said
    assert fleet.requests(question) == 1


@one_of(*[question for question in MESSAGES if question.model == OLLAMA])
async def test_what_ollama_refuses_keeps_its_sentence(fleet: Fleet, question: Question):
    body = {key: value for key, value in question.body.items() if key != "max_tokens"}
    answer = await fleet.request(question.path, body)
    assert (answer.status, kind_of(question, answer)) == (400, "invalid_request_error")
    assert answer.error == "max_tokens is required and must be positive"


@one_of(*MESSAGES)
async def test_what_a_model_cannot_do_is_refused_before_it_is_sent(fleet: Fleet, question: Question):
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    answer = await fleet.request(
        question.path, question.body | {"messages": [{"role": "user", "content": [image]}]}
    )
    assert (answer.status, kind_of(question, answer)) == (400, "invalid_request_error")
    assert "vision" in answer.error
    assert fleet.requests(question) == 0


@one_of(*NAMED)
async def test_a_model_that_is_nowhere_is_404(fleet: Fleet, question: Question):
    answer = await fleet.request(question.path, question.body | {"model": "nowhere:1"})
    assert answer.status == 404
    expected = "not_found_error" if question.dialect == "anthropic" else "invalid_request_error"
    assert kind_of(question, answer) == expected
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("field", ["previous_response_id", "conversation", "background"])
async def test_a_response_that_would_have_to_be_kept_is_refused(fleet: Fleet, field: str):
    question = Question("responses", OLLAMA, False)
    answer = await fleet.request(question.path, question.body | {field: "resp_1"})
    assert (answer.status, kind_of(question, answer)) == (400, "invalid_request_error")
    assert f"'{field}'" in answer.error
    assert fleet.requests(question) == 0


@one_of(*STREAMS)
async def test_a_caller_who_leaves_stops_the_work(fleet: Fleet, question: Question):
    for fake in fleet.fakes(question.model):
        await fake.control({"tokens": 100_000, "token_delay_s": 0.01})
    call = await fleet.begin(question.path, question.body)
    await call.head()
    for _ in range(3):
        await call.piece()
    call.hang_up()
    await until(lambda: fleet.live() == 0, "the backend to stop", patience_s=1.0)
    [row] = await fleet.check(call.answer)
    assert row["status"] == "client_gone"


async def test_a_path_beside_messages_is_404_in_anthropics_shape(fleet: Fleet):
    for path in ("/v1/messages/batches", "/v1/messages/"):
        answer = await fleet.request(path, b"{}")
        assert (answer.status, answer.json()["error"]["type"]) == (404, "not_found_error")


# ---- counting tokens

COUNT = {"messages": [{"role": "user", "content": "one two three"}], "system": "four five"}


async def test_tokens_are_counted_by_the_node_that_can(fleet: Fleet):
    answer = await fleet.request("/v1/messages/count_tokens", COUNT | {"model": LLAMA})
    assert (answer.status, answer.json()) == (200, {"input_tokens": 16})
    assert "x-fleet-estimated" not in answer.headers
    [row] = await fleet.check(answer)
    assert (row["status"], row["kind"], row["prompt_tokens"]) == ("completed", "count", 16)


async def test_tokens_that_nobody_can_count_are_estimated_and_marked_so(fleet: Fleet):
    answer = await fleet.request("/v1/messages/count_tokens", COUNT | {"model": OLLAMA})
    assert answer.status == 200
    assert 3 <= answer.json()["input_tokens"] <= 100
    assert (answer.headers["x-fleet-estimated"], answer.headers["x-fleet-attempts"]) == ("1", "0")
    [row] = await fleet.check(answer)
    assert (row["status"], row["node_id"]) == ("completed", None)
    assert sum(fake.counters.requests for fake in fleet.all_fakes) == 0


async def test_a_count_that_fails_everywhere_is_estimated(fleet: Fleet):
    for fake in fleet.llama.values():
        fake.fault("status", path=endpoints.COUNT, count=None)
    answer = await fleet.request("/v1/messages/count_tokens", COUNT | {"model": LLAMA})
    assert (answer.status, answer.headers["x-fleet-estimated"]) == (200, "1")
    assert answer.headers["x-fleet-attempts"] == "2"
    rows = await fleet.check(answer)
    assert [row["status"] for row in rows] == ["retried", "retried", "completed"]


async def test_a_count_for_a_model_that_is_nowhere_is_404(fleet: Fleet):
    answer = await fleet.request("/v1/messages/count_tokens", COUNT | {"model": "nowhere:1"})
    assert (answer.status, answer.json()["error"]["type"]) == (404, "not_found_error")


# ---- what only some backends offer


async def test_what_no_backend_offers_is_501_and_says_who_would(fleet: Fleet):
    for path, body, who in [
        ("/v1/rerank", {"query": "q", "documents": ["d"]}, "--reranking"),
        ("/rerank", {"query": "q", "documents": ["d"]}, "--reranking"),
        ("/v1/images/generations", {"prompt": "a tree"}, "makes images"),
    ]:
        for model in (OLLAMA, LLAMA):
            answer = await fleet.request(path, body | {"model": model})
            assert (answer.status, answer.json()["error"]["code"]) == (501, "not_offered"), answer
            assert who in answer.error
            assert answer.headers["x-should-retry"] == "false"
            [row] = await fleet.check(answer)
            assert row["status"] == "rejected"
    assert sum(fake.counters.requests for fake in fleet.all_fakes) == 0


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def mixed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """A router with aliases; an old Ollama with `both:1`; a new one with that, ears and tools; a reranker."""
    folder: Path = tmp_path_factory.mktemp("mixed")
    aliases = {"claude-*": "both:1", "gpt-*": "rank:1", "lost-*": "nowhere:1"}
    old = FakeBackend(kind="ollama", models=[FakeModel("both:1", loaded=True)], slots=4)
    new_models = [FakeModel("both:1", capabilities=("completion", "tools"), loaded=True)]
    new_models += [FakeModel("ears:1", capabilities=("completion", "audio"), loaded=True)]
    new = FakeBackend(kind="ollama", models=new_models, slots=4)
    rank = FakeBackend(kind="llama-server", models=[FakeModel("rank:1", capabilities=("rerank",))], slots=4)
    old.dialect.lacks = frozenset(endpoints.OF_OLLAMA)
    limited = settings(folder, model_aliases=aliases, max_body_bytes=8 * 1024 * 1024)
    async with old, new, rank, running(Router(limited)) as router:
        fleet = Fleet(router, folder)
        fleet.ollama = {"old": old, "new": new}
        fleet.llama = {"rank": rank}
        try:
            for node_id, fake in (("old", old), ("new", new), ("rank", rank)):
                await fleet.start_agent(node_id, fake.url)
            for node_id in ("old", "new", "rank"):
                await fleet.online(node_id)
            yield fleet
        finally:
            for process in fleet.agents.values():
                if process.returncode is None:
                    process.kill()
                await process.wait()


def messages(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "max_tokens": 99, "messages": [{"role": "user", "content": "hi"}], **more}


async def test_a_request_goes_only_to_nodes_whose_backend_offers_it(mixed: Fleet):
    for _ in range(4):
        answer = await mixed.request("/v1/messages", messages("both:1"))
        assert (answer.status, answer.headers["x-fleet-node"]) == (200, "new")
        [row] = await mixed.rows(answer)
        assert row["excluded_nodes"]["old"] == "capability_missing"
    answer = await mixed.request("/v1/chat/completions", messages("both:1"))
    assert answer.status == 200


async def test_tools_come_back_in_anthropics_shape(mixed: Fleet):
    tool = {"name": "get_weather", "input_schema": {"type": "object"}}
    answer = await mixed.request("/v1/messages", messages("both:1", tools=[tool]))
    assert answer.json()["content"][0]["type"] == "tool_use"
    assert answer.json()["stop_reason"] == "tool_use"
    answer = await mixed.request("/v1/messages", messages("both:1", tools=[tool], stream=True))
    assert (answer.ends, answer.errors) == (1, [])


async def test_documents_are_ranked_by_the_node_that_can(mixed: Fleet):
    for path in endpoints.RERANK:
        body = {"model": "rank:1", "query": "a b", "documents": ["c", {"text": "a b"}], "top_n": 1}
        answer = await mixed.request(path, body)
        assert answer.json()["results"] == [{"index": 1, "relevance_score": 1.0}]
        [row] = await mixed.rows(answer)
        assert (row["status"], row["kind"], row["node_id"]) == ("completed", "rerank", "rank")


def sound(model: str, size_bytes: int, *, model_last: bool = False) -> tuple[bytes, dict[str, str]]:
    mark = b"--xyzzy\r\nContent-Disposition: form-data; name="
    field = mark + b'"model"\r\n\r\n' + model.encode() + b"\r\n"
    file = mark + b'"file"; filename="a.wav"\r\n\r\n' + bytes(size_bytes) + b"\r\n"
    parts = (file, field) if model_last else (field, file)
    return b"".join(parts) + b"--xyzzy--\r\n", {"Content-Type": "multipart/form-data; boundary=xyzzy"}


@pytest.mark.parametrize("size_bytes", [1, 900_000, 5_000_000])
@pytest.mark.parametrize("model_last", [False, True])
async def test_a_recording_of_any_length_is_transcribed(mixed: Fleet, size_bytes: int, model_last: bool):
    body, headers = sound("ears:1", size_bytes, model_last=model_last)
    answer = await mixed.request("/v1/audio/transcriptions", body, headers=headers)
    assert (answer.status, answer.json()) == (200, {"text": f"{size_bytes} bytes"})
    [row] = await mixed.rows(answer)
    assert (row["status"], row["kind"], row["node_id"]) == ("completed", "transcription", "new")
    seen = mixed.ollama["new"].counters.last[-1]
    assert seen["headers"]["content-type"] == headers["Content-Type"]
    assert seen["headers"]["content-length"] == str(len(body))


async def test_a_recording_is_sent_again_whole_when_a_node_fails(mixed: Fleet):
    mixed.ollama["new"].fault("rst_before_headers", path=endpoints.TRANSCRIPTIONS)
    body, headers = sound("ears:1", 2_000_000)
    answer = await mixed.request("/v1/audio/transcriptions", body, headers=headers)
    assert answer.status in (200, 502)  # one node has it: R-6 or the end
    answer = await mixed.request("/v1/audio/transcriptions", body, headers=headers)
    assert answer.json() == {"text": "2000000 bytes"}


async def test_a_bad_form_is_400_and_a_long_one_413(mixed: Fleet):
    good, headers = sound("ears:1", 10)
    for body, kind in [
        (b"", headers),
        (good[:-20], headers),
        (good, {"Content-Type": "application/json"}),
        (good.replace(b"ears:1", b""), headers),
        (good.replace(b"ears:1", b"a b"), headers),
        (good.replace(b'"file"; filename', b'"other"; filename'), headers),
    ]:
        answer = await mixed.request("/v1/audio/transcriptions", body, headers=kind)
        assert (answer.status, answer.json()["error"]["type"]) == (400, "invalid_request_error"), body
    body, headers = sound("nowhere:1", 10)
    answer = await mixed.request("/v1/audio/transcriptions", body, headers=headers)
    assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")
    body, headers = sound("rank:1", 10)
    answer = await mixed.request("/v1/audio/transcriptions", body, headers=headers)
    assert (answer.status, answer.json()["error"]["code"]) == (501, "not_offered")
    body, headers = sound("ears:1", 9 * 1024 * 1024)
    answer = await mixed.request("/v1/audio/transcriptions", body, headers=headers)
    assert (answer.status, answer.json()["error"]["code"]) == (413, "request_too_large")


async def test_a_packed_form_is_415(mixed: Fleet):
    body, headers = sound("ears:1", 10)
    packed = headers | {"Content-Encoding": "gzip"}
    answer = await mixed.request("/v1/audio/transcriptions", body, headers=packed)
    assert (answer.status, answer.json()["error"]["type"]) == (415, "invalid_request_error")


async def test_a_form_whose_sender_leaves_leaves_nothing_behind(mixed: Fleet):
    body, headers = sound("ears:1", 3_000_000)
    call = await mixed.begin(
        "/v1/audio/transcriptions", body[:-100], headers=headers | {"Content-Length": "4000000"}
    )
    call.hang_up()
    await until(lambda: not mixed.router.dispatcher.live, "the router to be idle")
    answer = await mixed.request("/v1/audio/transcriptions", body, headers=headers)
    assert answer.json() == {"text": "3000000 bytes"}


# ---- aliases


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dialect", ["anthropic", "openai", "ollama"])
async def test_an_alias_is_served_by_what_it_stands_for(mixed: Fleet, dialect: str, stream: bool):
    question = Question(dialect, "claude-sonnet-4-5", stream)
    answer = await mixed.ask(question)
    assert (answer.status, answer.text) == (200, TEXT)
    assert answer.headers["x-fleet-model"] == "both:1"
    assert "x-fleet-fallback" not in answer.headers
    said = answer.records[0] if stream else answer.json()
    assert (said.get("message", said) if dialect == "anthropic" else said)["model"] == "both:1"
    [row] = await mixed.rows(answer)
    assert (row["model"], row["original_model"], row["fallback_used"]) == ("both:1", question.model, False)


async def test_a_real_name_goes_before_an_alias_and_an_alias_may_be_a_fallback(mixed: Fleet):
    answer = await mixed.request("/v1/messages", messages("CLAUDE-Opus"))
    assert answer.headers["x-fleet-model"] == "both:1"
    answer = await mixed.request("/v1/messages", messages("both:1"))
    assert answer.headers["x-fleet-model"] == "both:1"
    answer = await mixed.request("/v1/messages", messages("nowhere:1", fallback_models=["claude-3"]))
    assert (answer.headers["x-fleet-model"], answer.headers["x-fleet-fallback"]) == ("both:1", "nowhere:1")


async def test_an_alias_of_nothing_is_404_under_the_name_that_was_asked(mixed: Fleet):
    answer = await mixed.request("/v1/messages", messages("lost-1"))
    assert answer.status == 404
    assert "lost-1" in answer.error


async def test_an_alias_in_a_form_is_replaced(mixed: Fleet):
    body, headers = sound("claude-ears", 2_000_000)
    answer = await mixed.request("/v1/audio/transcriptions", body, headers=headers)
    assert (answer.status, answer.headers["x-fleet-model"]) == (200, "both:1")
    assert answer.json() == {"text": "2000000 bytes"}
