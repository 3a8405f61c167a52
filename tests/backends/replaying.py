"""A tiny server on loopback that answers each path with recorded bytes, or with what a test makes up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import orjson

from herd_node.backends.base import Means
from herd_node.backends.calls import control_client
from herd_node.net.pool import Origin
from herd_node.runtime.clock import Clock, ManualClock
from herd_node.runtime.tasks import Tasks
from tests.fakes.recordings import recording


class Asked(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: object


class Answer(NamedTuple):
    status: int
    body: bytes


Handler = Callable[[Asked], Awaitable[Answer]]


def recorded(name: str) -> Answer:
    found = recording(name)
    return Answer(found.status, found.body)


def made(value: object, status: int = 200) -> Answer:
    return Answer(status, orjson.dumps(value))


NOT_FOUND = made({"error": {"message": "File Not Found", "type": "not_found_error", "code": 404}}, 404)


class Replaying:
    """`answers` maps a path to an answer or to a coroutine function; it may be changed while it runs."""

    def __init__(self, answers: dict[str, Answer | Handler], otherwise: Answer | Handler = NOT_FOUND) -> None:
        self.answers = dict(answers)
        self.otherwise = otherwise
        self.asked: list[Asked] = []
        self.open = 0
        self._server: asyncio.Server | None = None

    @property
    def origin(self) -> Origin:
        assert self._server is not None
        return Origin("127.0.0.1", self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.origin.port}"

    def paths(self) -> list[str]:
        return [asked.path for asked in self.asked]

    async def start(self, port: int = 0) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            asked = await _read(reader)
            self.asked.append(asked)
            answer = self.answers.get(asked.path, self.otherwise)
            if not isinstance(answer, Answer):
                answer = await answer(asked)
            head = f"HTTP/1.1 {answer.status} X\r\nContent-Length: {len(answer.body)}\r\n"
            writer.write(head.encode() + b"Connection: close\r\n\r\n" + answer.body)
            await writer.drain()
        finally:
            self.open -= 1
            with suppress(ConnectionError):
                writer.close()
                await writer.wait_closed()


async def _read(reader: asyncio.StreamReader) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.rstrip().split("\r\n")
    method, path, _version = first.split()
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    raw = await reader.readexactly(int(headers.get("content-length", "0")))
    return Asked(method, path, headers, orjson.loads(raw) if raw else None)


@asynccontextmanager
async def replaying(answers: dict[str, Answer | Handler]):
    server = Replaying(answers)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def means(clock: Clock | None = None, **more):
    """What a backend is built with, closed at the end."""
    tasks = Tasks("test")
    async with control_client() as http:
        try:
            yield Means(http=http, clock=clock or ManualClock(), tasks=tasks, **more)
        finally:
            await tasks.close()
