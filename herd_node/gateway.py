"""The signed front door of the node: admits its router's calls and nothing else, and counts what runs.

Decision, in this order (docs/protocol.md §2, §4):
1. signature: the mac from the head, before a byte of body is read             400, 401, 426 `auth`
2. the body's hash, then boots and sequence                                    401 `auth`/`boot`, 409 `stale`
3. `/herd/v1/ping`: the signed answer
4. the allow-list, made of the shared rows of the route table                  404, 405
5. the model: one parse, no second `model`; the first backend that serves it   400, 404 `no-model`
6. the backend is ready, we are not draining, a slot (+ 1) is free             503 `not-ready`, `busy`
7. an endpoint that not every backend has is there                             501
8. forward, or translate where the backend lacks the dialect
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson

from herd_node.backends.base import Backend, LoadFailed
from herd_node.management import Management
from herd_node.net.exchange import BodyTooLarge, Exchange
from herd_node.net.leaving import UntilGone
from herd_node.net.uploads import read_upload, release
from herd_node.protocol import auth
from herd_node.protocol.forms import Body, FormError, read_form
from herd_node.protocol.jsonedit import JsonEditError, find_top_level, json_string, refuse_twins, replace_span
from herd_node.protocol.names import canonical
from herd_node.protocol.routes import ENDPOINT_BY_PATH, FORWARDED_BY_PATH, Dialect, Route, managing
from herd_node.protocol.wire import Model
from herd_node.relay import JSON, Relay, Trouble, answer_trouble
from herd_node.runtime.clock import Clock
from herd_node.runtime.tasks import Tasks
from herd_node.translate import Answer, Call, ModelFacts, Question, Refusal, fold, reclassify, translate

log = logging.getLogger(__name__)

PING = "/herd/v1/ping"
#: The router has its own, smaller limit; this one only bounds what a holder of the key can make us keep.
MAX_BODY_BYTES = 256 * 1024 * 1024
_HASH_IN_THREAD_BYTES = 256 * 1024
#: Long enough for two beats: the router believes only one that was written after the hang-up was heard.
_LATELY_S = 15.0
_TAKES_A_SLOT = frozenset(
    {"chat", "completion", "generate", "embedding", "responses", "rerank", "transcription", "image"}
)


#: A model that was loaded already takes no time worth telling.
_LEAST_LOAD_S = 0.001
#: How a WebP file begins in base64.
_WEBP = b"UklGR"
#: They finish an answer whose caller has left, unless they were streaming it: so they always stream.
_GOES_ON_ALONE = frozenset({"llama-server", "llama-router"})


Runner = tuple[str, str]
"""Backend id and weights (or name)."""


@dataclass(slots=True, eq=False)
class Live:
    """A call that runs, equal to itself only. `runner` is what its slot belongs to: entries with the same
    weights share one."""

    model: str
    runner: Runner


class Calls:
    """The calls that run now, as sets: every count is a `len()`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._by_runner: dict[Runner, set[Live]] = {}
        self._ended_s: dict[str, float] = {}
        self.loading: set[Live] = set()
        """Those that wait for their model to be loaded."""
        self._waiting: dict[Runner, list[asyncio.Future[None]]] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return sum(map(len, self._by_runner.values()))

    def by_model(self) -> dict[str, int]:
        return dict(sorted(Counter(call.model for live in self._by_runner.values() for call in live).items()))

    def on_runner(self, runner: Runner) -> int:
        return len(self._by_runner.get(runner, ()))

    def ran_lately(self, backend_id: str) -> bool:
        """Something runs there, or did a moment ago: a backend does not hear of a hang-up at once."""
        if any(runner[0] == backend_id for runner in self._by_runner):
            return True
        ended_s = self._ended_s.get(backend_id)
        return ended_s is not None and self._clock.now_s() - ended_s < _LATELY_S

    async def until_idle(self) -> None:
        await self._idle.wait()

    async def until_unused(self, runner: Runner) -> None:
        """Until no call runs on it; those that wait for their model to be loaded do not run yet."""
        while not self._by_runner.get(runner, set()) <= self.loading:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(runner, []).append(waiter)
            await waiter

    def begin(self, model: str, runner: Runner) -> Live:
        """One more; `end` it in a `finally`."""
        call = Live(model, runner)
        self._by_runner.setdefault(runner, set()).add(call)
        self._idle.clear()
        return call

    def end(self, call: Live) -> None:
        live = self._by_runner[call.runner]
        live.discard(call)
        self._ended_s[call.runner[0]] = self._clock.now_s()
        if not live:
            del self._by_runner[call.runner]
        for waiter in self._waiting.pop(call.runner, ()):
            if not waiter.done():
                waiter.set_result(None)
        if not self._by_runner:
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
    form_span: tuple[int, int] | None = None
    """Where the model's name stands in a form."""


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
        tasks: Tasks,
        on_ping: Callable[[], None] = lambda: None,
        spool_folder: Path | None = None,
    ) -> None:
        self.calls = Calls(clock)
        self._on_ping = on_ping
        self.draining = False
        self._node_id, self._agent_id, self._boot = node_id, agent_id, boot
        self._gate = gate
        self._heads = auth.CallHeads(key_for)
        self._backends = backends
        self._relay = relay
        self._clock = clock
        self._tasks = tasks
        self._management = Management(backends, lambda: self.draining, spool_folder)

    async def handle(self, exchange: Exchange) -> None:
        """Answer one request. Raises ClientGone."""
        route = FORWARDED_BY_PATH.get(exchange.path)
        verb = managing(exchange.path) if route is None else None
        body: Body = b""
        dialect: Dialect = "ollama" if verb is not None else route.dialect if route is not None else "openai"
        try:
            header, key = self._signed(exchange)
            if verb is not None:
                await self._management.serve(exchange, verb, lambda found: self._accept(header, found))
                return
            body = await self._read(exchange, header, route)
            if exchange.path == PING and exchange.method == "GET":
                await self._pong(exchange, header, key)
                return
            if route is None:
                raise Trouble(404, None, "not found")
            if exchange.method not in route.methods:
                raise Trouble(405, None, "method not allowed")
            chosen = self._choose(exchange, route, body)
            with UntilGone(exchange):
                await self._serve(exchange, route, body, chosen)
        except Trouble as trouble:
            await answer_trouble(exchange, dialect, trouble)
        finally:
            release(body)

    def _signed(self, exchange: Exchange) -> tuple[auth.AuthHeader, bytes]:
        """The head alone decides whether a byte of the body is read."""
        value = (exchange.header(auth.HEADER) or b"").decode("latin-1")
        try:
            signed = self._heads.read(value, exchange.method, exchange.target)
        except auth.AuthError as error:
            raise Trouble(error.status, "auth", str(error)) from error
        if signed is None:
            raise Trouble(401, "auth", "the call is not signed by this node's router")
        return signed

    async def _read(self, exchange: Exchange, header: auth.AuthHeader, route: Route | None) -> Body:
        body: Body
        try:
            if route is not None and route.body == "spooled":
                body = await read_upload(exchange, MAX_BODY_BYTES)
            else:
                body = await exchange.read_body(MAX_BODY_BYTES)
        except BodyTooLarge as error:
            raise Trouble(413, None, str(error)) from error
        if len(body) > _HASH_IN_THREAD_BYTES:
            found = await asyncio.to_thread(auth.body_hash, body)
        else:
            found = auth.body_hash(body)
        self._accept(header, found)
        return body

    def _accept(self, header: auth.AuthHeader, found: str) -> None:
        """`found` is the hash of the body that came; the call's number is used up when all is well."""
        if found != header.body_sha256:
            raise Trouble(401, "auth", "the body is not the one that was signed")
        refusal = self._gate.check_and_accept(header)
        if refusal is not None:
            word = "stale" if refusal.status == 409 else "boot"
            raise Trouble(refusal.status, word, refusal.reason)

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

    def _choose(self, exchange: Exchange, route: Route, body: Body) -> Chosen:
        span = None
        if route.model_at == "form":
            fields, span = _parse_form(exchange, body)
        else:
            fields = _parse(body[:])
        as_written = fields.get("model")
        if as_written is None and route.kind == "show":
            as_written = fields.get("name")  # Ollama's older field
        if not isinstance(as_written, str) or not as_written:
            raise Trouble(400, None, "model is required")
        name = canonical(as_written)
        backends = self._backends()
        for backend in backends:
            if backend.reading.ready and (model := backend.model(name) or _listed(backend, name)) is not None:
                return Chosen(backend, model, name, as_written, fields, span)
        raise _not_served(backends, name, as_written)

    async def _serve(self, exchange: Exchange, route: Route, body: Body, chosen: Chosen) -> None:
        if route.kind not in _TAKES_A_SLOT:
            if route.kind == "count" and "load" in chosen.backend.manager.offers:
                await self._load(chosen, route)  # another model would count otherwise
            await self._carry(exchange, route, body, chosen)
            return
        if self.draining:
            raise Trouble(503, "busy", f"node '{self._node_id}' is shutting down", retry_after_s=2)
        model = chosen.model
        runner = (chosen.backend.id, model.weights or canonical(model.name))
        # The last guard: one more than the slots, because a router may hear of a freed slot before we do.
        if self.calls.on_runner(runner) > (model.slots or 1):
            raise Trouble(503, "busy", f"all slots of model '{model.name}' are taken", retry_after_s=1)
        call, load_s, unload = self.calls.begin(model.name, runner), 0.0, False
        try:
            if "load" in chosen.backend.manager.offers and _wants_the_model_loaded(route, chosen):
                began_s = self._clock.now_s()
                self.calls.loading.add(call)
                try:
                    await self._load(chosen, route)
                finally:
                    self.calls.loading.discard(call)
                load_s = self._clock.now_s() - began_s
            unload = await self._carry(exchange, route, body, chosen, load_s=load_s)
        finally:
            self.calls.end(call)
        if unload:  # it waits until nothing runs on the model, so nobody waits for it
            self._tasks.spawn(self._unload(chosen), name=f"unload {model.name}")

    async def _load(self, chosen: Chosen, route: Route) -> None:
        """The agent's own load: Ollama aborts one whose client leaves, so no caller may be that client.

        Only its own dialect has options that decide about it; in the others it ignores them.
        """
        fields = chosen.fields if route.dialect == "ollama" else {}
        options = fields.get("options")
        wanted = dict(options) if isinstance(options, dict) else {}
        if "shift" in fields:
            wanted["shift"] = fields["shift"]
        try:
            await chosen.backend.ensure_loaded(chosen.name, wanted)
        except LoadFailed as error:
            status = reclassify(chosen.backend.kind or "", error.status, error.message.encode())
            raise Trouble(status, None, error.message) from error

    async def _unload(self, chosen: Chosen) -> None:
        try:
            await chosen.backend.unload(chosen.name)
        except LoadFailed as error:
            log.info("%s: %s", chosen.backend.id, error.message)

    async def _carry(
        self, exchange: Exchange, route: Route, body: Body, chosen: Chosen, *, load_s: float = 0.0
    ) -> bool:
        """Whether the caller wants the model unloaded when this is over."""
        backend = chosen.backend
        endpoint = ENDPOINT_BY_PATH.get(route.path)
        if endpoint is not None and endpoint not in backend.reading.endpoints:
            raise Trouble(501, None, f"the backend of model '{chosen.as_written}' does not offer {endpoint}")
        if endpoint is not None or route.dialect in backend.native:
            body = _with_own_id(body, chosen)
            goes_on = backend.kind in _GOES_ON_ALONE and chosen.form_span is None
            folded = fold(route.path, body[:], chosen.fields) if goes_on else None
            if folded is not None:
                await self._relay.translate(exchange, backend, folded)
            else:
                await self._relay.forward(exchange, backend, route, body)
            return False
        made = await self._translated(exchange, route, body, chosen)
        if isinstance(made, Answer):
            await exchange.respond(made.status, [(b"content-type", made.content_type)], made.body)
        else:
            made.reader.load_s = load_s if load_s >= _LEAST_LOAD_S else 0.0
            await self._relay.translate(exchange, backend, made)
        return made.unload

    async def _translated(
        self, exchange: Exchange, route: Route, body: Body, chosen: Chosen
    ) -> Call | Answer:
        backend = chosen.backend
        facts = backend.facts(chosen.name)
        if facts is None:  # it went between choosing and now
            raise Trouble(404, "no-model", f"model '{chosen.as_written}' not found")
        known = ModelFacts(
            **facts._asdict(),
            flavour="openai" if backend.kind == "openai" else "llama.cpp",
            unloads="unload" in backend.manager.offers,
        )
        wall_s = self._clock.wall_s()
        try:
            if len(body) > _HASH_IN_THREAD_BYTES or _WEBP in body:  # pictures may have to be decoded
                made = await asyncio.to_thread(translate, route.path, body[:], known, wall_s=wall_s)
            else:
                made = translate(route.path, body[:], known, wall_s=wall_s)
            return await self._relay.ask(exchange, backend, made) if isinstance(made, Question) else made
        except Refusal as refusal:
            raise Trouble(refusal.status, None, refusal.message) from refusal


def _parse_form(exchange: Exchange, body: Body) -> tuple[dict[str, object], tuple[int, int] | None]:
    """The form's fields that are no files, and where the model's name stands."""
    try:
        form = read_form(exchange.header(b"content-type") or b"", body)
    except FormError as error:
        raise Trouble(400, None, str(error)) from error
    model = form.fields.get("model")
    fields: dict[str, object] = {name: field.value for name, field in form.fields.items()}
    return fields, None if model is None else (model.start, model.end)


def _parse(body: bytes) -> dict[str, object]:
    """Two fields `model` would let us choose by one and the backend answer by the other."""
    try:
        fields = orjson.loads(body)
        if not isinstance(fields, dict):
            raise Trouble(400, None, "the request body must be a JSON object")
        refuse_twins(body, [name.casefold() for name in fields if name != "model"], "model")
    except orjson.JSONDecodeError as error:
        raise Trouble(400, None, f"the request body is not valid JSON: {error}") from error
    except JsonEditError as error:
        raise Trouble(400, None, str(error)) from error
    return fields


def _not_served(backends: Sequence[Backend], name: str, as_written: str) -> Trouble:
    """Why none of them serves it now; one that is not ready may know its models only from before."""
    not_ready = [backend for backend in backends if not backend.reading.ready]
    if any(backend.model(name) or _listed(backend, name) for backend in not_ready):
        return Trouble(503, "not-ready", f"the backend of model '{as_written}' is not ready")
    if len(not_ready) == len(backends):
        return Trouble(503, "not-ready", "no backend of this node is ready")
    return Trouble(404, "no-model", f"model '{as_written}' not found")


def _listed(backend: Backend, name: str) -> Model | None:
    return next((model for model in backend.reading.models if canonical(model.name) == name), None)


def _with_own_id(body: Body, chosen: Chosen) -> Body:
    """The backend's own id in place of the caller's spelling.

    Ollama is left alone: it compares names as we do, and its answers echo what the caller wrote.
    """
    own = chosen.backend.upstream_model(chosen.name)
    if chosen.backend.kind == "ollama" or own is None or own == chosen.as_written:
        return body
    if chosen.form_span is not None:
        start, end = chosen.form_span
        return body[:start] + own.encode() + body[end:]
    text = body[:]
    span = find_top_level(text, "model")
    return text if span is None else replace_span(text, span, json_string(own))


def _wants_the_model_loaded(route: Route, chosen: Chosen) -> bool:
    """Not for a model that runs elsewhere, nor for a request that only unloads."""
    if chosen.name.endswith((":cloud", "-cloud")):
        return False
    fields = chosen.fields
    empty = route.path in ("/api/generate", "/api/chat") and not (
        fields.get("prompt") or fields.get("messages")
    )
    return not (empty and fields.get("keep_alive") in (0, "0", "0s", "0m", "0h"))
