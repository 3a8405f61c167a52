"""One connection to an upstream and one answer that comes over it. The hot path: bytes, llhttp, one future.

A connection belongs to a `Pool` (`herd_node.net.pool`), which decides whether it is used again; here is what
happens on the wire. Never half-closes: Ollama takes that for a hang-up. A body is read (`Upstream.read`) or
piped: then each read of the socket is handed on inside its own callback, without a future or a task step.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import httptools

from herd_node.net.chunked import whole_chunks
from herd_node.net.exchange import Headers
from herd_node.net.outbox import Outbox
from herd_node.protocol.forms import Body

_ONE_WRITE_BYTES = 64 * 1024
"""A body up to here is joined to the head: one write, one segment. A longer one is not copied."""
_SLICE_BYTES = 256 * 1024
READ_BYTES = 16 * 1024
"""The longest read of the socket. What a slow client costs is a multiple of it."""
_NOTHING = memoryview(b"")


class PoolError(Exception):
    """No complete answer. `str()` is a sentence that names no address.

    PoolError
    ├── NotConnected         nothing was sent
    │   ├── ConnectRefused
    │   ├── ConnectTimeout
    │   └── ConnectFailed    unreachable, no such name
    ├── ResetBeforeHead      closed or reset before the answer's head was complete
    ├── HeadTimeout          no head within head_timeout_s
    ├── BadResponse          not HTTP, head too large, framing that contradicts itself
    └── UpstreamCut          after the head: the body broke off or is badly framed
    """


class NotConnected(PoolError):
    """Nothing was sent: safe to send elsewhere."""


class ConnectRefused(NotConnected):
    """Nobody listens there."""


class ConnectTimeout(NotConnected):
    """No connection within connect_timeout_s, or nothing sent was heard of within unheard_timeout_s."""


class ConnectFailed(NotConnected):
    """Unreachable, no such name, or several addresses that failed differently."""


class ResetBeforeHead(PoolError):
    """The connection ended before the head of an answer was there."""


class HeadTimeout(PoolError):
    """The head did not come in time; the connection has been cut."""


class BadResponse(PoolError):
    """What came is not a usable HTTP/1.1 answer."""


class UpstreamCut(PoolError):
    """The body ended improperly, after the head."""


class Origin(NamedTuple):
    """Where a connection goes. An IPv6 address stands without brackets."""

    host: str
    port: int

    def host_header(self) -> bytes:
        """The Host field: IPv6 in brackets, without its zone (which means something on this machine only)."""
        host = self.host.partition("%")[0]
        return (f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}").encode()


class Upstream:
    """One answer: its head is there, its body is to come. `close()` it in a `finally`, whatever happened.

    Reading is paused once more than the pool's `max_buffer_bytes` wait to be read, or a piece was refused,
    until somebody waits for more. A task that is cancelled while it waits here cuts the connection.
    """

    __slots__ = (
        "_buffered_bytes",
        "_connection",
        "_error",
        "_loop",
        "_max_buffer_bytes",
        "_paused",
        "_pieces",
        "_push",
        "_refused",
        "_waiter",
        "ended",
        "headers",
        "keep_alive",
        "status",
        "until_close",
    )

    def __init__(
        self, connection: Connection, loop: asyncio.AbstractEventLoop, max_buffer_bytes: int
    ) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.keep_alive = True
        """The connection may be used again, as far as is known by now."""
        self.until_close = False
        """The body has no length and no chunks: it ends with the connection, as a cut one does."""
        self._connection: Connection | None = connection
        self._loop = loop
        self._max_buffer_bytes = max_buffer_bytes
        self._pieces: list[bytes] = []
        self._buffered_bytes = 0
        self._paused = False
        self.ended = False
        """The body has come to its proper end (all of it may not have been read yet)."""
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._push: Callable[[bytes], bool] | None = None
        """Set while the body is piped and all that came has been taken."""
        self._refused = False

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header; `name` in lower case."""
        for key, value in self.headers:
            if key == name:
                return value
        return None

    def no_reuse(self) -> None:
        """Do not keep this connection after the answer."""
        self.keep_alive = False

    async def read(self) -> bytes:
        """All that has come since the last read, b"" at the proper end of the body.

        Raises UpstreamCut, after everything that came before the cut has been read.
        """
        if not self._pieces and not self.ended and self._error is None:
            await self._wait(None)
        if self._pieces:
            return self._take()
        if self._error is not None:
            raise self._error
        return b""

    async def pipe(self, push: Callable[[bytes], bool]) -> bool:
        """Give all that comes to `push`, once a read of the socket and inside its callback.

        True: `push` returned False; it keeps that piece, what follows waits for the next `read` or `pipe`.
        False: the proper end of the body. Raises what `push` raised, and UpstreamCut, after everything that
        came before the cut has been pushed.
        """
        while True:
            if self._pieces and not push(self._take()):
                return True
            if self._error is not None:
                raise self._error
            if self.ended:
                return False
            self._push, self._refused = push, False
            try:
                await self._wait(None)
            finally:
                self._push = None
            if self._refused:
                return True

    async def read_all(self, limit_bytes: int) -> bytes:
        """The whole body; BadResponse if it is longer."""
        if self.ended and self._buffered_bytes <= limit_bytes:  # short answers come with their heads
            return self._take() if self._pieces else b""
        pieces: list[bytes] = []
        size_bytes = 0
        while piece := await self.read():
            pieces.append(piece)
            size_bytes += len(piece)
            if size_bytes > limit_bytes:
                self.close()
                raise BadResponse(f"the answer is larger than {limit_bytes} bytes")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Give the connection back if the body has ended properly, else cut it. Safe in any state, any number
        of times; a read that waits is ended with UpstreamCut."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if self._paused:
            connection.resume_reading()
        connection.finish(reusable=self.ended and self.keep_alive)
        self._pieces.clear()
        if not self.ended:
            self.fail(UpstreamCut("the answer was closed on this side"))

    def _take(self) -> bytes:
        pieces = self._pieces
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._buffered_bytes = 0
        return piece

    def _pause(self) -> None:
        if not self._paused and self._connection is not None:
            self._paused = True
            self._connection.pause_reading()

    async def _wait(self, timeout_s: float | None) -> None:
        """Until the connection says something or the time is up: what it was, the state tells."""
        waiter = self._waiter = self._loop.create_future()
        if self._paused and self._connection is not None:
            self._paused = False
            self._connection.resume_reading()
        timer = self._loop.call_later(timeout_s, self._wake) if timeout_s is not None else None
        try:
            await waiter
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # --- called by the connection -------------------------------------------------------------------------

    async def head(self, timeout_s: float | None) -> None:
        """Until the head is there. Raises PoolError."""
        if self._error is None and not self.status:
            await self._wait(timeout_s)
        if self.status:
            return
        error = self._error or HeadTimeout(f"no answer began within {timeout_s:g} s")
        self.close()
        raise error

    def begin(self, status: int) -> None:
        self.status = status
        self._wake()

    def body(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._buffered_bytes += len(piece)
        if self._buffered_bytes > self._max_buffer_bytes:
            self._pause()
        if self._push is None:
            self._wake()

    def was_parsed(self) -> None:
        """The parser has taken apart one read of the socket, piece by piece."""
        if self._push is not None and self._pieces:
            self.was_read(self._take())

    def was_read(self, piece: bytes) -> None:
        """All that one read of the socket held: it goes on at once if somebody pipes."""
        push = self._push
        if push is None:
            self.body(piece)
            return
        try:
            if push(piece):
                return
            self._refused = True
            self._pause()  # what cannot be passed on now must not pile up
        except Exception as error:  # noqa: BLE001 - a callback's error belongs to the task that pipes
            self._error = error
        self._push = None
        self._wake()

    def end(self) -> None:
        self.ended = True
        self._wake()

    def fail(self, error: PoolError) -> None:
        if self._error is None and not self.ended:
            self._error = error
            self._wake()


class Owner(Protocol):
    """What a connection needs of its pool."""

    max_head_bytes: int
    max_buffer_bytes: int
    unheard_timeout_s: float | None
    outbox: Outbox
    read_buffer: memoryview

    def opened(self, connection: Connection) -> None: ...
    def closed(self, connection: Connection) -> None: ...
    def keep(self, connection: Connection) -> None: ...


class Connection(asyncio.BufferedProtocol):
    """One socket and its parser: idle (`upstream` is None) or busy with one exchange.

    It reads into a buffer of its pool, READ_BYTES long; uvloop's own holds as much as a client may cost.
    """

    __slots__ = (
        "_between_chunks",
        "_head_bytes",
        "_host",
        "_interim",
        "_loop",
        "_lost",
        "_no_body",
        "_parser",
        "_pool",
        "_transport",
        "_unsent",
        "_write_paused",
        "answered",
        "idle_since_s",
        "origin",
        "upstream",
    )

    def __init__(self, pool: Owner, origin: Origin) -> None:
        self.origin = origin
        self.upstream: Upstream | None = None
        self.answered = False
        """At least one byte of an answer came in this exchange."""
        self.idle_since_s = 0.0
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._host = origin.host_header()
        self._parser = httptools.HttpResponseParser(self)
        self._lost: asyncio.Future[None] | None = None
        self._between_chunks = False
        """The parser has taken a whole chunk and nothing behind it."""
        self._head_bytes = 0
        self._interim = False
        self._no_body = False
        self._unsent = _NOTHING
        self._write_paused = False

    # --- used by Pool and Upstream ------------------------------------------------------------------------

    def send(self, method: str, target: str, headers: Callable[[], Headers], body: Body) -> Upstream:
        """Write one request; its answer is to come (`Upstream.head`)."""
        pool = self._pool
        upstream = self.upstream = Upstream(self, self._loop, pool.max_buffer_bytes)
        self.answered = self._interim = self._between_chunks = False
        self._head_bytes = 0
        self._no_body = method == "HEAD"
        try:
            head = self._head(method, target, headers(), len(body))
            if len(body) <= _ONE_WRITE_BYTES:
                pool.outbox.write(self._transport, head + body[:])  # of bytes this is the object itself
            else:
                self._transport.write(head)
                self._unsent = memoryview(body)
                self._write_on()
        except BaseException:
            upstream.close()
            raise
        return upstream

    def finish(self, *, reusable: bool) -> None:
        """The exchange is over."""
        self.upstream = None
        sent = not self._unsent and not self._transport.get_write_buffer_size()
        if reusable and sent and not self.closing:
            self.idle_since_s = self._loop.time()
            self._pool.keep(self)
        else:
            self.abort()

    def abort(self) -> None:
        self._unsent = _NOTHING
        self._transport.abort()

    @property
    def closing(self) -> bool:
        return self._transport.is_closing()

    def pause_reading(self) -> None:
        if not self.closing:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if not self.closing:
            self._transport.resume_reading()

    def lost(self) -> asyncio.Future[None]:
        """Done when the socket is closed."""
        if self._lost is None:
            self._lost = self._loop.create_future()
        return self._lost

    # --- writing ------------------------------------------------------------------------------------------

    def _head(self, method: str, target: str, headers: Headers, body_bytes: int) -> bytes:
        fields = b"".join([b"%b: %b\r\n" % field for field in headers])
        head = b"%b %b HTTP/1.1\r\nhost: %b\r\n%bcontent-length: %d\r\n\r\n" % (
            method.encode("ascii"),
            target.encode("ascii"),
            self._host,
            fields,
            body_bytes,
        )
        if head.count(b"\n") != len(headers) + 4 or head.count(b"\r") != len(headers) + 4:
            raise ValueError("a line break inside a request line or a header")
        return head

    def _write_on(self) -> None:
        """Large bodies go out in slices, as fast as the other side takes them, and the answer may come."""
        while self._unsent and not self._write_paused and not self.closing:
            piece, self._unsent = self._unsent[:_SLICE_BYTES], self._unsent[_SLICE_BYTES:]
            self._transport.write(piece)

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._write_on()

    # --- the socket ---------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._pool.unheard_timeout_s is not None and sys.platform == "linux":
            sock = transport.get_extra_info("socket")
            sock.setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * self._pool.unheard_timeout_s)
            )
        self._pool.opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._pool.read_buffer  # of all: what is read is taken out before anybody reads again

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(self._pool.read_buffer[:nbytes].tobytes())

    def data_received(self, data: bytes) -> None:
        upstream = self.upstream
        if upstream is None or upstream.ended:
            self.abort()  # nobody asked for this, and it must not be taken for the answer to what comes next
            return
        if self._between_chunks and (piece := whole_chunks(data)):
            upstream.was_read(piece)
        else:
            self._parse(upstream, data)

    def _parse(self, upstream: Upstream, data: bytes) -> None:
        self.answered = True
        if self._pool.outbox.waiting:
            self._pool.outbox.flush()  # so that no answer is taken to a request that has not gone yet
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            cause = error.__context__  # what a callback of ours raised
            if cause is not None and not isinstance(cause, BadResponse):
                raise
            self._misframed(str(cause or error))
        except httptools.HttpParserUpgrade:
            self._misframed("it changed the protocol")
        else:
            # a size line that has begun and not ended is told by nobody
            self._between_chunks = self._between_chunks and data.endswith(b"\r\n")
            if not upstream.status:
                self._head_bytes += len(data)
                if self._head_bytes > self._pool.max_head_bytes:
                    self._misframed("its head is too large")
            upstream.was_parsed()

    def eof_received(self) -> bool:
        self._ended_by_peer(None)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended_by_peer(exc or ConnectionAbortedError("closed"))
        self._pool.closed(self)
        del self._parser  # it holds this object
        if self._lost is not None and not self._lost.done():
            self._lost.set_result(None)

    def _ended_by_peer(self, exc: Exception | None) -> None:
        """EOF (exc is None) or loss of the connection."""
        upstream = self.upstream
        if upstream is None:
            return
        upstream.keep_alive = False
        if isinstance(exc, TimeoutError) and not self.answered:
            upstream.fail(ConnectTimeout("nothing that was sent arrived"))
        elif not upstream.status:
            upstream.fail(ResetBeforeHead("the connection was closed before an answer began"))
        elif upstream.until_close and exc is None:
            upstream.end()
        else:
            upstream.fail(UpstreamCut("the connection was closed in the middle of the answer"))

    def _misframed(self, reason: str) -> None:
        upstream = self.upstream
        if upstream is not None:
            upstream.keep_alive = False
            if upstream.status:
                upstream.fail(UpstreamCut(f"the body of the answer is badly framed: {reason}"))
            else:
                upstream.fail(BadResponse(f"the answer is not usable HTTP: {reason}"))
        self.abort()

    # --- the parser (httptools calls these) ---------------------------------------------------------------

    def on_message_begin(self) -> None:
        upstream = self.upstream
        if upstream is not None and upstream.ended:
            upstream.keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        upstream = self.upstream
        if upstream is not None and not upstream.status:  # else a trailer
            upstream.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        upstream = self.upstream
        if upstream is None or upstream.ended:
            return
        status = self._parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self._interim = True
            return
        upstream.until_close = self._check_head(upstream, status)
        upstream.begin(status)
        if self._no_body:
            # llhttp does not know that this answers a HEAD: it would wait for the body that is announced
            upstream.keep_alive = False
            upstream.end()

    def _check_head(self, upstream: Upstream, status: int) -> bool:
        """Whether the end of the connection is the end of the body; raises what makes the head unusable."""
        coding = length = None
        head_bytes = 0
        for name, value in upstream.headers:
            head_bytes += len(name) + len(value) + 4
            if name == b"transfer-encoding":
                coding = value
            elif name == b"content-length":
                length = value
        version = self._parser.get_http_version()
        if head_bytes > self._pool.max_head_bytes:
            raise BadResponse("its head is too large")
        if version not in ("1.1", "1.0") or not 200 <= status <= 599:
            raise BadResponse(f"HTTP/{version} with status {status}")
        if coding is not None and (version == "1.0" or coding.lower() != b"chunked"):
            raise BadResponse("a transfer coding that nobody asked for")
        if version == "1.0" or not self._parser.should_keep_alive():
            upstream.keep_alive = False
        return coding is None and length is None and status not in (204, 304) and not self._no_body

    def on_chunk_header(self) -> None:
        self._between_chunks = False

    def on_chunk_complete(self) -> None:
        self._between_chunks = True

    def on_body(self, piece: bytes) -> None:
        upstream = self.upstream
        if upstream is not None and not upstream.ended:
            upstream.body(piece)

    def on_message_complete(self) -> None:
        upstream = self.upstream
        if upstream is None:
            return
        if self._interim:
            self._interim = False
            upstream.headers.clear()
        elif not upstream.ended:
            upstream.end()
