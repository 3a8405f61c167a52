"""A TCP server that plays a script, one coroutine a connection, and helpers to wait without sleeping."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from herd_node.net.pool import Origin

T = TypeVar("T")
PATIENCE_S = 5.0


async def soon(awaitable: Awaitable[T]) -> T:
    """The result, which must not take long."""
    async with asyncio.timeout(PATIENCE_S):
        return await awaitable


async def until(condition: Callable[[], bool]) -> None:
    """Turn the loop until the condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0)


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.heads: list[bytes] = []
        self.played = asyncio.Event()
        """The script has ended: for most of them because the other side has left."""

    async def request(self) -> bytes:
        """Read one request; returns its body."""
        head = await self.head()
        for line in head.split(b"\r\n"):
            if line.startswith(b"content-length: "):
                return await soon(self.reader.readexactly(int(line[16:])))
        raise AssertionError("a request without content-length")

    async def head(self) -> bytes:
        self.heads.append(await soon(self.reader.readuntil(b"\r\n\r\n")))
        return self.heads[-1]

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def drip(self, data: bytes) -> None:
        """One byte a segment, as far as a test can make sure of it."""
        for i in range(len(data)):
            await self.send(data[i : i + 1])
            await asyncio.sleep(0)

    async def left(self) -> None:
        """Until the other side has closed or reset the connection; what it still sends is dropped."""
        try:
            while await soon(self.reader.read(65536)):
                pass
        except ConnectionError:
            pass

    def reset(self) -> None:
        """RST instead of FIN."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


class Scripted:
    """The n-th connection plays the n-th script, the last one plays for all that follow."""

    def __init__(self, scripts: tuple[Script, ...]) -> None:
        self.scripts = scripts
        self.peers: list[Peer] = []
        self.origin = Origin("", 0)
        self._playing: set[asyncio.Task[None]] = set()
        self._failures: list[BaseException] = []
        self._server: asyncio.Server | None = None

    async def _play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        script = self.scripts[min(len(self.peers), len(self.scripts) - 1)]
        self.peers.append(peer)
        task = asyncio.current_task()
        assert task is not None
        self._playing.add(task)
        try:
            await script(peer)
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self._failures.append(error)
        finally:
            self._playing.discard(task)
            writer.close()
            peer.played.set()

    async def start(self, host: str) -> None:
        self._server = await asyncio.start_server(self._play, host, 0)
        self.origin = Origin(host, self._server.sockets[0].getsockname()[1])

    def stop_listening(self) -> None:
        assert self._server is not None
        self._server.close()

    async def stop(self) -> None:
        self.stop_listening()
        playing = list(self._playing)
        for task in playing:
            task.cancel()
        if playing:
            await asyncio.wait(playing)
        for peer in self.peers:
            peer.writer.transport.abort()
        await asyncio.sleep(0)
        if self._failures:
            raise self._failures[0]


@asynccontextmanager
async def scripted(*scripts: Script, host: str = "127.0.0.1") -> AsyncIterator[Scripted]:
    server = Scripted(scripts)
    await server.start(host)
    try:
        yield server
    finally:
        await server.stop()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def answer(raw: bytes = OK, *, times: int = 1000) -> Script:
    """Give the same answer to every request of a connection."""

    async def script(peer: Peer) -> None:
        for _ in range(times):
            try:
                await peer.request()
            except (asyncio.IncompleteReadError, ConnectionError):
                return
            await peer.send(raw)

    return script


def answer_and_close(raw: bytes) -> Script:
    return answer(raw, times=1)
