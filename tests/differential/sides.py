"""The two sides of a comparison: a backend asked directly, and the same one asked through router and agent.

client ── raw socket ──▶ backend
client ── raw socket ──▶ Router ── signed HTTP ──▶ agent process ──▶ the same backend
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from herd.app import Router
from tests.differential.corpus import Canned, Case
from tests.fakes.backend import FakeBackend
from tests.fakes.connection import Connection, Request
from tests.fakes.model import FakeModel
from tests.router.kit import Answer, Call, Fleet, running, settings

#: The names of the recordings' models, and a few for what nothing was recorded of.
MODELS = {
    "smollm2:135m": ("completion",),
    "smol-tools:latest": ("tools", "completion"),
    "smol-think:latest": ("thinking", "completion"),
    "smol-jinja:latest": ("tools", "thinking", "completion"),
    "smol-fim:latest": ("insert", "completion"),
    "smol-embed:latest": ("embedding",),
    "vision:1b": ("vision", "completion"),
    "loads:1b": ("completion",),
    "hf.co/Some-Owner/Some_Model-GGUF:Q4_K_M": ("completion",),
}
_PATIENCE_S = 60.0


class CannedOllama(FakeBackend):
    """The fake Ollama, which to some requests, known by all their bytes, says what a row or a recording says.

    `seen` holds what callers sent, as it arrived: the agent's own questions have no request id.
    """

    def __init__(self, answers: dict[tuple[str, bytes], Canned]) -> None:
        models = [FakeModel(name, capabilities=able, loaded=True) for name, able in MODELS.items()]
        super().__init__(kind="ollama", models=models, slots=4, max_loaded=len(models))
        self._answers = answers
        self.seen: list[tuple[str, bytes]] = []

    async def _serve(self, connection: Connection, request: Request) -> None:
        if "x-request-id" in request.headers:
            self.seen.append((request.path, request.body))
        canned = self._answers.get((request.path, request.body))
        if canned is None:
            await super()._serve(connection, request)
            return
        connection.cancel_when_gone = True
        head = [("Content-Type", canned.content_type)]
        if len(canned.pieces) == 1 and canned.whole and "event-stream" not in canned.content_type:
            connection.respond(canned.status, head, canned.pieces[0])
            await connection.drain()
            return
        connection.head(canned.status, [*head, ("Transfer-Encoding", "chunked")])
        for piece in canned.pieces:
            connection.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await connection.drain()
        if canned.whole:
            connection.write(b"0\r\n\r\n")
        else:
            connection.close()


@dataclass
class Pair:
    """Both answers to one request, and what the backend saw of it (None: it cannot be asked)."""

    direct: Answer
    routed: Answer
    seen_direct: list[tuple[str, bytes]] | None = None
    seen_routed: list[tuple[str, bytes]] | None = None


@dataclass
class Sides:
    """One backend and a fleet in front of it."""

    backend_port: int
    router_port: int
    fake: CannedOllama | None = None
    warm: bool = False
    """Ask once before: a real server then knows the prompt alike both times, and says so alike."""
    _warmed: set[str] = field(default_factory=set)

    async def ask(self, case: Case) -> Pair:
        if self.warm and case.row not in self._warmed and "embed" not in case.path:
            self._warmed.add(case.row)
            await _ask(self.backend_port, case)
        direct = await _ask(self.backend_port, case)
        seen_direct = self._seen()
        routed = await _ask(self.router_port, case)
        return Pair(direct, routed, seen_direct, self._seen())

    def _seen(self) -> list[tuple[str, bytes]] | None:
        if self.fake is None:
            return None
        seen, self.fake.seen = self.fake.seen, []
        return seen


async def _ask(port: int, case: Case) -> Answer:
    async with asyncio.timeout(_PATIENCE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=64 * 1024 * 1024)
        head = (
            f"POST {case.path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nX-Request-Id: differential\r\n"
            f"Accept: */*\r\nContent-Type: application/json\r\nContent-Length: {len(case.body)}\r\n\r\n"
        )
        writer.write(head.encode() + case.body)
        call = Call(reader, writer, "differential")
        await call.head()
        return await call.rest()


@asynccontextmanager
async def _fleet(folder: Path, backend_url: str) -> AsyncIterator[Fleet]:
    async with running(Router(settings(folder))) as router:
        fleet = Fleet(router, folder)
        try:
            await fleet.start_agent("a", backend_url)
            await fleet.online("a")
            yield fleet
        finally:
            for process in fleet.agents.values():
                if process.returncode is None:
                    process.kill()
                await process.wait()


@asynccontextmanager
async def ollama_sides(folder: Path, cases: list[Case]) -> AsyncIterator[Sides]:
    answers = {(case.path, case.body): case.answer for case in cases if case.answer is not None}
    async with CannedOllama(answers) as fake, _fleet(folder, fake.url) as fleet:
        yield Sides(fake.port, fleet.router.port, fake)


@asynccontextmanager
async def llama_sides(folder: Path, model: Path) -> AsyncIterator[Sides]:
    with _llama_server(model) as url:
        async with _fleet(folder, url) as fleet:
            port = urlsplit(url).port
            assert port is not None
            yield Sides(port, fleet.router.port, warm=True)


@contextmanager
def _llama_server(model: Path) -> Iterator[str]:
    """The server that agents embed, with an empty key: who sends none is admitted. One slot, one thread."""
    config = {
        "model": str(model),
        "alias": "smollm2:135m",
        "api_key": "",
        "threads": 1,
        "slots": 1,
        "context_tokens": 1024,
        "batch_tokens": 512,
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "herd_node.backends.embedded_server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        child.stdin.write(json.dumps(config).encode() + b"\n")
        child.stdin.flush()
        yield json.loads(child.stdout.readline())["url"]
        child.stdin.close()
        child.wait(10)
