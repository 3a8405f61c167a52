"""One request in the lane, as its handler sees it: `Exchange` on uvicorn's transport and flow control.

It stands in for uvicorn's RequestResponseCycle on the connection (`herd_node.net.lane`) and writes HTTP/1.1
answers by itself, one write for each piece (`outbox`). It knows nothing of what it carries, starts no task.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from herd_node.net.chunked import chunk_of
from herd_node.net.exchange import BodyTooLarge, ClientGone, ExchangeError, Handler, Headers
from herd_node.net.outbox import Outbox

_log = logging.getLogger(__name__)

_NO_BODY = (204, 304)
_CONTROLS = bytes(code for code in (*range(32), 127) if code != 9)
#: Up to here a body is joined to what stands before it: one write. A longer one is not copied.
_ONE_WRITE_BYTES = 64 * 1024
#: After a cut, so long for what was written before to leave: a client that reads nothing would keep it.
_LINGER_S = 5.0


class _Unheard:
    """uvicorn sets its cycle's event when the client has left; here `leave` is called."""

    def set(self) -> None:
        return


class LaneExchange:
    """See `Exchange`, and uvicorn's RequestResponseCycle for the first four attributes."""

    __slots__ = (
        "_buffered_bytes",
        "_callbacks",
        "_chunks",
        "_head",
        "_lane",
        "_left_bytes",
        "_open",
        "_outbox",
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

    def __init__(
        self,
        lane: HttpToolsProtocol,
        outbox: Outbox,
        path: str,
        length: int,
        keep_alive: bool,
        chunks: bool,
    ) -> None:
        self.response_complete = self.disconnected = False
        self.keep_alive = keep_alive
        self.path = path
        self.target = lane.url.decode("latin-1")
        self.headers: Headers = lane.headers
        self.content_length: int | None = length
        self.peer = lane.client[0].removeprefix("::ffff:") if lane.client else ""
        self.started = self.gone = self._whole = False
        self._open = True
        """The answer has neither ended nor been cut, and the client is there."""
        self._lane = lane
        self._outbox = outbox
        self._chunks = chunks
        """The client knows chunked bodies: it is not one of HTTP/1.0."""
        self._head = b""
        """Of the answer, until a first piece takes it along."""
        self._left_bytes: int | None = None
        """Of the answer, where its content-length says so."""
        self._pieces: list[bytes] = []
        self._buffered_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self._callbacks: list[Callable[[], None]] = []

    async def run(self, handler: Handler) -> None:
        """The request's task."""
        try:
            await handler(self)
            if self._open:
                raise ExchangeError("the handler returned without ending its answer")
        except ClientGone:
            pass  # nobody is left to answer
        except Exception:  # noqa: BLE001 - the last line of defence: logged, never shown to the caller
            _log.exception("error in the handler of %s", self.path)
            if not self.started:
                with suppress(ClientGone):
                    await self.respond(500, [(b"connection", b"close")], b"Internal Server Error")
        finally:
            if self._open:
                self._cut()

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

    async def pieces(self, limit_bytes: int) -> AsyncIterator[bytes]:
        yield await self.read_body(limit_bytes)  # the lane takes no body that may not be kept

    def on_gone(self, callback: Callable[[], None]) -> None:
        if self.gone:
            callback()
        elif self._open:
            self._callbacks.append(callback)

    # --- called by the connection -------------------------------------------------------------------------

    def feed(self, piece: bytes) -> None:
        if not self._open:
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
        if not self._open:
            return
        self._open, self.gone = False, True
        self._head = b""
        self._wake()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- the answer ---------------------------------------------------------------------------------------

    async def start(self, status: int, headers: Headers) -> None:
        if not self._open or self._lane.flow.write_paused:
            await self._ready()
        self._begin(status, headers)
        self._lane.loop.call_soon(self._write, b"")  # unless a first piece takes the head along

    async def send(self, chunk: bytes) -> None:
        if not self._open or self._lane.flow.write_paused:
            await self._ready()
        if self._left_bytes is not None:
            self._count(chunk)
        elif chunk and self._chunks:
            chunk = chunk_of(chunk)
        self._write(chunk)

    def push(self, chunk: bytes) -> bool:
        lane = self._lane
        if not self._open or lane.flow.write_paused or self._head or self._left_bytes is not None:
            return False
        if chunk:
            chunk = chunk_of(chunk) if self._chunks else chunk
            self._outbox.write(lane.transport, chunk)
        return True

    async def finish(self, chunk: bytes = b"") -> None:
        if not self._open or self._lane.flow.write_paused:
            await self._ready()
        if self._left_bytes is not None:
            self._count(chunk)
            if self._left_bytes:
                raise ExchangeError("the answer is shorter than its content-length")
        elif self._chunks:
            chunk = chunk_of(chunk) + b"0\r\n\r\n" if chunk else b"0\r\n\r\n"
        self._write(chunk)
        self._end()

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        if not self._open or self._lane.flow.write_paused:
            await self._ready()
        self._begin(status, headers, len(body))
        self._write(body)
        self._end()

    def abort(self) -> None:
        if not self.started:
            raise ExchangeError("nothing has been sent that could be cut: answer with an error instead")
        if self._open:
            self._cut()

    async def _ready(self) -> None:
        """Until the client takes more; raises what keeps the answer from going on."""
        if self._open:
            await self._lane.flow.drain()
        if self.gone:
            raise ClientGone("the client has left")
        if not self._open:
            raise ExchangeError("the answer has ended or has been cut")

    def _begin(self, status: int, headers: Headers, length: int | None = None) -> None:
        if self.started:
            raise ExchangeError("the answer has begun already")
        lines = [STATUS_LINE[status]]
        lines += [b"%b: %b\r\n" % field for field in self._lane.server_state.default_headers]
        lines += [b"%b: %b\r\n" % field for field in headers]
        self._note_framing(status, headers, length, lines)
        head = b"".join(lines)
        if len(head.translate(None, _CONTROLS)) != len(head) - 2 * len(lines):
            raise ExchangeError("a control character inside a header")
        self._head = head + b"\r\n"
        self.started = True

    def _note_framing(self, status: int, headers: Headers, length: int | None, lines: list[bytes]) -> None:
        """How the body will end, and whether the connection ends with it; the lines that say so."""
        says_close = False
        for name, value in headers:
            if name == b"content-length":
                self._left_bytes = int(value)
            elif name == b"connection" and b"close" in value.lower():
                self.keep_alive, says_close = False, True
        if not (self.keep_alive or says_close):
            lines.append(b"connection: close\r\n")
        if status in _NO_BODY:
            self._left_bytes = 0
        elif length is not None:
            lines.append(b"content-length: %d\r\n" % length)
        elif self._left_bytes is None and self._chunks:
            lines.append(b"transfer-encoding: chunked\r\n")

    def _count(self, piece: bytes) -> None:
        """An answer is as long as its head says."""
        assert self._left_bytes is not None
        if len(piece) > self._left_bytes:
            raise ExchangeError("the answer is longer than its content-length")
        self._left_bytes -= len(piece)

    def _write(self, data: bytes) -> None:
        head, self._head = self._head, b""
        if len(data) <= _ONE_WRITE_BYTES:
            data, head = head + data, b""
        lane = self._lane
        for part in (head, data):
            if part:
                self._outbox.write(lane.transport, part)

    def _end(self) -> None:
        self._open, self.response_complete = False, True
        self._callbacks = []  # they hold the request, and uvicorn keeps this until the next one
        if not self.keep_alive:
            self._outbox.flush()
            self._lane.transport.close()
        self._lane.on_response_complete()

    def _cut(self) -> None:
        """End the connection without an end of the body."""
        self._write(b"")
        self._outbox.flush()
        self._open = False
        self._callbacks = []
        transport = self._lane.transport
        if transport.get_write_buffer_size():
            self._lane.loop.call_later(_LINGER_S, transport.abort)
        transport.close()
