"""A real router in the test's loop, real agents as processes, fake backends that fail as they are told.

    client ── raw socket ──▶ Router ── signed HTTP ──▶ agent process ──▶ FakeBackend (in the test's loop)

Two nodes, `a` and `b`; each has a fake Ollama (models `o:1`, `embed:1`, and one of its own, `only-a:1`) and a
fake llama-server (`l:1`). A test orders faults, asks, and looks at everything: bytes, rows, counters.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from herd.app import Router
from herd.fleet.snapshot import NodeView
from herd.settings import Settings
from tests.fakes.backend import FakeBackend
from tests.fakes.faults import Fault
from tests.fakes.model import FakeModel

NODES = ("a", "b")
OLLAMA, LLAMA = "o:1", "l:1"
TOKENS = 8
TEXT = "".join(f"t{n:04d} " for n in range(TOKENS))
_ids = itertools.count(1)


async def until(condition: Callable[[], Any], what: str, *, patience_s: float = 10.0) -> Any:
    """For what other programs do in their own time: looks again and again, fails after a while."""
    try:
        async with asyncio.timeout(patience_s):
            while not (value := condition()):
                await asyncio.sleep(0.01)
            return value
    except TimeoutError:
        raise AssertionError(f"waited {patience_s:g} s in vain for {what}") from None


@dataclass
class Answer:
    """One answer as its bytes came. `whole`: the body has its proper end."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    whole: bool = False
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    """Chunks and when they came."""
    asked_as: str = ""

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def records(self) -> list[Any]:
        """The records of a stream: objects, and `[DONE]` as a string."""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            lines = self.body.split(b"\n")
            payloads = [line.removeprefix(b"data: ") for line in lines if line.startswith(b"data: ")]
        else:
            payloads = [line for line in self.body.split(b"\n") if line]
        return [record if record == b"[DONE]" else json.loads(record) for record in payloads]

    @property
    def text(self) -> str:
        return "".join(map(_text_of, self.records))

    @property
    def ends(self) -> int:
        """How many records say that the answer is complete."""
        return sum(map(_is_end, self.records))

    @property
    def errors(self) -> list[str]:
        """The sentences of the error records."""
        found = [
            record["error"] for record in self.records if isinstance(record, dict) and record.get("error")
        ]
        return [error["message"] if isinstance(error, dict) else error for error in found]

    @property
    def error(self) -> str:
        """The sentence of an error that is the whole answer."""
        error = self.json()["error"]
        return error["message"] if isinstance(error, dict) else error


def _is_end(record: Any) -> bool:
    if not isinstance(record, dict):
        return bool(record == b"[DONE]")
    return record.get("done") is True or record.get("type") in ("message_stop", "response.completed")


def _text_of(record: Any) -> str:
    if not isinstance(record, dict):
        return ""
    if record.get("type") == "message":  # Anthropic's, whole
        return "".join(block.get("text", "") for block in record["content"] or ())
    if record.get("object") == "response":
        return "".join(part["text"] for item in record["output"] for part in item["content"])
    if record.get("type") == "content_block_delta":
        return record["delta"].get("text", "")
    if record.get("type") == "response.output_text.delta":
        return record["delta"]
    if "type" in record:
        return ""
    if "choices" in record:
        return "".join(
            (choice.get("delta") or choice.get("message") or {}).get("content") or choice.get("text") or ""
            for choice in record["choices"]
        )
    return (record.get("message") or {}).get("content") or record.get("response") or ""


class Call:
    """One request on its own connection, read by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked_as: str) -> None:
        self.reader, self.writer = reader, writer
        self.answer = Answer(0, {}, asked_as=asked_as)

    async def head(self) -> Answer:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        self.answer.status = int(lines[0].split(" ")[1])
        pairs = (line.partition(": ") for line in lines[1:] if line)
        self.answer.headers = {name.lower(): value for name, _, value in pairs}
        return self.answer

    async def piece(self) -> bytes:
        """One chunk; b"" at the proper end."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        data = (await self.reader.readexactly(size + 2))[:-2]
        self.answer.pieces.append((asyncio.get_running_loop().time(), data))
        self.answer.body += data
        return data

    async def rest(self) -> Answer:
        answer = self.answer
        try:
            if answer.headers.get("transfer-encoding") == "chunked":
                while await self.piece():
                    pass
            else:
                answer.body += await self.reader.readexactly(int(answer.headers.get("content-length", "0")))
            answer.whole = True
        except (asyncio.IncompleteReadError, ConnectionError):
            answer.whole = False
        self.hang_up()
        return answer

    def hang_up(self) -> None:
        self.writer.transport.abort()


PATHS = {
    "openai": "/v1/chat/completions",
    "ollama": "/api/chat",
    "anthropic": "/v1/messages",
    "responses": "/v1/responses",
}


@dataclass
class Question:
    """A chat in one dialect, for one pair of backends."""

    dialect: str
    model: str
    stream: bool

    @property
    def path(self) -> str:
        return PATHS[self.dialect]

    @property
    def backend_path(self) -> str:
        """What the fake sees: llama-server knows no Ollama path."""
        return "/v1/chat/completions" if (self.model, self.dialect) == (LLAMA, "ollama") else self.path

    @property
    def body(self) -> dict[str, Any]:
        if self.dialect == "responses":
            return {"model": self.model, "input": "hi", "stream": self.stream}
        return {
            **({"max_tokens": 100} if self.dialect == "anthropic" else {}),
            "model": self.model,
            "messages": [{"role": "user", "content": "hi"}],
            "stream": self.stream,
        }

    def __str__(self) -> str:
        return f"{self.dialect}-{self.model[0]}-{'stream' if self.stream else 'whole'}"


QUESTIONS = [
    Question(dialect, model, stream)
    for dialect in ("openai", "ollama")
    for model in (OLLAMA, LLAMA)
    for stream in (True, False)
]
#: The same in the dialects whose streams have named events.
NAMED = [
    Question(dialect, model, stream)
    for dialect in ("anthropic", "responses")
    for model in (OLLAMA, LLAMA)
    for stream in (True, False)
]
STREAMS = [question for question in QUESTIONS if question.stream]
WHOLES = [question for question in QUESTIONS if not question.stream]


class FaultOfOne(Fault):
    """A fault of the one backend, of several, that is asked first."""

    def __init__(self, fake: FakeBackend, hit_first: list[FakeBackend], **values: Any) -> None:
        super().__init__(**values)
        self._fake = fake
        self._hit_first = hit_first

    def hits(self) -> bool:
        if not self._hit_first:
            self._hit_first.append(self._fake)
        return self._hit_first[0] is self._fake


class Hasty(random.Random):
    """Pauses before a retry that are not worth waiting for, so that the suite is quick."""

    def uniform(self, a: float, b: float) -> float:
        return a / 20


class Fleet:
    """Everything at once; see the module."""

    def __init__(self, router: Router, folder: Path) -> None:
        self.router = router
        self.folder = folder
        self.ollama: dict[str, FakeBackend] = {}
        self.llama: dict[str, FakeBackend] = {}
        self.agents: dict[str, asyncio.subprocess.Process] = {}

    # ---- orders

    def fakes(self, model: str) -> list[FakeBackend]:
        """Those that serve a model."""
        if model == LLAMA:
            return list(self.llama.values())
        return [fake for fake in self.ollama.values() if any(m.name == model for m in fake.dialect.models)]

    @property
    def all_fakes(self) -> list[FakeBackend]:
        return [*self.ollama.values(), *self.llama.values()]

    def fail_first(self, question: Question, kind: str, **values: Any) -> None:
        """The node that is asked first has the fault from then on, the others never."""
        hit_first: list[FakeBackend] = []
        for fake in self.fakes(question.model):
            fake.faults.append(FaultOfOne(fake, hit_first, kind=kind, path=question.backend_path, **values))

    def fail_all(self, question: Question, kind: str, **values: Any) -> None:
        """Every node has the fault, always."""
        for fake in self.fakes(question.model):
            fake.fault(kind, path=question.backend_path, **{"count": None, **values})

    def requests(self, question: Question) -> int:
        """Upstream calls for the question's path since the last reset."""
        fakes = self.fakes(question.model)
        return sum(fake.counters.by_path.get(question.backend_path, 0) for fake in fakes)

    def live(self) -> int:
        return sum(fake.counters.live + fake.counters.waiting for fake in self.all_fakes)

    @contextmanager
    def deadlines(self, **changes: float) -> Iterator[None]:
        dispatcher = self.router.dispatcher
        before = dispatcher.deadlines
        dispatcher.deadlines = dataclasses.replace(before, **changes)
        try:
            yield
        finally:
            dispatcher.deadlines = before

    # ---- asking

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.router.port, limit=64 * 1024 * 1024)

    async def begin(
        self, path: str, body: object = None, *, method: str = "POST", headers: dict[str, str] | None = None
    ) -> Call:
        """Send a request; the answer is the caller's to read."""
        reader, writer = await self.connect()
        asked_as = f"ask-{next(_ids)}"
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        fields = {
            "Host": f"127.0.0.1:{self.router.port}",
            "X-Request-Id": asked_as,
            "Content-Length": str(len(raw)),
            "Content-Type": "application/json",
            **(headers or {}),
        }
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        writer.write("\r\n".join([*lines, "", ""]).encode() + raw)
        return Call(reader, writer, asked_as)

    async def request(self, path: str, body: object = None, **more: Any) -> Answer:
        async with asyncio.timeout(20):
            call = await self.begin(path, body, **more)
            await call.head()
            if more.get("method") == "HEAD":
                call.hang_up()
                return call.answer
            return await call.rest()

    async def ask(self, question: Question, **more: Any) -> Answer:
        return await self.request(question.path, question.body | more)

    async def get(self, path: str) -> Any:
        answer = await self.request(path, method="GET")
        assert answer.status == 200, answer
        return answer.json()

    # ---- looking

    async def status(self) -> Any:
        return await self.get("/fleet/status")

    async def rows(self, answer: Answer) -> list[dict[str, Any]]:
        """The request's rows, the first attempt first, once the last one has ended. I5: exactly one has."""
        found: list[dict[str, Any]] = []
        for _ in range(400):
            await self.router.traces.flush()
            latest = (await self.get("/dashboard/api/traces?limit=60"))["traces"]
            found = [row for row in latest if row["client_request_id"] == answer.asked_as]
            if any(_is_terminal(row) for row in found):
                break
            await asyncio.sleep(0.01)
        found.sort(key=lambda row: row["attempt"])
        assert [_is_terminal(row) for row in found] == [False] * (len(found) - 1) + [True], found
        return found

    async def check(self, answer: Answer) -> list[dict[str, Any]]:
        """I3, I4, I5: nothing runs any more within a second, every counter is 0, one terminal row."""
        await until(lambda: self.live() == 0, "the backends to be idle", patience_s=1.0)
        status = await self.status()
        assert (status["fleet"]["requests_active"], status["fleet"]["requests_waiting"]) == (0, 0)
        assert status["queues"] == {}
        for node in status["nodes"]:
            assert (node["in_flight"], node["waiting"]) == (0, 0)
            assert [model["in_flight"] for model in node["models"]] == [0] * len(node["models"])
        await until(lambda: not self.router.dispatcher.live, "the dispatcher to be idle", patience_s=1.5)
        return await self.rows(answer)

    def _is_fresh(self) -> bool:
        now_s = self.router.clock.now_s()
        nodes = self.router.registry.snapshot(now_s).nodes
        return self.live() == 0 and all(
            node_id in nodes
            and _is_fresh(nodes[node_id], now_s, {OLLAMA, LLAMA, "embed:1", f"only-{node_id}:1"})
            for node_id in NODES
        )

    async def reset(self) -> None:
        """No faults, no marks, everybody online and idle."""
        for fake in self.all_fakes:
            orders = [{"name": model.name, "loaded": True} for model in fake.dialect.models]
            await fake.control(
                {"reset": True, "listen": True, "tokens": TOKENS, "token_delay_s": 0.0, "models": orders}
            )
        self._forget_marks()
        await until(self._is_fresh, f"a fresh fleet: {self._why_not()}")
        for fake in self.all_fakes:
            await fake.control({"reset": True})

    def _forget_marks(self) -> None:
        """A node that said busy is left alone for two seconds: long for a suite, so it is forgotten."""
        registry = self.router.registry
        for node in registry._nodes.values():
            for instance in node.instances.values():
                instance.busy_until_s = instance.bad_until_s = 0.0
                registry._touch(node, instance)

    def _why_not(self) -> str:
        return str(self.router.registry.nodes_for_status(self.router.clock.now_s()))[:6000]

    # ---- life

    async def start_agent(self, node_id: str, *backends: str) -> asyncio.subprocess.Process:
        arguments = ["--node-id", node_id, "--router-url", f"http://127.0.0.1:{self.router.port}"]
        arguments += ["--data-dir", str(self.folder / "data"), "--port", "0", "--heartbeat-interval", "0.5"]
        for url in backends:
            arguments += ["--backend", url]
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("FLEET_", "OLLAMA_"))}
        with (self.folder / f"{node_id}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "herd_node", *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**clean, "OLLAMA_NUM_PARALLEL": "4"},
            )
        self.agents[node_id] = process
        return process

    async def online(self, node_id: str) -> None:
        def is_online() -> bool:
            node = self.router.registry.snapshot(self.router.clock.now_s()).nodes.get(node_id)
            return node is not None and node.status == "online" and bool(node.instances)

        await until(is_online, f"{node_id} to be online: {self._why_not()}", patience_s=30)


def _is_fresh(node: NodeView, now_s: float, names: set[str]) -> bool:
    ones = node.instances
    return (
        node.status == "online"
        and all(node.backends_ready.values())
        and {name.canonical for one in ones for name in one.names} == names
        # two slots of four may still settle after the test before
        and all(one.state == "hot" and not one.running and one.taken <= 2 for one in ones)
        and all(max(one.busy_until_s, one.bad_until_s) <= now_s for one in ones)
    )


def _is_terminal(row: dict[str, Any]) -> bool:
    return row["status"] not in ("started", "retried")


def settings(folder: Path, **more: Any) -> Settings:
    values: dict[str, Any] = {
        "host": "127.0.0.1",
        "port": 0,
        "data_dir": folder / "data",
        "mdns": False,
        "hold_timeout_s": 0.6,
        "wait_timeout_s": 2,
        "drain_timeout_s": 1,
    }
    return Settings(**{**values, **more})


@asynccontextmanager
async def running(router: Router) -> AsyncIterator[Router]:
    """A router that serves while the block runs."""
    router.open()
    started = asyncio.Event()

    async def say_so() -> None:
        started.set()

    task = asyncio.ensure_future(router.run(say_so))
    try:
        await asyncio.wait(
            {task, waiting := asyncio.ensure_future(started.wait())}, return_when="FIRST_COMPLETED"
        )
        waiting.cancel()
        if task.done():
            task.result()
        yield router
    finally:
        router.stop()
        await asyncio.wait_for(task, 20)
        router.close()


@asynccontextmanager
async def two_nodes(folder: Path) -> AsyncIterator[Fleet]:
    async with running(Router(settings(folder))) as router:
        router.dispatcher.chance = Hasty()
        fleet = Fleet(router, folder)
        try:
            for node_id in NODES:
                await _start_node(fleet, node_id)
            for node_id in NODES:
                await fleet.online(node_id)
            yield fleet
        finally:
            for process in fleet.agents.values():
                if process.returncode is None:
                    process.kill()
                await process.wait()
            for fake in fleet.all_fakes:
                await fake.__aexit__()


async def _start_node(fleet: Fleet, node_id: str) -> None:
    models = [FakeModel(name, loaded=True) for name in (OLLAMA, f"only-{node_id}:1")]
    models.append(FakeModel("embed:1", capabilities=("embedding",), loaded=True))
    ollama = FakeBackend(kind="ollama", models=models, slots=4, max_loaded=8)
    llama = FakeBackend(kind="llama-server", models=[FakeModel(LLAMA)], slots=4)
    for fakes, fake in ((fleet.ollama, ollama), (fleet.llama, llama)):
        fakes[node_id] = await fake.__aenter__()
    await fleet.start_agent(node_id, ollama.url, llama.url)
