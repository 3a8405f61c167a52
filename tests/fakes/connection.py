"""One server-side HTTP/1.1 connection by hand: a fake must be able to break every rule of it."""

from __future__ import annotations

import asyncio
import socket
import struct
import traceback
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

REASONS = {
    200: "OK",
    201: "Created",
    204: "No Content",
    302: "Found",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    415: "Unsupported Media Type",
    429: "Too Many Requests",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
}

Headers = Sequence[tuple[str, str]]


class Request(NamedTuple):
    method: str
    target: str
    path: str
    headers: dict[str, str]
    """Lower-case names."""
    body: bytes
    reused: bool
    """Not the first request on its connection."""


class Gone(Exception):
    """The client has left, or this side has closed the connection."""


class Connection(asyncio.Protocol):
    """Reads requests one after the other and hands each to `serve`."""

    def __init__(
        self,
        serve: Callable[[Connection, Request], Awaitable[None]],
        accepted: Callable[[Connection], bool],
        idle_s: float | None,
    ) -> None:
        self._serve = serve
        self._accepted = accepted
        self._idle_s = idle_s
        self._buffer = bytearray()
        self._more = asyncio.Event()
        self._writable = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._in_request = False
        self.cancel_when_gone = True
        self.gone = False
        self.transport: asyncio.Transport

    # ---- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._writable.set()
        if self._accepted(self):
            self._task = asyncio.get_running_loop().create_task(self._run(), name="fake-connection")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        self._more.set()

    def eof_received(self) -> bool:
        self._left()
        return False  # a half-close counts as a hang-up, as it does with Ollama

    def connection_lost(self, exc: Exception | None) -> None:
        self._left()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def _left(self) -> None:
        self.gone = True
        self._more.set()
        self._writable.set()
        if self._task is not None and (self.cancel_when_gone or not self._in_request):
            self._task.cancel()

    # ---- reading

    async def _run(self) -> None:
        reused = False
        try:
            while not self.gone:
                request = await self._read_request(reused)
                reused = True
                self._in_request = True
                await self._serve(self, request)
                self._in_request = False
                if request.headers.get("connection", "").lower() == "close":
                    self.close()
        except (Gone, asyncio.CancelledError, TimeoutError):
            self.close()
        except Exception:
            traceback.print_exc()  # a bug of the fake must be seen, not waited for
            self.reset()

    async def _read_request(self, reused: bool) -> Request:
        async with asyncio.timeout(self._idle_s):
            head = (await self._read_until(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)
        }
        if headers.get("expect", "").lower() == "100-continue":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await self._read_body(headers)
        return Request(method, target, target.partition("?")[0], headers, body, reused)

    async def _read_body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding", "").lower() != "chunked":
            return await self._read_exactly(int(headers.get("content-length", "0")))
        body = b""
        while size := int((await self._read_until(b"\r\n")).partition(b";")[0], 16):
            body += await self._read_exactly(size)
            await self._read_exactly(2)
        await self._read_exactly(2)
        return body

    async def _read_until(self, mark: bytes) -> bytes:
        while (at := self._buffer.find(mark)) < 0:
            await self._fill()
        found = bytes(self._buffer[:at])
        del self._buffer[: at + len(mark)]
        return found

    async def _read_exactly(self, count: int) -> bytes:
        while len(self._buffer) < count:
            await self._fill()
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found

    async def _fill(self) -> None:
        if self.gone:
            raise Gone
        self._more.clear()
        await self._more.wait()

    # ---- writing

    def write(self, data: bytes) -> None:
        if not self.gone and not self.transport.is_closing():
            self.transport.write(data)

    async def drain(self) -> None:
        await self._writable.wait()
        await asyncio.sleep(0)

    def head(self, status: int, headers: Headers) -> None:
        lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Unknown')}"]
        lines += [f"{name}: {value}" for name, value in headers]
        self.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        self.head(status, [*headers, ("Content-Length", str(len(body)))])
        self.write(body)

    def close(self) -> None:
        """FIN after what is buffered."""
        self.gone = True
        self.transport.close()

    def reset(self) -> None:
        """RST: with linger 0 the kernel throws away what was not sent."""
        self.gone = True
        raw = self.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    async def hang(self) -> None:
        """Says nothing until the client leaves."""
        while not self.gone:
            self._more.clear()
            await self._more.wait()
        raise Gone

    def stop(self) -> asyncio.Task[None] | None:
        """Ends it for good; await the task to know that it has ended."""
        self.cancel_when_gone = True
        self.gone = True
        self.transport.abort()
        if self._task is not None:
            self._task.cancel()
        return self._task
