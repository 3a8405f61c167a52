"""A real uvicorn protocol over real sockets, in either binding, and a client that is a raw socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Literal

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from herd_node.net.asgi import asgi_endpoint
from herd_node.net.exchange import Exchange, Handler
from herd_node.net.lane import lane_protocol
from herd_node.net.lane_exchange import LaneExchange
from herd_node.net.pool import Origin
from tests.net.scripted import soon, until

Binding = Literal["asgi", "lane"]
PATHS = ("/", "/x", "/v1/models/a/b c")
LANE_LIMIT_BYTES = 64 * 1024 * 1024


class Client:
    """A raw socket: what it sends and what comes back, as bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await soon(self.writer.drain())

    async def post(self, body: bytes = b"{}", path: bytes = b"/x") -> None:
        await self.send(
            b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%b" % (path, len(body), body)
        )

    async def drip(self, data: bytes) -> None:
        """One byte a segment, as far as a test can make sure of it."""
        for i in range(len(data)):
            await self.send(data[i : i + 1])
            await asyncio.sleep(0)

    async def head(self) -> bytes:
        return await soon(self.reader.readuntil(b"\r\n\r\n"))

    async def until(self, mark: bytes) -> bytes:
        return await soon(self.reader.readuntil(mark))

    async def rest(self) -> bytes:
        return await soon(self.reader.read(-1))

    def leave(self) -> None:
        self.writer.transport.abort()


class Served:
    """uvicorn's own protocol on a socket, without its server around it (whose loop ticks every 0.1 s)."""

    def __init__(self, handler: Handler, binding: Binding, limit_bytes: int) -> None:
        async def noted(exchange: Exchange) -> None:
            self.took.append("lane" if isinstance(exchange, LaneExchange) else "asgi")
            await handler(exchange)

        self.binding = binding
        self.took: list[Binding] = []
        """Which binding each request came through."""
        self.endpoint = asgi_endpoint(noted)
        self.config = uvicorn.Config(
            self.endpoint, http="httptools", lifespan="off", log_config=None, access_log=False
        )
        self.config.load()
        self.state = ServerState()
        self.clients: list[Client] = []
        self.origin = Origin("", 0)
        lane = lane_protocol(dict.fromkeys(PATHS, noted), limit_bytes)
        assert issubclass(lane, HttpToolsProtocol)
        self.protocol = lane if binding == "lane" else HttpToolsProtocol

    async def start(self) -> asyncio.Server:
        server = await asyncio.get_running_loop().create_server(
            lambda: self.protocol(self.config, self.state, {}), "127.0.0.1", 0
        )
        self.origin = Origin("127.0.0.1", server.sockets[0].getsockname()[1])
        return server

    async def connect(self) -> Client:
        self.clients.append(Client(*await asyncio.open_connection(*self.origin)))
        return self.clients[-1]

    @property
    def connection(self) -> HttpToolsProtocol:
        """The server's end of the only connection."""
        (connection,) = self.state.connections
        assert isinstance(connection, HttpToolsProtocol)
        return connection


Serve = Callable[[Handler], AbstractAsyncContextManager[Served]]


@asynccontextmanager
async def served_by(
    binding: Binding, handler: Handler, limit_bytes: int = LANE_LIMIT_BYTES
) -> AsyncIterator[Served]:
    running = Served(handler, binding, limit_bytes)
    server = await running.start()
    try:
        yield running
    finally:
        for client in running.clients:
            client.leave()
        server.close()
        await until(lambda: not running.state.tasks and not running.state.connections)
        assert len(running.endpoint._watchers) == 0, "a watcher leaked"
