"""The signed front door of the node: admits its router's calls and nothing else, and counts what runs.

Decision, in this order (docs/protocol.md §2, §4):
1. signature: the mac from the head, before a byte of body is read             400, 401, 426 `auth`
2. the body's hash, then boots and sequence                                    401 `auth`/`boot`, 409 `stale`
3. `/herd/v1/ping`: the signed answer
4. the allow-list, made of the shared rows of the route table                  404, 405
5. the model: one parse, no second `model`; the first backend that serves it   400, 404 `no-model`
6. the backend is ready, we are not draining, a slot (+ 1) is free             503 `not-ready`, `busy`
7. forward, or translate where the backend lacks the dialect
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import orjson

from herd_node.backends.base import Backend, LoadFailed
from herd_node.net.exchange import BodyTooLarge, Exchange
from herd_node.protocol import auth
from herd_node.protocol.jsonedit import JsonEditError, find_top_level, json_string, replace_span
from herd_node.protocol.names import canonical
from herd_node.protocol.routes import FORWARDED_BY_PATH, Dialect, Route
from herd_node.protocol.wire import Model
from herd_node.relay import JSON, Relay, Trouble, answer_trouble, until_gone
from herd_node.runtime.clock import Clock
from herd_node.translate import Answer, ModelFacts, Refusal, translate

PING = "/herd/v1/ping"
#: The router has its own, smaller limit; this one only bounds what a holder of the key can make us keep.
MAX_BODY_BYTES = 256 * 1024 * 1024
_HASH_IN_THREAD_BYTES = 256 * 1024
#: Long enough for two beats: the router believes only one that was written after the hang-up was heard.
_LATELY_S = 15.0
_TAKES_A_SLOT = frozenset({"chat", "completion", "generate", "embedding"})


Runner = tuple[str, str]
"""Backend id and weights (or name)."""


class Live(NamedTuple):
    """A call that runs. `runner` is what its slot belongs to: entries with the same weights share one."""

    model: str
    runner: Runner
    number: int


class Calls:
    """The calls that run now, as a set: every count is a `len()`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._live: set[Live] = set()
        self._numbers = 0
        self._ended_s: dict[str, float] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._live)

    def by_model(self) -> dict[str, int]:
        names = [call.model for call in self._live]
        return {name: names.count(name) for name in sorted(set(names))}

    def on_runner(self, runner: Runner) -> int:
        return sum(call.runner == runner for call in self._live)

    def ran_lately(self, backend_id: str) -> bool:
        """Something runs there, or did a moment ago: a backend does not hear of a hang-up at once."""
        if any(call.runner[0] == backend_id for call in self._live):
            return True
        ended_s = self._ended_s.get(backend_id)
        return ended_s is not None and self._clock.now_s() - ended_s < _LATELY_S

    async def until_idle(self) -> None:
        await self._idle.wait()

    @contextmanager
    def one(self, model: str, runner: Runner) -> Iterator[Live]:
        self._numbers += 1
        call = Live(model, runner, self._numbers)
        self._live.add(call)
        self._idle.clear()
        try:
            yield call
        finally:
            self._live.discard(call)
            self._ended_s[runner[0]] = self._clock.now_s()
            if not self._live:
                self._idle.set()


class Chosen(NamedTuple):
    """Where a call goes."""

    backend: Backend
    model: Model
    name: str
    """Canonical."""
    as_written: str
    fields: dict[str, object]
    """The parsed body."""


class Gateway:
    """One handler for every request. `backends` is asked anew for each call, the first one first."""

    def __init__(
        self,
        *,
        node_id: str,
        agent_id: str,
        boot: str,
        gate: auth.CallGate,
        key_for: Callable[[str], bytes | None],
        backends: Callable[[], Sequence[Backend]],
        relay: Relay,
        clock: Clock,
        on_ping: Callable[[], None] = lambda: None,
    ) -> None:
        self.calls = Calls(clock)
        self._on_ping = on_ping
        self.draining = False
        self._node_id, self._agent_id, self._boot = node_id, agent_id, boot
        self._gate = gate
        self._key_for = key_for
        self._backends = backends
        self._relay = relay
        self._clock = clock

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request. Raises ClientGone."""
        route = FORWARDED_BY_PATH.get(exchange.path)
        dialect: Dialect = route.dialect if route is not None else "openai"
        try:
            header, key = self._signed(exchange)
            body = await self._read(exchange, header)
            if exchange.path == PING and exchange.method == "GET":
                await self._pong(exchange, header, key)
                return
            if route is None:
                raise Trouble(404, None, "not found")
            if exchange.method not in route.methods:
                raise Trouble(405, None, "method not allowed")
            chosen = self._choose(route, body)
            async with until_gone(exchange):
                await self._serve(exchange, route, body, chosen)
        except Trouble as trouble:
            await answer_trouble(exchange, dialect, trouble)

    def _signed(self, exchange: Exchange) -> tuple[auth.AuthHeader, bytes]:
        """The head alone decides whether a byte of the body is read."""
        try:
            header = auth.parse_auth((exchange.header(auth.HEADER) or b"").decode("latin-1"))
        except auth.AuthError as error:
            raise Trouble(error.status, "auth", str(error)) from error
        key = self._key_for(header.key_id)
        method, target = exchange.method, exchange.target
        if key is None or not auth.mac_ok(key, header, direction="call", method=method, target=target):
            raise Trouble(401, "auth", "the call is not signed by this node's router")
        return header, key

    async def _read(self, exchange: Exchange, header: auth.AuthHeader) -> bytes:
        try:
            body = await exchange.read_body(MAX_BODY_BYTES)
        except BodyTooLarge as error:
            raise Trouble(413, None, str(error)) from error
        if len(body) > _HASH_IN_THREAD_BYTES:
            found = await asyncio.to_thread(auth.body_hash, body)
        else:
            found = auth.body_hash(body)
        if found != header.body_sha256:
            raise Trouble(401, "auth", "the body is not the one that was signed")
        refusal = self._gate.check_and_accept(header)
        if refusal is not None:
            word = "stale" if refusal.status == 409 else "boot"
            raise Trouble(refusal.status, word, refusal.reason)
        return body

    async def _pong(self, exchange: Exchange, header: auth.AuthHeader, key: bytes) -> None:
        body = orjson.dumps({"node_id": self._node_id, "agent_id": self._agent_id, "boot": self._boot})
        signature = auth.sign(
            key,
            direction="reply",
            method=exchange.method,
            target=exchange.target,
            key_id=header.key_id,
            sender_boot=self._boot,
            receiver_boot=header.sender_boot,
            seq=header.seq,
            body_sha256=auth.body_hash(body),
        )
        headers = [(b"content-type", JSON), (auth.HEADER, signature.encode())]
        await exchange.respond(200, headers, body)
        self._on_ping()

    def _choose(self, route: Route, body: bytes) -> Chosen:
        fields = _parse(body)
        as_written = fields.get("model")
        if as_written is None and route.kind == "show":
            as_written = fields.get("name")  # Ollama's older field
        if not isinstance(as_written, str) or not as_written:
            raise Trouble(400, None, "model is required")
        name = canonical(as_written)
        ready_first = sorted(self._backends(), key=lambda backend: not backend.reading.ready)
        for backend in ready_first:
            # one that is not ready may know its models only from before
            model = backend.model(name) or _listed(backend, name)
            if model is None:
                continue
            if not backend.reading.ready:
                raise Trouble(503, "not-ready", f"the backend of model '{as_written}' is not ready")
            return Chosen(backend, model, name, as_written, fields)
        if not any(backend.reading.ready for backend in ready_first):
            raise Trouble(503, "not-ready", "no backend of this node is ready")
        raise Trouble(404, "no-model", f"model '{as_written}' not found")

    async def _serve(self, exchange: Exchange, route: Route, body: bytes, chosen: Chosen) -> None:
        if route.kind not in _TAKES_A_SLOT:
            await self._carry(exchange, route, body, chosen)
            return
        if self.draining:
            raise Trouble(503, "busy", f"node '{self._node_id}' is shutting down", retry_after_s=2)
        model = chosen.model
        runner = (chosen.backend.id, model.weights or canonical(model.name))
        # The last guard: one more than the slots, because a router may hear of a freed slot before we do.
        if self.calls.on_runner(runner) > (model.slots or 1):
            raise Trouble(503, "busy", f"all slots of model '{model.name}' are taken", retry_after_s=1)
        with self.calls.one(model.name, runner):
            if chosen.backend.kind == "ollama" and _wants_the_model_loaded(route, chosen):
                await self._load(chosen)
            await self._carry(exchange, route, body, chosen)

    async def _load(self, chosen: Chosen) -> None:
        """The agent's own load: Ollama aborts one whose client leaves, so no caller may be that client."""
        options = chosen.fields.get("options")
        wanted = dict(options) if isinstance(options, dict) else {}
        if "shift" in chosen.fields:
            wanted["shift"] = chosen.fields["shift"]
        try:
            await chosen.backend.ensure_loaded(chosen.name, wanted)
        except LoadFailed as error:
            raise Trouble(error.status, None, error.message) from error

    async def _carry(self, exchange: Exchange, route: Route, body: bytes, chosen: Chosen) -> None:
        backend = chosen.backend
        if route.dialect in backend.native:
            await self._relay.forward(exchange, backend, route, _with_own_id(body, chosen))
            return
        facts = backend.facts(chosen.name)
        if facts is None:  # it went between choosing and now
            raise Trouble(404, "no-model", f"model '{chosen.as_written}' not found")
        try:
            made = translate(route.path, body, ModelFacts(**facts._asdict()), wall_s=self._clock.wall_s())
        except Refusal as refusal:
            raise Trouble(refusal.status, None, refusal.message) from refusal
        if isinstance(made, Answer):
            await exchange.respond(made.status, [(b"content-type", made.content_type)], made.body)
        else:
            await self._relay.translate(exchange, backend, made)


def _parse(body: bytes) -> dict[str, object]:
    """Two fields `model` would let us choose by one and the backend answer by the other."""
    try:
        fields = orjson.loads(body)
        if not isinstance(fields, dict):
            raise Trouble(400, None, "the request body must be a JSON object")
        find_top_level(body, "model")
    except orjson.JSONDecodeError as error:
        raise Trouble(400, None, f"the request body is not valid JSON: {error}") from error
    except JsonEditError as error:
        raise Trouble(400, None, str(error)) from error
    return fields


def _listed(backend: Backend, name: str) -> Model | None:
    return next((model for model in backend.reading.models if canonical(model.name) == name), None)


def _with_own_id(body: bytes, chosen: Chosen) -> bytes:
    """The backend's own id in place of the caller's spelling.

    Ollama is left alone: it compares names as we do, and its answers echo what the caller wrote.
    """
    own = chosen.backend.upstream_model(chosen.name)
    if chosen.backend.kind == "ollama" or own is None or own == chosen.as_written:
        return body
    span = find_top_level(body, "model")
    return body if span is None else replace_span(body, span, json_string(own))


def _wants_the_model_loaded(route: Route, chosen: Chosen) -> bool:
    """Not for a model that runs elsewhere, nor for a request that only unloads."""
    if chosen.name.endswith((":cloud", "-cloud")):
        return False
    fields = chosen.fields
    empty = route.path in ("/api/generate", "/api/chat") and not (
        fields.get("prompt") or fields.get("messages")
    )
    return not (empty and fields.get("keep_alive") in (0, "0", "0s", "0m", "0h"))
