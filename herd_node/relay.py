"""One admitted call carried to a backend and its answer carried back, byte for byte or translated.

The relay never retries (the pool's R-6 apart), never follows a redirect, never invents an end: an answer that
the backend cut short is cut here too, so that the router sees it. Deadlines are the router's; when it leaves,
the backend's connection is cut at once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import orjson

from herd_node.backends.base import Backend
from herd_node.net.copying import copy_body
from herd_node.net.exchange import Exchange
from herd_node.net.outbox import Outbox
from herd_node.net.pool import (
    BadResponse,
    HeadTimeout,
    NotConnected,
    Pool,
    PoolError,
    Upstream,
)
from herd_node.protocol.forms import Body
from herd_node.protocol.framing import FramingError, Records
from herd_node.protocol.routes import Dialect, Route
from herd_node.runtime.chance import new_hex
from herd_node.runtime.clock import Clock
from herd_node.translate import Call, Question, Truncated, honest_error, openings

T = TypeVar("T")

JSON = b"application/json; charset=utf-8"
#: llama-server closes idle connections after 5 s, so this side closes first; Ollama keeps them for minutes.
LLAMA_IDLE_S = 3.0
OLLAMA_IDLE_S = 75.0
MESSAGES = "/v1/messages"
_MAX_ERROR_BYTES = 1024 * 1024
_MAX_WHOLE_BYTES = 64 * 1024 * 1024
_FORWARDED_HEADERS = frozenset({b"accept", b"x-request-id", b"anthropic-version", b"anthropic-beta"})
_RETURNED_HEADERS = (b"content-type", b"content-length", b"retry-after")
#: Behind a stream they close the connection that they have promised to keep.
_CLOSE_BEHIND_STREAMS = frozenset({"llama-server", "llama-router"})


class Trouble(Exception):
    """An answer of the agent's own. `word` goes into X-Herd-Error; None for the caller's mistakes."""

    def __init__(
        self, status: int, word: str | None, message: str, *, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.word = word
        self.message = message
        self.retry_after_s = retry_after_s


async def answer_trouble(exchange: Exchange, dialect: Dialect, trouble: Trouble) -> None:
    """Say it in the caller's dialect; when the answer has begun, all that is left is to cut it."""
    if exchange.started:
        exchange.abort()
        return
    headers = [(b"content-type", JSON)]
    if trouble.word is not None:
        headers.append((b"x-herd-error", trouble.word.encode()))
    if trouble.retry_after_s is not None:
        headers.append((b"retry-after", str(trouble.retry_after_s).encode()))
    await exchange.respond(trouble.status, headers, error_body(dialect, trouble.status, trouble.message))


def error_body(dialect: Dialect, status: int, message: str) -> bytes:
    """The sentence in the caller's dialect."""
    if dialect == "ollama":
        return orjson.dumps({"error": message})
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    if dialect == "anthropic":
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}})
    return orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": None}})


class Relay:
    """Owns the connections to the backends. `on_trouble` hears of one that did not answer as it should."""

    def __init__(self, clock: Clock, on_trouble: Callable[[], None], outbox: Outbox | None = None) -> None:
        self._clock = clock
        self._on_trouble = on_trouble
        self._llama_pool = Pool(idle_s=LLAMA_IDLE_S, outbox=outbox)
        self._ollama_pool = Pool(idle_s=OLLAMA_IDLE_S, outbox=outbox)

    async def close(self) -> None:
        await self._llama_pool.close()
        await self._ollama_pool.close()

    async def forward(self, exchange: Exchange, backend: Backend, route: Route, body: Body) -> None:
        """The backend speaks the caller's dialect: bytes in, bytes out. Raises Trouble, ClientGone."""
        upstream = await self._send(exchange, backend, route.path, body)
        try:
            if upstream.status >= 500:
                await self._forward_error(exchange, backend, upstream)
            elif upstream.ended and _has_length(upstream):  # it came together with its head
                whole = await upstream.read()
                await exchange.respond(upstream.status, _returned(upstream, with_length=False), whole)
            else:
                await exchange.start(upstream.status, _returned(upstream, with_length=True))
                if route.path == MESSAGES and backend.kind != "ollama" and _is_event_stream(upstream):
                    await _send_opening(exchange, upstream, body)
                await copy_body(upstream, exchange)
        except PoolError as error:
            raise self._trouble(error) from error
        finally:
            upstream.close()

    async def translate(self, exchange: Exchange, backend: Backend, call: Call) -> None:
        """The backend has other words than the caller's: `call.reader` turns them round.

        Raises Trouble, ClientGone.
        """
        began_s = self._clock.now_s()
        upstream = await self._send(exchange, backend, call.path, call.body)
        try:
            if call.sse and upstream.status == 200 and _is_event_stream(upstream):
                await self._translate_events(exchange, backend, upstream, call, began_s)
                return
            whole = await upstream.read_all(_MAX_WHOLE_BYTES)
            elapsed_s = self._clock.now_s() - began_s
            status, body = call.reader.whole(upstream.status, whole, elapsed_s=elapsed_s)
            if status >= 500:
                self._on_trouble()
            if 300 <= upstream.status < 400:
                status = upstream.status  # never followed, and not to be tried on another node either
            await exchange.respond(status, _json_headers(upstream), body)
        except PoolError as error:
            raise self._trouble(error) from error
        except Truncated as error:
            raise Trouble(502, "reset", str(error)) from error
        except FramingError as error:
            raise Trouble(502, "framing", str(error)) from error
        finally:
            upstream.close()

    async def ask(self, exchange: Exchange, backend: Backend, question: Question[T]) -> T:
        """One small question after the other, and what they led to. Raises Trouble, ClientGone."""
        made: T | Question[T] = question
        while isinstance(made, Question):
            upstream = await self._send(exchange, backend, made.path, made.body)
            try:
                whole = await upstream.read_all(_MAX_WHOLE_BYTES)
            except PoolError as error:
                raise self._trouble(error) from error
            finally:
                upstream.close()
            if upstream.status == 503:
                raise Trouble(503, "not-ready", "the backend is not ready")
            made = made.then(upstream.status, whole)
        return made

    async def _translate_events(
        self, exchange: Exchange, backend: Backend, upstream: Upstream, call: Call, began_s: float
    ) -> None:
        records, reader, clock = Records("sse"), call.reader, self._clock
        whole: list[bytes] = []
        while piece := await upstream.read():
            wall_s, elapsed_s = clock.wall_s(), clock.now_s() - began_s
            made: list[bytes] = []
            broken: Truncated | None = None
            try:
                for one in records.feed(piece):
                    made.append(reader.feed(one, wall_s=wall_s, elapsed_s=elapsed_s))
            except Truncated as error:
                broken = error  # what came before it in the same read still goes out
            if (out := b"".join(made)) and call.stream:
                if not exchange.started:
                    await exchange.start(reader.status, [(b"content-type", _type_of(call))])
                await exchange.send(out)
            elif out:
                whole.append(out)
            if broken is not None:
                raise broken
        if (question := reader.question()) is not None:
            with suppress(Trouble):  # the answer is there; only what would have been added is missing
                await self.ask(exchange, backend, question)
        whole.append(reader.end(elapsed_s=clock.now_s() - began_s, wall_s=clock.wall_s()))
        if exchange.started:
            await exchange.finish(b"".join(whole))
        else:
            await exchange.respond(reader.status, [(b"content-type", _type_of(call))], b"".join(whole))

    async def _send(self, exchange: Exchange, backend: Backend, path: str, body: Body) -> Upstream:
        headers = [
            (b"content-type", exchange.header(b"content-type") or b"application/json"),
            *backend.headers,
        ]
        headers += [field for field in exchange.headers if field[0] in _FORWARDED_HEADERS]
        pool = self._ollama_pool if backend.kind == "ollama" else self._llama_pool
        try:
            upstream = await pool.request(backend.origin, "POST", path, lambda: headers, body)
        except PoolError as error:
            raise self._trouble(error) from error
        if backend.kind in _CLOSE_BEHIND_STREAMS and _is_event_stream(upstream):
            upstream.no_reuse()
        return upstream

    async def _forward_error(self, exchange: Exchange, backend: Backend, upstream: Upstream) -> None:
        """Some of the client's mistakes are 500s there; as 400s they are not tried on every node."""
        body = await upstream.read_all(_MAX_ERROR_BYTES)
        status, body = honest_error(backend.kind or "", upstream.status, body)
        if status >= 500:
            self._on_trouble()
        await exchange.respond(status, _returned(upstream, with_length=False), body)

    def _trouble(self, error: PoolError) -> Trouble:
        """What a failed exchange with the backend is called. The sentence names no address."""
        match error:
            case NotConnected():
                self._on_trouble()
                return Trouble(503, "refused", f"the backend cannot be reached: {error}")
            case HeadTimeout():
                return Trouble(504, "timeout", f"the backend: {error}")
            case BadResponse():
                return Trouble(502, "framing", f"the backend: {error}")
        self._on_trouble()
        return Trouble(502, "reset", f"the backend: {error}")


async def _send_opening(exchange: Exchange, upstream: Upstream, body: Body) -> None:
    """Pings, and the first piece of the stream, with the event that a llama-server may have forgotten."""
    while piece := await upstream.read():
        at = openings.behind_pings(piece)
        if openings.lacks_opening(piece, at):
            model = str(orjson.loads(body[:]).get("model"))
            piece = piece[:at] + openings.message_start(model, f"msg_{new_hex(12)}") + piece[at:]
        await exchange.send(piece)
        if at < len(piece):
            return


def _returned(upstream: Upstream, *, with_length: bool) -> list[tuple[bytes, bytes]]:
    return [
        (name, value)
        for name, value in upstream.headers
        if name in _RETURNED_HEADERS and (with_length or name != b"content-length")
    ]


def _json_headers(upstream: Upstream) -> list[tuple[bytes, bytes]]:
    retry = upstream.header(b"retry-after")
    return [(b"content-type", JSON), *([(b"retry-after", retry)] if retry is not None else [])]


def _is_event_stream(upstream: Upstream) -> bool:
    return (upstream.header(b"content-type") or b"").startswith(b"text/event-stream")


def _has_length(upstream: Upstream) -> bool:
    return upstream.header(b"content-length") is not None and not _is_event_stream(upstream)


def _type_of(call: Call) -> bytes:
    """An error as the first record is one JSON object, whatever was asked for."""
    return call.content_type if call.reader.status == 200 else JSON
