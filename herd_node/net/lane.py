"""`Exchange` straight on uvicorn's protocol class: the lane, for the requests that the project exists for.

It leaves out what ASGI costs: scope, messages, the route table, a task that watches the client. It takes a
plain POST to one of its paths while nothing else runs on the connection; all else goes on to ASGI, where the
same handlers stand. So it may refuse nothing and protect nothing: whatever protects is in the handlers.

A request's exchange stands in for uvicorn's `cycle`, so drain, hang-up, pipelining and keep-alive stay
uvicorn's. What is used of it is pinned by tests/net/test_uvicorn_contract.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from herd_node.net.exchange import BodyTooLarge, ClientGone, ExchangeError, Handler, Headers

_log = logging.getLogger(__name__)

#: Expect and Upgrade are conversations; a body without a length is counted while it comes. Not for the lane.
_NOT_PLAIN = frozenset({b"expect", b"upgrade", b"transfer-encoding"})
_NO_BODY = (204, 304)
#: Up to here a body is joined to what stands before it: one write. A longer one is not copied.
_ONE_WRITE_BYTES = 64 * 1024
#: After a cut, so long for what was written before to leave: a client that reads nothing would keep it.
_LINGER_S = 5.0


def lane_protocol(routes: Mapping[str, Handler], max_body_bytes: int) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn's `http=`. POSTs to the paths of `routes`, with a body up to the limit, go
    to these handlers; everything else to the server's ASGI application, where the same should stand."""

    class Lane(_Lane):
        routes_by_url: ClassVar = {path.encode(): (path, handler) for path, handler in routes.items()}
        most_bytes: ClassVar = max_body_bytes

    return Lane


class _Lane(HttpToolsProtocol):
    """One connection of a client."""

    routes_by_url: ClassVar[dict[bytes, tuple[str, Handler]]]
    most_bytes: ClassVar[int]
    _latest: LaneExchange | None = None

    def on_message_begin(self) -> None:
        self.url, self.headers, self.expect_100_continue = b"", [], False  # no scope: most need none

    def on_headers_complete(self) -> None:
        found = self.routes_by_url.get(self.url.partition(b"?")[0])
        length = self._plain_length() if found is not None else None
        if found is None or length is None:
            self._go_on_to_asgi()
            return
        path, handler = found
        old = self.parser.get_http_version() == "1.0"
        keep_alive = not old and self.parser.should_keep_alive()
        request = _Request(path, self.url.decode("latin-1"), self.headers, length, keep_alive, not old)
        exchange = LaneExchange(self, request)
        self.cycle = self._latest = exchange  # type: ignore[assignment]
        task = self.loop.create_task(exchange.run(handler), name=path)
        self.tasks.add(task)  # uvicorn's: a graceful stop waits for them, a forced one cancels them
        task.add_done_callback(self.tasks.discard)

    def on_body(self, body: bytes) -> None:
        exchange = self._latest
        if exchange is not None and exchange is self.cycle:
            exchange.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        exchange = self._latest
        if exchange is not None and exchange is self.cycle:
            exchange.fed()
        else:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._latest is not None:
            self._latest.leave()

    def _plain_length(self) -> int | None:
        """The length of the body if this is a request for the lane."""
        if self.parser.get_method() != b"POST" or not (self.cycle is None or self.cycle.response_complete):
            return None
        length = None
        for name, value in self.headers:
            if name in _NOT_PLAIN:
                return None
            if name == b"content-length":
                length = int(value)  # llhttp has made sure that it is one number, and the only one
        return length if length is not None and length <= self.most_bytes else None

    def _go_on_to_asgi(self) -> None:
        """What `on_message_begin` left out, then what uvicorn does."""
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)  # the list that the scope holds
        super().on_headers_complete()


class _Request(NamedTuple):
    path: str
    target: str
    headers: Headers
    content_length: int
    keep_alive: bool
    chunks: bool
    """The client knows chunked bodies: not HTTP/1.0."""


class _Unheard:
    """uvicorn's cycle has an event that wakes its reader; the lane has a future of its own."""

    def set(self) -> None:
        return


class LaneExchange:
    """See `Exchange`, and uvicorn's RequestResponseCycle for the first four attributes."""

    __slots__ = (
        "_buffered_bytes",
        "_callbacks",
        "_chunks",
        "_cut",
        "_head",
        "_lane",
        "_left_bytes",
        "_pieces",
        "_waiter",
        "_whole",
        "content_length",
        "disconnected",
        "gone",
        "headers",
        "keep_alive",
        "path",
        "peer",
        "response_complete",
        "started",
        "target",
    )
    message_event = _Unheard()
    method = "POST"

    def __init__(self, lane: _Lane, request: _Request) -> None:
        self.path, self.target, self.headers, length, self.keep_alive, self._chunks = request
        self.content_length: int | None = length
        self.peer = lane.client[0].removeprefix("::ffff:") if lane.client else ""
        self.response_complete = self.disconnected = False
        self.started = self.gone = self._cut = self._whole = False
        self._lane = lane
        self._head = b""
        self._left_bytes: int | None = None
        """Of the answer, as its content-length says; None where it does not."""
        self._pieces: list[bytes] = []
        self._buffered_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._callbacks: list[Callable[[], None]] = []

    async def run(self, handler: Handler) -> None:
        """The request's task."""
        try:
            await handler(self)
            if not (self.response_complete or self._cut or self.gone):
                raise ExchangeError("the handler returned without ending its answer")
        except ClientGone:
            pass  # nobody is left to answer
        except Exception:
            _log.exception("error in the handler of %s", self.path)
            if not self.started:
                with suppress(ClientGone):
                    await self.respond(500, [(b"connection", b"close")], b"Internal Server Error")
        finally:
            if not self.response_complete:
                self._close()

    # --- the request --------------------------------------------------------------------------------------

    def header(self, name: bytes) -> bytes | None:
        for key, value in self.headers:
            if key == name:
                return value
        return None

    async def read_body(self, limit_bytes: int) -> bytes:
        if self.content_length is not None and self.content_length > limit_bytes:
            raise BodyTooLarge(limit_bytes)
        if not self._whole and not self.gone:
            self._waiter = self._lane.loop.create_future()
            self._lane.flow.resume_reading()
            await self._waiter
        if self.gone:
            raise ClientGone("the client left before its request was read")
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def on_gone(self, callback: Callable[[], None]) -> None:
        if self.gone:
            callback()
        else:
            self._callbacks.append(callback)

    # --- called by the connection -------------------------------------------------------------------------

    def feed(self, piece: bytes) -> None:
        if self.response_complete:
            return  # the rest of a request that has been answered
        self._pieces.append(piece)
        self._buffered_bytes += len(piece)
        if self._waiter is None and self._buffered_bytes > HIGH_WATER_LIMIT:
            self._lane.flow.pause_reading()  # nobody has asked for it yet

    def fed(self) -> None:
        self._whole = True
        self._wake()

    def leave(self) -> None:
        """The connection is lost. Whoever leaves after the end has got everything."""
        if self.gone or self._cut or self.response_complete:
            return
        self.gone = True
        self._wake()
        for callback in self._callbacks:
            callback()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- the answer ---------------------------------------------------------------------------------------

    async def start(self, status: int, headers: Headers) -> None:
        await self._ready()
        self._head = self._make_head(status, headers)
        self._lane.loop.call_soon(self._send_head)  # unless a first piece takes it along

    async def send(self, chunk: bytes) -> None:
        await self._ready()
        if chunk:
            self._write(chunk, b"%x\r\n%b%b\r\n")

    async def finish(self, chunk: bytes = b"") -> None:
        await self._ready()
        ...

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        ...
