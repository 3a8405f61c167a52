"""What a caller can say about who serves it: one node alone, no other model, or one that is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from herd.app import Router
from tests.fakes.backend import FakeBackend
from tests.fakes.model import FakeModel
from tests.router.kit import (
    LLAMA,
    NAMED,
    OLLAMA,
    QUESTIONS,
    TEXT,
    Answer,
    Fleet,
    Question,
    running,
    settings,
    until,
)
from tests.router.test_faults_before_content import one_of

PIN = "X-Fleet-Node"
NO_FALLBACK = "X-Fleet-No-Fallback"
#: A request of every other kind, by path.
OTHERS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": OLLAMA, "prompt": "hi"},
    "/api/generate": {"model": OLLAMA, "prompt": "hi", "stream": False},
    "/v1/embeddings": {"model": "embed:1", "input": "hi"},
    "/api/embed": {"model": "embed:1", "input": "hi"},
    "/api/embeddings": {"model": "embed:1", "prompt": "hi"},
    "/api/show": {"model": OLLAMA},
}
ON_OLLAMA = [question for question in (*QUESTIONS, *NAMED) if question.model == OLLAMA]


def sentence(answer: Answer) -> str:
    """Of an error, in the shape of the dialect."""
    assert answer.status >= 400, answer
    return answer.error


# ---- one node alone


@one_of(*QUESTIONS, *NAMED)
async def test_a_pinned_request_goes_to_its_node_and_the_pin_goes_nowhere(fleet: Fleet, question: Question):
    for node_id in ("a", "b", "a", "b"):
        answer = await fleet.request(question.path, question.body, headers={PIN: node_id})
        assert (answer.status, answer.headers["x-fleet-node"]) == (200, node_id)
        [row] = await fleet.rows(answer)
        assert row["excluded_nodes"] == {"b" if node_id == "a" else "a": "not_pinned"}
    for fake in fleet.fakes(question.model):
        seen = [call for call in fake.counters.last if call["path"] == question.backend_path]
        assert seen
        assert not [name for call in seen for name in call["headers"] if name.startswith("x-fleet")]


@pytest.mark.parametrize("path", OTHERS)
async def test_every_other_kind_is_pinned_too(fleet: Fleet, path: str):
    for node_id in ("b", "a", "b"):
        answer = await fleet.request(path, OTHERS[path], headers={PIN: node_id})
        assert (answer.status, answer.headers["x-fleet-node"]) == (200, node_id)
    answer = await fleet.request(path, OTHERS[path] | {"model": "only-a:1"}, headers={PIN: "b"})
    assert answer.status == 404
    assert sentence(answer) == "node 'b' does not have model 'only-a:1'"


async def test_a_count_is_pinned_too(fleet: Fleet):
    body = Question("anthropic", LLAMA, False).body
    for node_id in ("a", "b"):
        answer = await fleet.request("/v1/messages/count_tokens", body, headers={PIN: node_id})
        assert (answer.status, answer.headers["x-fleet-node"]) == (200, node_id)
    answer = await fleet.request("/v1/messages/count_tokens", body, headers={PIN: "nowhere"})
    assert (answer.status, sentence(answer)) == (404, "node 'nowhere' is not known")


@one_of(*QUESTIONS, *NAMED)
async def test_a_node_without_the_model_is_404_in_the_callers_dialect(fleet: Fleet, question: Question):
    for only, message in (
        ("b", "node 'b' does not have model 'only-a:1'"),
        ("nowhere", "node 'nowhere' is not known"),
        ("no node!", "X-Fleet-Node names no node"),
    ):
        body = question.body | {"model": "only-a:1"}
        answer = await fleet.request(question.path, body, headers={PIN: only})
        assert (answer.status, sentence(answer), answer.headers["x-fleet-attempts"]) == (404, message, "0")
        assert answer.headers["x-should-retry"] == "false"
        if question.dialect == "anthropic":
            assert answer.json()["error"]["type"] == "not_found_error"
        elif question.dialect != "ollama":
            assert answer.json()["error"]["type"] == "invalid_request_error"
    assert fleet.requests(question) == 0


async def test_a_pinned_request_is_not_tried_elsewhere(fleet: Fleet):
    question = QUESTIONS[0]
    fleet.ollama["a"].fault("status", status=500, count=None, path=question.backend_path)
    answer = await fleet.request(question.path, question.body, headers={PIN: "a"})
    assert (answer.status, answer.headers["x-fleet-attempts"]) == (502, "1")
    assert fleet.requests(question) == 1


async def test_a_pinned_request_takes_the_next_model_of_its_chain_that_its_node_has(fleet: Fleet):
    body = QUESTIONS[0].body | {"model": "only-a:1", "fallback_models": ["only-b:1"]}
    answer = await fleet.request(QUESTIONS[0].path, body, headers={PIN: "b"})
    assert (answer.status, answer.headers["x-fleet-model"]) == (200, "only-b:1")
    assert answer.headers["x-fleet-fallback"] == "only-a:1"
    body["fallback_models"] = ["nowhere:1"]
    answer = await fleet.request(QUESTIONS[0].path, body, headers={PIN: "b"})
    assert answer.error == "node 'b' does not have models 'only-a:1', 'nowhere:1'"


# ---- no other model


@one_of(*QUESTIONS, *NAMED)
async def test_without_fallback_only_the_first_model_counts(fleet: Fleet, question: Question):
    body = question.body | {"model": "nowhere:1", "fallback_models": [question.model]}
    for more, value in (({"fallback": False}, "0"), ({}, "1"), ({"fallback": "loaded"}, "yes")):
        answer = await fleet.request(question.path, body | more, headers={NO_FALLBACK: value})
        assert answer.status == 404
        assert "'nowhere:1'" in sentence(answer)
        assert question.model not in sentence(answer)
    for value in ("", "0", "false", "False"):
        answer = await fleet.request(question.path, body | {"fallback": True}, headers={NO_FALLBACK: value})
        assert (answer.status, answer.headers["x-fleet-model"]) == (200, question.model)
    assert fleet.requests(question) == 4


@one_of(*QUESTIONS, *NAMED)
async def test_a_failure_stays_a_failure_without_fallback(fleet: Fleet, question: Question):
    other = OLLAMA if question.model == LLAMA else LLAMA
    fleet.fail_all(question, "status", status=500)
    answer = await fleet.ask(question, fallback_models=[other], fallback=False)
    assert (answer.status, answer.headers["x-fleet-attempts"]) == (502, "2")


@one_of(*QUESTIONS, *NAMED)
async def test_a_fallback_of_another_kind_is_refused_in_the_dialect(fleet: Fleet, question: Question):
    for value in ("yes", 1, [], {"loaded": True}):
        answer = await fleet.ask(question, fallback=value)
        assert (answer.status, "'fallback'" in sentence(answer)) == (400, True)
    assert fleet.requests(question) == 0


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/embed", "/api/embeddings"])
async def test_an_embedding_goes_to_the_model_that_it_names_or_nowhere(fleet: Fleet, path: str):
    for more in ({}, {"fallback": True}, {"fallback": "loaded"}):
        body = OTHERS[path] | {"model": "nowhere:1", "fallback_models": ["embed:1"]} | more
        answer = await fleet.request(path, body)
        assert answer.status == 404
        assert "embed:1" not in sentence(answer)


@pytest.mark.parametrize("think", [True, "low"])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_thoughts_of_a_model_without_are_refused_before_it_is_sent(
    fleet: Fleet, path: str, think: object
):
    body = Question("ollama", OLLAMA, False).body | {"prompt": "hi", "think": think}
    answer = await fleet.request(path, body)
    assert (answer.status, "thinking" in answer.error) == (400, True)
    assert fleet.ollama["a"].counters.by_path.get(path, 0) == 0
    assert (await fleet.request(path, body | {"think": False})).status == 200


@one_of(*QUESTIONS, *NAMED)
async def test_who_is_behind_it_stands_in_the_trace(fleet: Fleet, question: Question):
    metadata = {"metadata": {"user_id": "anna", "tags": ["t1", "t2"]}}
    answer = await fleet.request(question.path, question.body | metadata, headers={"X-Herd-Tags": "h1, h2"})
    [row] = await fleet.rows(answer)
    assert (row["user"], row["tags"]) == ("anna", ["t1", "t2", "h1", "h2"])
    answer = await fleet.request(question.path, question.body | metadata | {"user": "berta"})
    [row] = await fleet.rows(answer)
    assert row["user"] == "berta"


# ---- text completions


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("model", "other"), [("only-a:1", LLAMA), (LLAMA, OLLAMA)])
async def test_a_text_completion_never_crosses_between_templates_and_none(
    fleet: Fleet, model: str, other: str, stream: bool
):
    path = "/v1/completions"
    for fake in fleet.fakes(model):
        fake.fault("status", status=500, count=None, path=path)
    body = {"model": model, "prompt": "hi", "stream": stream, "fallback_models": [other]}
    answer = await fleet.request(path, body)
    assert (answer.status, answer.headers["x-fleet-attempts"]) == (502, str(len(fleet.fakes(model))))
    assert [fake.counters.by_path.get(path, 0) for fake in fleet.fakes(other)] == [0, 0]
    # one of the same kind may
    if model != LLAMA:
        answer = await fleet.request(path, body | {"fallback_models": [other, "only-b:1"]})
        assert (answer.status, answer.headers["x-fleet-model"]) == (200, "only-b:1")


# ---- one that is loaded already


async def cooled(fleet: Fleet, model: str) -> None:
    """The model is loaded nowhere, and the router knows."""
    for fake in fleet.fakes(model):
        await fake.control({"models": [{"name": model, "loaded": False}]})

    def is_cold() -> bool:
        holders = fleet.router.registry.snapshot(fleet.router.clock.now_s()).holders[model]
        return all(one.state in ("cold", "warm") for _, one in holders)

    await until(is_cold, f"{model} to be cold")


def loaded(fleet: Fleet, model: str) -> bool:
    return any(x.loaded for fake in fleet.fakes(model) for x in fake.dialect.models if x.name == model)


@one_of(*ON_OLLAMA)
async def test_a_loaded_model_stands_in_and_everybody_can_see_it(fleet: Fleet, question: Question):
    await cooled(fleet, "only-a:1")
    raw = json.dumps(
        question.body | {"model": "only-a:1", "fallback": "loaded", "x": [1.0]}, indent=1
    ).encode()
    answer = await fleet.request(question.path, raw)
    assert (answer.status, answer.text, answer.errors) == (200, TEXT, [])
    served = answer.headers["x-fleet-model"]
    assert served != "only-a:1"
    assert answer.headers["x-fleet-fallback"] == "only-a:1"
    assert not loaded(fleet, "only-a:1")
    [row] = await fleet.check(answer)
    assert (row["model"], row["original_model"], row["fallback_used"]) == (served, "only-a:1", True)
    assert (row["status"], row["node_id"]) == ("completed", answer.headers["x-fleet-node"])
    if served == OLLAMA:  # where nothing is translated only the bytes of the model differ
        [seen] = [call for fake in fleet.fakes(served) for call in fake.counters.last]
        assert seen["body"].encode() == raw.replace(b'"only-a:1"', b'"%b"' % served.encode())


@one_of(*ON_OLLAMA)
async def test_unasked_the_model_is_loaded(fleet: Fleet, question: Question):
    await cooled(fleet, "only-a:1")
    answer = await fleet.ask(question, model="only-a:1")
    assert (answer.status, answer.headers["x-fleet-model"]) == (200, "only-a:1")
    assert "x-fleet-fallback" not in answer.headers
    await fleet.check(answer)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/chat", {"messages": []}),
        ("/api/generate", {"prompt": ""}),
        ("/api/generate", {"prompt": "hi", "raw": True}),
        ("/v1/completions", {"prompt": "hi"}),
    ],
)
async def test_what_means_one_model_is_served_by_that_one(fleet: Fleet, path: str, body: dict[str, Any]):
    await cooled(fleet, "only-a:1")
    answer = await fleet.request(path, body | {"model": "only-a:1", "fallback": "loaded", "stream": False})
    assert (answer.status, answer.headers["x-fleet-model"]) == (200, "only-a:1")
    assert loaded(fleet, "only-a:1")


async def test_a_stop_of_a_model_that_is_not_loaded_unloads_no_other(fleet: Fleet):
    """`ollama stop` is a generate without a prompt and with `keep_alive: 0`."""
    await cooled(fleet, "only-a:1")
    body = {"model": "only-a:1", "keep_alive": 0, "fallback": "loaded", "fallback_models": [OLLAMA]}
    answer = await fleet.request("/api/generate", body)
    assert (answer.status, answer.headers["x-fleet-model"]) == (200, "only-a:1")
    assert all(x.loaded for fake in fleet.fakes(OLLAMA) for x in fake.dialect.models if x.name == OLLAMA)


async def test_the_setting_is_for_all_requests_and_a_request_may_still_say_no(tmp_path: Path):
    models = [FakeModel("cold:1"), FakeModel("hot:1", loaded=True)]
    ollama = FakeBackend(kind="ollama", models=models, slots=4, max_loaded=2)
    async with ollama, running(Router(settings(tmp_path, vram_fallback=True))) as router:
        fleet = Fleet(router, tmp_path)
        fleet.ollama = {"a": ollama}
        try:
            await fleet.start_agent("a", ollama.url)
            await fleet.online("a")
            question = Question("openai", "cold:1", True)
            answer = await fleet.ask(question)
            assert (answer.status, answer.headers["x-fleet-model"]) == (200, "hot:1")
            assert answer.headers["x-fleet-fallback"] == "cold:1"
            assert answer.records[0]["model"] == "hot:1"
            answer = await fleet.ask(question, fallback=False)
            assert (answer.status, answer.headers["x-fleet-model"]) == (200, "cold:1")
        finally:
            for process in fleet.agents.values():
                process.kill()
                await process.wait()
