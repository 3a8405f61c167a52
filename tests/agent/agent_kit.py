"""Real sockets for the agent's tests: a scripted backend, a gateway that listens, a router that signs."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

from herd_node.backends.base import Backend, Means
from herd_node.backends.calls import control_client
from herd_node.backends.detect import Watched
from herd_node.gateway import Gateway
from herd_node.net.asgi import asgi_endpoint
from herd_node.net.server import QuietServer, bind, port_of
from herd_node.protocol import auth
from herd_node.relay import Relay
from herd_node.router_client import KeyRing
from herd_node.runtime.clock import SystemClock
from herd_node.runtime.tasks import Tasks

SECRET = bytes(range(32))
AGENT_ID, AGENT_BOOT, ROUTER_BOOT = "0123456789abcdef", "a" * 16, "b" * 16
KEY_ID = auth.key_id("node-1", AGENT_ID)
KEY = auth.node_key(SECRET, KEY_ID)


@dataclass
class Request:
    """What a scripted backend got."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    left: asyncio.Event = field(default_factory=asyncio.Event)

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    def answer(self, status: int, body: object, kind: str = "application/json") -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(raw)}\r\n\r\n"
        self.write(head.encode() + raw)

    def begin(self, kind: str = "text/event-stream") -> None:
        self.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())

    def chunk(self, data: bytes) -> None:
        self.write(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        self.write(b"0\r\n\r\n")

    async def until_left(self) -> None:
        """The other side closed (or sent something unasked, which nobody does)."""
        with contextlib.suppress(ConnectionError):
            await self.reader.read(1)
        self.left.set()


Script = Callable[[Request], Awaitable[None]]


class Backendish:
    """A server that answers as it is told: `on(path, script)`. Whatever is not scripted is 404."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.arrived = asyncio.Condition()
        self._scripts: dict[str, Script] = {}
        self._tasks = Tasks("scripted backend")
        self._server: asyncio.Server | None = None
        self.port = 0
        self._writers: set[asyncio.StreamWriter] = set()

    def on(self, path: str, script: Script | object) -> None:
        """A script, or the JSON to answer with."""
        if callable(script):
            self._scripts[path] = script
            return

        async def fixed(request: Request) -> None:
            request.answer(200, script)

        self._scripts[path] = fixed

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", port)
        self.port = int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._tasks.close()
        for writer in list(self._writers):
            writer.transport.abort()
        self._server = None

    def of(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    async def wait_for(self, path: str, number: int = 1) -> Request:
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.of(path)) >= number)
        return self.of(path)[number - 1]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self._tasks.spawn(self._converse(reader, writer), name="connection")

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ", 2)
                headers = {
                    name.lower(): value
                    for name, _, value in (line.partition(": ") for line in head[1:] if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                request = Request(method, path.partition("?")[0], headers, body, reader, writer)
                self.requests.append(request)
                async with self.arrived:
                    self.arrived.notify_all()
                script = self._scripts.get(request.path)
                if script is None:
                    request.answer(
                        404, {"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}
                    )
                else:
                    await script(request)
                await writer.drain()
        writer.transport.abort()
        self._writers.discard(writer)


@dataclass
class Answer:
    """A response as it came. `whole` is False when the body broke off."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool

    def json(self) -> object:
        return json.loads(self.body)


class Line:
    """One connection to a server, spoken by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int) -> Line:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def close(self) -> None:
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()

    def send(
        self, method: str, path: str, headers: dict[str, str], body: bytes = b"", length: int | None = None
    ) -> None:
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: x",
            f"Content-Length: {len(body) if length is None else length}",
        ]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        self.writer.write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)
        }
        return int(lines[0].split(" ")[1]), headers

    async def chunk(self) -> bytes:
        """One chunk, b"" for the end chunk."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        return (await self.reader.readexactly(size + 2))[:-2]

    async def answer(self) -> Answer:
        status, headers = await self.head()
        body, whole = b"", True
        try:
            if headers.get("transfer-encoding") == "chunked":
                while piece := await self.chunk():
                    body += piece
            else:
                body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        except asyncio.IncompleteReadError as cut:
            body, whole = body + cut.partial, False
        return Answer(status, headers, body, whole)


class House:
    """A gateway on a real socket, with real backends in front of it, and the router's side of its key."""

    def __init__(self, slots: int | None = None) -> None:
        self.clock = SystemClock()
        self.tasks = Tasks("house")
        self.http = control_client()
        self.means = Means(http=self.http, clock=self.clock, tasks=self.tasks, slots=slots)
        self.backends: list[Backend] = []
        self.gate = auth.CallGate(AGENT_BOOT)
        self.gate.learn_router_boot(KEY_ID, ROUTER_BOOT)
        self.keys = KeyRing()
        self.keys.learn(KEY_ID, KEY)
        self.troubles = 0
        self.relay = Relay(self.clock, self._trouble)
        self.gateway = Gateway(
            node_id="node-1",
            agent_id=AGENT_ID,
            boot=AGENT_BOOT,
            gate=self.gate,
            key_for=self.keys.key_for,
            backends=lambda: self.backends,
            relay=self.relay,
            clock=self.clock,
            tasks=self.tasks,
        )
        self.sockets = bind("127.0.0.1", 0)
        self.port = port_of(self.sockets)
        self._server = QuietServer(
            asgi_endpoint(self.gateway.handle), on_stop=lambda _count: None, graceful_s=1
        )
        self._seq = 0
        self._lines: list[Line] = []

    def _trouble(self) -> None:
        self.troubles += 1

    def start(self) -> None:
        self.serving = self.tasks.spawn(self._server.serve(self.sockets), name="gateway")

    async def close(self) -> None:
        for line in self._lines:
            await line.close()
        self._server.force()
        await self.serving
        await self.tasks.close()
        await self.relay.close()
        await self.http.aclose()

    async def add(self, url: str) -> Backend:
        backend = Watched(url, self.means)
        await backend.poll(self.clock.now_s())
        self.backends.append(backend)
        return backend

    def signature(self, verb: str, path: str, body: bytes = b"", **changed: object) -> str:
        self._seq += 1
        fields: dict[str, object] = {
            "direction": "call",
            "method": verb,
            "target": path,
            "key_id": KEY_ID,
            "sender_boot": ROUTER_BOOT,
            "receiver_boot": AGENT_BOOT,
            "seq": self._seq,
            "body_sha256": auth.body_hash(body),
        }
        key = changed.pop("key", KEY)
        return auth.sign(key, **(fields | changed))  # type: ignore[arg-type]

    async def line(self) -> Line:
        line = await Line.open(self.port)
        self._lines.append(line)
        return line

    async def begin(self, path: str, body: object, headers: dict[str, str] | None = None) -> Line:
        """Send a signed POST; the answer is the caller's to read."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        line = await self.line()
        signed = {"Content-Type": "application/json", "X-Herd-Auth": self.signature("POST", path, raw)}
        line.send("POST", path, signed | (headers or {}), raw)
        return line

    async def call(self, path: str, body: object, headers: dict[str, str] | None = None) -> Answer:
        return await (await self.begin(path, body, headers)).answer()


@contextlib.asynccontextmanager
async def openai_backend(*models: str) -> AsyncIterator[Backendish]:
    """An OpenAI-compatible server that lists these models."""
    server = Backendish()
    server.on("/v1/models", {"object": "list", "data": [{"id": name, "object": "model"} for name in models]})
    await server.start()
    try:
        yield server
    finally:
        await server.close()


async def until(condition: Callable[[], bool]) -> None:
    """For what another program does in its own time and tells nobody about; fails after 5 s."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)
