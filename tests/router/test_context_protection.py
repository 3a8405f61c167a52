"""Context protection with real agents and fake Ollamas that load a model anew as a real one does."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from herd.proxy.contexts import Contexts
from herd.scheduling.rows import CostTable
from tests.router.kit import LLAMA, NODES, OLLAMA, TEXT, Answer, Fleet, Question, until

CHAT = Question("ollama", OLLAMA, False)
EARLY = Question("openai", OLLAMA, True)
DEFAULT_CONTEXT = 2048


async def loaded(fleet: Fleet, **contexts: int) -> None:
    """The model is loaded with these contexts, node by node, and the router knows."""
    for node_id in NODES:
        tokens = contexts.get(node_id, DEFAULT_CONTEXT)
        order = {"name": OLLAMA, "loaded": True, "loaded_context": tokens, "loaded_with": {}}
        await fleet.ollama[node_id].control({"models": [order]})
        await until(
            lambda n=node_id, t=tokens: context_of(fleet, n) == ("hot", t), f"the context of {node_id}"
        )
    for fake in fleet.ollama.values():
        await fake.control({"reset": True})


def context_of(fleet: Fleet, node_id: str) -> tuple[str, int | None]:
    node = fleet.router.registry.snapshot(fleet.router.clock.now_s()).nodes[node_id]
    view = next(x for x in node.instances if any(name.canonical == OLLAMA for name in x.names))
    return view.state, view.context_tokens


def loads(fleet: Fleet) -> int:
    return sum(fake.counters.loads for fake in fleet.ollama.values())


@contextmanager
def mode(fleet: Fleet, name: Any) -> Iterator[None]:
    room = fleet.router.room
    before = room._policy, room._table, room._contexts
    room._policy, room._table = replace(room._policy, context_protection=name), CostTable()
    room._contexts = Contexts(fleet.router.registry, room._policy)
    try:
        yield
    finally:
        room._policy, room._table, room._contexts = before


@pytest_asyncio.fixture(loop_scope="session")
async def two(fleet: Fleet) -> AsyncIterator[Fleet]:
    """Both nodes with the default context, before and after."""
    with mode(fleet, "strip"):
        await loaded(fleet)
        yield fleet
    await loaded(fleet)


def good(answer: Answer) -> None:
    assert (answer.status, answer.text) == (200, TEXT), answer.body


@pytest.mark.parametrize(
    "options",
    [
        {"num_ctx": 512},
        {"num_ctx": DEFAULT_CONTEXT},
        {"num_ctx": 512, "num_thread": 2, "num_gpu": 1, "use_mmap": True, "num_batch": 64},
    ],
)
async def test_strip_asks_for_the_context_there_is_and_nothing_is_loaded_anew(two: Fleet, options: Any):
    for _ in range(3):
        answer = await two.ask(CHAT, options={**options, "seed": 1})
        good(answer)
        assert "x-fleet-context" not in answer.headers
        await two.check(answer)
    assert loads(two) == 0


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_callers_with_different_contexts_do_not_evict_each_others_runner(two: Fleet, path: str):
    asks = {"messages": CHAT.body["messages"], "prompt": "hi", "model": OLLAMA, "stream": True}
    for tokens in (512, 1024, 2048, 700):
        answer = await two.request(path, {**asks, "options": {"num_ctx": tokens}})
        good(answer)
        good(await two.ask(Question("openai", OLLAMA, True)))
        await two.check(answer)
    assert loads(two) == 0


@pytest.mark.parametrize(("name", "lines"), [("warn", 1), ("passthrough", 0)])
async def test_warn_and_passthrough_let_ollama_do_it(
    two: Fleet, name: str, lines: int, caplog: pytest.LogCaptureFixture
):
    with mode(two, name), caplog.at_level(logging.WARNING, "herd.proxy.contexts"):
        answer = await two.ask(CHAT, options={"num_ctx": 512})
        good(answer)
        assert answer.headers["x-fleet-context"] == "reload"
        node_id = answer.headers["x-fleet-node"]
        assert two.ollama[node_id].counters.loads == 1
        await until(lambda: context_of(two, node_id) == ("hot", 512), "the new context")
        again = await two.ask(CHAT, options={"num_ctx": 512})  # goes where it is loaded so
        good(again)
        assert again.headers["x-fleet-node"] == node_id
        assert "x-fleet-context" not in again.headers
        await two.check(again)
    assert loads(two) == 1
    assert len(caplog.records) == lines


async def test_a_larger_context_goes_where_it_is_loaded(two: Fleet):
    await loaded(two, b=4096)
    for _ in range(3):
        answer = await two.ask(CHAT, options={"num_ctx": 4000})
        good(answer)
        assert answer.headers["x-fleet-node"] == "b"
        assert "x-fleet-context" not in answer.headers
        await two.check(answer)
    assert loads(two) == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_else_one_node_loads_it_anew_and_the_answer_says_so(two: Fleet, stream: bool):
    answer = await two.ask(Question("ollama", OLLAMA, stream), options={"num_ctx": 4096})
    good(answer)
    assert answer.headers["x-fleet-context"] == "reload"
    await two.check(answer)
    node_id = answer.headers["x-fleet-node"]
    assert two.ollama[node_id].counters.loads == loads(two) == 1
    await until(lambda: context_of(two, node_id) == ("hot", 4096), "the new context")
    again = await two.ask(CHAT, options={"num_ctx": 4096})
    assert (again.headers["x-fleet-node"], again.headers.get("x-fleet-context")) == (node_id, None)
    await two.check(again)
    assert loads(two) == 1


async def test_while_it_loads_nobody_is_sent_there_with_the_old_context(two: Fleet):
    for fake in two.ollama.values():
        await fake.control({"load_s": 0.4})
    asking = asyncio.ensure_future(two.ask(CHAT, options={"num_ctx": 4096}))
    await until(lambda: "loading" in {context_of(two, n)[0] for n in NODES}, "the load to begin")
    others = await asyncio.gather(*(two.ask(CHAT, options={"num_ctx": 512}) for _ in range(4)))
    first = await asking
    for answer in (first, *others):
        good(answer)
    assert {answer.headers["x-fleet-node"] for answer in others} == {*NODES} - {first.headers["x-fleet-node"]}
    await two.check(first)
    assert loads(two) == 1
    for fake in two.ollama.values():
        await fake.control({"load_s": 0.0})


async def test_the_openai_dialect_is_not_looked_at(two: Fleet):
    answer = await two.ask(EARLY, options={"num_ctx": 512, "num_thread": 3})
    good(answer)
    await two.check(answer)
    assert loads(two) == 0


async def test_a_context_that_no_llama_server_has_is_refused_with_the_numbers(two: Fleet):
    answer = await two.ask(Question("ollama", LLAMA, True), options={"num_ctx": 100_000})
    assert answer.status == 400
    assert "num_ctx 100000" in answer.error
    assert "the largest context is 2048 tokens, on node 'a'" in answer.error


@pytest.mark.parametrize("dialect", ["ollama", "openai", "anthropic", "responses"])
async def test_a_prompt_that_fits_nowhere_is_refused_in_the_callers_dialect(two: Fleet, dialect: str):
    question = Question(dialect, LLAMA, False)
    long = "word " * 4000
    more = {"input": long} if dialect == "responses" else {"messages": [{"role": "user", "content": long}]}
    answer = await two.ask(question, **more)
    assert answer.status == 400
    # how many depends on what was learned of the model before
    found = re.search(r"its prompt is estimated at ([0-9]+) tokens", answer.error)
    assert found is not None
    assert int(found[1]) > 2048
    assert "the largest context is 2048 tokens, on node 'a'" in answer.error
    assert two.requests(question) == 0
