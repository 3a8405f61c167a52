"""From HTTP to the request's value: what body and header fields say, and which of the two wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import pytest

from herd.dialects import DIALECT_BY_PATH, Dialect, Parsed
from herd.errors import NotFound
from herd.request import InferenceRequest, Principal
from herd.web.aliases import Aliases
from herd.web.inference import Inference
from herd_node.net.exchange import Exchange
from herd_node.protocol.routes import FORWARDED_BY_PATH
from herd_node.runtime.clock import ManualClock

CALLER = Principal("lan", "10.0.0.9", "10.0.0.9")
OLLAMA_CHAT = {
    "model": "Library/Llama3:Latest",
    "messages": [{"role": "user", "content": "hi", "images": ["aGk="]}],
    "stream": True,
    "tools": [{"type": "function"}],
    "options": {"num_ctx": 4096, "num_predict": 7, "num_gpu": 3},
    "fallback_models": ["Other"],
    "fallback": "loaded",
    "user": "anna",
    "metadata": {"tags": ["from-body"]},
}
SAID = [
    (b"content-type", b"application/json"),
    (b"authorization", b"Bearer secret"),
    (b"x-request-id", b"theirs"),
    (b"x-request-id", b"second"),
    (b"x-herd-tags", b"from-field, two"),
    (b"x-fleet-node", b"attic"),
    (b"x-fleet-progress", b"1"),
    (b"accept", b"*/*"),
]


class _Noting:
    """Stands where the dispatcher stands."""

    def __init__(self) -> None:
        self.requests: list[InferenceRequest] = []

    async def handle(self, exchange: Exchange, request: InferenceRequest, dialect: Dialect) -> None:
        assert dialect is DIALECT_BY_PATH[request.route.path]
        self.requests.append(request)


class _Sent:
    """As much of an exchange as is read before a request is dispatched."""

    def __init__(self, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        self.headers = headers
        self._body = body

    async def read_body(self, limit_bytes: int) -> bytes:
        assert len(self._body) <= limit_bytes
        return self._body


async def read(
    body: dict[str, Any],
    headers: Sequence[tuple[bytes, bytes]] = (),
    *,
    path: str = "/api/chat",
    aliases: Aliases | None = None,
) -> InferenceRequest:
    noting = _Noting()
    inference = Inference(
        noting,  # type: ignore[arg-type]
        ManualClock(100.0, 5000.0),
        lambda: "id-1",
        aliases or Aliases({}, lambda name: True),
        max_body_bytes=1 << 20,
    )
    sent = _Sent(headers, orjson.dumps(body))
    await inference(sent, FORWARDED_BY_PATH[path], CALLER)  # type: ignore[arg-type]
    (request,) = noting.requests
    return request


def test_the_middle_of_a_request_is_what_a_dialect_reads():
    start = InferenceRequest._fields.index(Parsed._fields[0])
    assert InferenceRequest._fields[start : start + len(Parsed._fields)] == Parsed._fields


async def test_every_field_of_a_request_stands_in_its_place():
    parsed = DIALECT_BY_PATH["/api/chat"].parse(FORWARDED_BY_PATH["/api/chat"], orjson.dumps(OLLAMA_CHAT))
    assert await read(OLLAMA_CHAT, SAID) == InferenceRequest(
        request_id="id-1",
        route=FORWARDED_BY_PATH["/api/chat"],
        chain=("llama3", "other"),
        asked=("Library/Llama3:Latest", "Other"),
        body=orjson.dumps(OLLAMA_CHAT),
        stream=True,
        est_tokens=parsed.est_tokens,
        max_tokens=7,
        wanted_context_tokens=4096,
        load_options=(("num_gpu", 3),),
        needs=frozenset({"completion", "tools", "vision"}),
        prefixes=parsed.prefixes,
        headers=[SAID[0], SAID[-1]],
        client_request_id="theirs",
        principal=CALLER,
        user="anna",
        tags=("from-body", "from-field", "two"),
        model_key="model",
        buffered=True,
        resolved=(),
        form_span=None,
        only="attic",
        fallback="loaded",
        progress=True,
        arrival_s=100.0,
        arrival_wall_s=5000.0,
    )


async def test_without_a_field_for_the_router_the_body_alone_counts():
    request = await read(OLLAMA_CHAT, [(b"host", b"h"), SAID[0]])
    assert (request.client_request_id, request.only, request.progress) == (None, None, False)
    assert (request.tags, request.fallback, request.headers) == (("from-body",), "loaded", [SAID[0]])


@pytest.mark.parametrize(("value", "asked"), [(b"1", 1), (b"yes", 1), (b"0", 2), (b" False ", 2), (b"", 2)])
async def test_a_field_that_forbids_fallbacks_overrules_the_body(value: bytes, asked: int):
    request = await read(OLLAMA_CHAT, [(b"x-fleet-no-fallback", value)])
    assert len(request.asked) == len(request.chain) == asked
    assert request.fallback == ("none" if asked == 1 else "loaded")


async def test_a_chain_names_each_model_once_and_an_embedding_has_none():
    twice = {"model": "m", "input": "hi", "fallback_models": ["M:latest", "other", "other"]}
    assert (await read(OLLAMA_CHAT | twice)).asked == ("m", "other")
    assert (await read(twice, path="/v1/embeddings")).asked == ("m",)


async def test_an_alias_is_sent_under_the_name_that_it_stands_for():
    aliases = Aliases({"claude-*": "Llama3"}, lambda name: False)
    request = await read(OLLAMA_CHAT | {"model": "claude-x"}, aliases=aliases)
    assert (request.asked, request.resolved) == (("claude-x", "Other"), ("Llama3", "Other"))
    assert request.chain == ("llama3", "other")


async def test_a_node_that_cannot_be_is_refused():
    with pytest.raises(NotFound):
        await read(OLLAMA_CHAT, [(b"x-fleet-node", b"no/where")])
