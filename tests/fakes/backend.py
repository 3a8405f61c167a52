"""One fake backend, Ollama or llama-server, that can be told to fail in every known way.

    python -m tests.fakes.backend --kind ollama --port 0

prints one JSON line `{"url": …, "control": …}` when it listens, and ends when its standard input closes.
In a test: `async with FakeBackend(kind="llama-server") as fake: … fake.url …`.

It answers `t0000 t0001 …`, so that a caller can check that what it got is a prefix of the answer. Control,
on either port (the second one stays when the first is closed or broken):
    POST /__control {"faults": [{"kind": "rst_after_n", "after": 2, "skip": 0, "count": 1}], "reset": true,
                     "tokens": 8, "token_delay_s": 0.0, "load_s": 0.0, "loading": false, "listen": true,
                     "models": [{"name": …, "loaded": true}]}
    GET /__control  the counters
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from tests.fakes import endpoints, llama_dialect, ollama_dialect
from tests.fakes.connection import Connection, Gone, Request
from tests.fakes.faults import BEFORE_HEAD, IN_BODY, MANNERS, ON_ACCEPT, Fault, parse_fault, pick
from tests.fakes.llama_dialect import LlamaDialect
from tests.fakes.model import FakeModel, Generation, Refused, Reply, dumps
from tests.fakes.ollama_dialect import OllamaDialect
from tests.fakes.ollama_store import Lines

_INFERENCE = frozenset(
    (
        *ollama_dialect.GENERATING,
        *ollama_dialect.EMBEDDING,
        *llama_dialect.GENERATING,
        *llama_dialect.EMBEDDING,
        *endpoints.WORKING,
        endpoints.COUNT,
    )
)
_KEPT_REQUESTS = 50


@dataclass(slots=True)
class Counters:
    connections: int = 0
    requests: int = 0
    """Inference requests that were read, faulty ones included."""
    live: int = 0
    """Holding a slot now."""
    max_live: int = 0
    waiting: int = 0
    completed: int = 0
    aborted: int = 0
    """The client left while they waited or ran."""
    loads: int = 0
    tokens: int = 0
    by_path: dict[str, int] = field(default_factory=dict)
    last: list[dict[str, Any]] = field(default_factory=list)
    """method, path, headers, body of the last inference requests, newest last."""


class FakeBackend:
    """One listening fake. All attributes may be changed while it runs."""

    def __init__(
        self,
        *,
        kind: str = "ollama",
        models: list[FakeModel] | None = None,
        slots: int = 1,
        tokens: int = 8,
        token_delay_s: float = 0.0,
        load_s: float = 0.0,
        max_loaded: int = 3,
        api_key: str | None = None,
        embeddings: bool = True,
        port: int = 0,
    ) -> None:
        if models is None:
            models = [FakeModel("smollm2:135m", loaded=kind != "ollama")]
        self.dialect: OllamaDialect | LlamaDialect
        if kind == "ollama":
            self.dialect = OllamaDialect(models, tokens)
        else:
            self.dialect = LlamaDialect(models[0], tokens, slots, api_key, embeddings=embeddings)
        self.kind = kind
        self.slots = slots
        self.token_delay_s = token_delay_s
        self.load_s = load_s
        self.max_loaded = max_loaded
        self.faults: list[Fault] = []
        self.counters = Counters()
        self.port = port
        self._free: dict[str, asyncio.Semaphore] = {}
        self._load_lock = asyncio.Lock()
        self._connections: set[Connection] = set()
        self._servers: list[asyncio.Server] = []
        self._main: asyncio.Server | None = None
        self.url = ""
        self.control_url = ""

    # ---- life

    async def __aenter__(self) -> Self:
        control = await self._listen(0)
        self._servers.append(control)
        self.control_url = f"http://127.0.0.1:{control.sockets[0].getsockname()[1]}"
        await self.listen()
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        for server in self._servers:
            server.close()
        tasks = [task for connection in self._connections if (task := connection.stop())]
        await asyncio.gather(*tasks, return_exceptions=True)

    async def listen(self) -> None:
        """Opens the port again after `refuse`."""
        if self._main is None:
            self._main = await self._listen(self.port)
            self.port = self._main.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """New connections are refused; those that are open stay."""
        if self._main is not None:
            self._main.close()
            self._main = None
            await asyncio.sleep(0)

    def cut_all(self) -> None:
        """Every open connection is reset, as when the process is killed."""
        for connection in list(self._connections):
            if not connection.gone:
                connection.reset()

    async def _listen(self, port: int) -> asyncio.Server:
        # The protocol is named so that asyncio sets TCP_NODELAY: a real Ollama (Go) has it too.
        raw = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        raw.bind(("127.0.0.1", port))
        raw.listen(512)
        loop = asyncio.get_running_loop()
        return await loop.create_server(
            lambda: Connection(self._serve, self._accepted, self.dialect.idle_s), sock=raw
        )

    def _accepted(self, connection: Connection) -> bool:
        self._connections = {known for known in self._connections if not known.gone}
        self._connections.add(connection)
        local = connection.transport.get_extra_info("sockname")[1]
        if self.control_url.endswith(f":{local}"):
            return True
        self.counters.connections += 1
        hit = pick(self.faults, ON_ACCEPT, "")
        if hit("rst_on_accept"):
            connection.reset()
        elif hit("close_on_accept"):
            connection.close()
        return not connection.gone

    # ---- one request

    async def _serve(self, connection: Connection, request: Request) -> None:
        connection.cancel_when_gone = True
        if request.path == "/__control":
            await self._control(connection, request)
            return
        # an agent that tries what is there sends an empty object: that is no work
        inference = request.path in _INFERENCE and request.method == "POST" and request.body != b"{}"
        if inference:
            self._count(request)
            if await self._fail_before_head(connection, request):
                return
        reply = self.dialect.admit(request.method, request.path, request.headers)
        if reply is None:
            try:
                understood = self._understand(request)
            except Refused as refused:
                understood = refused.reply
            except (TypeError, ValueError, KeyError, IndexError, AttributeError):
                understood = self.dialect.wrong_type(request.path)  # typed readers refuse what trips this one
            if isinstance(understood, Generation):
                await self._generate(connection, request, understood)
                return
            if isinstance(understood, Lines):
                await self._send_lines(connection, understood)
                return
            reply = understood
        self._reply(connection, request, reply)
        await connection.drain()

    def _understand(self, request: Request) -> Reply | Generation | Lines:
        if request.method in ("GET", "HEAD"):
            return self.dialect.get(request.method, request.path)
        if request.method == "DELETE" and isinstance(self.dialect, OllamaDialect):
            return self.dialect.delete(request.path, request.body)
        return self.dialect.post(request.path, request.body)

    def _count(self, request: Request) -> None:
        counters = self.counters
        counters.requests += 1
        counters.by_path[request.path] = counters.by_path.get(request.path, 0) + 1
        kept = {"method": request.method, "path": request.target, "headers": request.headers}
        counters.last.append({**kept, "body": request.body.decode("utf-8", "replace")})
        del counters.last[:-_KEPT_REQUESTS]

    def _reply(self, connection: Connection, request: Request, reply: Reply) -> None:
        headers = [*reply.headers, *self.dialect.headers(reply.content_type)]
        headers = [(name, value) for name, value in headers if value or name != "Content-Type"]
        if request.method == "HEAD":
            connection.head(reply.status, [*headers, ("Content-Length", str(len(reply.body)))])
        else:
            connection.respond(reply.status, headers, reply.body)

    async def _send_lines(self, connection: Connection, answer: Lines) -> None:
        """A pull, push or create; whoever leaves ends it."""
        headers = self.dialect.headers("application/x-ndjson")
        connection.head(200, [*headers, ("Transfer-Encoding", "chunked")])
        self.counters.live += 1
        try:
            for line in answer.lines:
                await asyncio.sleep(self.token_delay_s)
                connection.write(f"{len(line):x}\r\n".encode() + line + b"\r\n")
                await connection.drain()
            connection.write(b"0\r\n\r\n")
            await connection.drain()
        except (asyncio.CancelledError, Gone):
            self.counters.aborted += 1
            raise
        finally:
            self.counters.live -= 1
        if isinstance(self.dialect, OllamaDialect):
            self.dialect.store.finish(answer)

    async def _fail_before_head(self, connection: Connection, request: Request) -> bool:
        # a keep-alive race needs a connection that was used before: a fresh one does not count
        kinds = BEFORE_HEAD if request.reused else BEFORE_HEAD - {"keepalive_race"}
        hit = pick(self.faults, kinds, request.path)
        json_headers = self.dialect.headers("application/json")
        if hit("hang_before_headers"):
            await connection.hang()
        elif hit("close_before_headers") or hit("keepalive_race"):
            connection.close()
        elif fault := hit("rst_before_headers"):
            await asyncio.sleep(fault.wait_s)
            connection.reset()
        elif fault := hit("status"):
            await asyncio.sleep(fault.wait_s)
            connection.respond(fault.status, [*json_headers, *fault.headers], fault.body.encode())
        elif hit("queue_full"):
            self._reply(connection, request, self.dialect.queue_full(request.path))
        elif hit("model_missing"):
            self._reply(connection, request, self.dialect.missing(request.path))
        elif fault := hit("redirect"):
            connection.respond(302, [("Location", fault.location)], b"")
        elif hit("garbage_head"):
            connection.write(b"\x00\x01 this is not HTTP\r\n\r\n")
            connection.close()
        elif hit("header_bomb"):
            connection.head(200, [(f"X-Bomb-{n}", "x" * 1000) for n in range(1000)])
        elif hit("cl_and_te"):
            connection.head(200, [*json_headers, ("Content-Length", "3"), ("Transfer-Encoding", "chunked")])
            connection.write(b"3\r\n{}\n\r\n0\r\n\r\n")
        else:
            return False
        return True

    # ---- one generation

    async def _generate(self, connection: Connection, request: Request, work: Generation) -> None:
        manners = pick(self.faults, MANNERS, request.path)
        hears = work.stream or self.dialect.stops_when_left
        connection.cancel_when_gone = hears and not manners("deaf")
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        slots = self._slots_of(work.model)
        self.counters.waiting += 1
        waiting = True
        try:
            await self._load(work, manners("slow_load"))
            async with slots:
                self.counters.waiting -= 1
                waiting = False
                with _Live(self):
                    work.usage.load_s = loop.time() - began_s
                    await Answer(self, connection, request, work, manners).run(began_s)
            self.counters.completed += 1
        except (asyncio.CancelledError, Gone):
            self.counters.aborted += 1
            raise
        finally:
            self.counters.waiting -= waiting

    def _slot_count(self, model: FakeModel) -> int:
        return 1 if "embedding" in model.capabilities and self.kind == "ollama" else self.slots

    def _slots_of(self, model: FakeModel) -> asyncio.Semaphore:
        return self._free.setdefault(model.weights, asyncio.Semaphore(self._slot_count(model)))

    async def _load(self, work: Generation, slow: Fault | None) -> None:
        """Strictly one load at a time; a caller who leaves throws the load away."""
        model = work.model
        if self.kind != "ollama" or self._is_hot(work):
            return
        async with self._load_lock:
            if self._is_hot(work):
                return
            loaded = [other for other in self.dialect.models if other.loaded and other is not model]
            for other in loaded[: max(0, len(loaded) + 1 - self.max_loaded)] + [model] * model.loaded:
                await self._unload(other)
            await asyncio.sleep(slow.delay_s if slow else self.load_s)
            model.loaded = True
            model.loaded_context = self._context_wanted(work)
            model.loaded_with = work.load_options
            self.counters.loads += 1

    async def _unload(self, model: FakeModel) -> None:
        """Waits until nothing runs on it."""
        slots, taken = self._slots_of(model), 0
        try:
            for _ in range(self._slot_count(model)):
                await slots.acquire()
                taken += 1
        finally:
            for _ in range(taken):
                slots.release()
        model.loaded = False

    def _is_hot(self, work: Generation) -> bool:
        model = work.model
        same_context = model.loaded_context == self._context_wanted(work)
        asked = work.load_options
        gpu = {k: v for k, v in model.loaded_with.items() if k == "num_gpu"}  # left out it stays as it is
        return model.loaded and same_context and model.loaded_with == {**gpu, **asked}

    @staticmethod
    def _context_wanted(work: Generation) -> int:
        asked = work.model.context_tokens if work.num_ctx is None else max(4, work.num_ctx)
        return min(asked, work.model.context_train_tokens)

    # ---- control

    async def _control(self, connection: Connection, request: Request) -> None:
        try:
            if request.method == "POST":
                await self.control(json.loads(request.body or b"{}"))
            status, body = 200, dumps(asdict(self.counters))
        except (ValueError, TypeError, AttributeError) as error:
            status, body = 400, dumps({"error": str(error)})
        connection.respond(status, [("Content-Type", "application/json")], body)
        await connection.drain()

    async def control(self, orders: dict[str, Any]) -> None:
        """What `POST /__control` does, for tests in the same process."""
        if orders.pop("reset", False):
            self.faults.clear()
            self.counters = Counters(live=self.counters.live, waiting=self.counters.waiting)
        self.faults += [parse_fault(fault) for fault in orders.pop("faults", [])]
        for changed in orders.pop("models", []):
            model = next(model for model in self.dialect.models if model.name == changed["name"])
            for name, value in changed.items():
                setattr(model, name, value)
        if "listen" in orders:
            await (self.listen() if orders.pop("listen") else self.refuse())
        for name in ("tokens", "loading"):
            if name in orders:
                setattr(self.dialect, name, orders.pop(name))
        for name in ("token_delay_s", "load_s"):
            if name in orders:
                setattr(self, name, float(orders.pop(name)))
        if orders:
            raise ValueError(f"no such order: {', '.join(sorted(orders))}")

    def fault(self, kind: str, **values: Any) -> None:
        """Adds one fault."""
        self.faults.append(parse_fault({"kind": kind, **values}))


class _Live:
    """Counts one generation that holds a slot."""

    def __init__(self, fake: FakeBackend) -> None:
        self._fake = fake

    def __enter__(self) -> None:
        counters = self._fake.counters
        counters.live += 1
        counters.max_live = max(counters.max_live, counters.live)
        self._tell(counters.live)

    def __exit__(self, *_: object) -> None:
        self._fake.counters.live -= 1
        self._tell(self._fake.counters.live)

    def _tell(self, live: int) -> None:
        if isinstance(self._fake.dialect, LlamaDialect):
            self._fake.dialect.busy = live


class Answer:
    """Writes one generation, with the faults that were ordered for it."""

    def __init__(
        self, fake: FakeBackend, connection: Connection, request: Request, work: Generation, manners: Any
    ) -> None:
        self._fake = fake
        self._connection = connection
        self._work = work
        self._path = request.path
        self._manners = manners
        hit = pick(fake.faults, IN_BODY, request.path)
        self._fault: Fault | None = next(filter(None, map(hit, sorted(IN_BODY))), None)
        self._started = False
        self._held: list[bytes] = []

    async def run(self, began_s: float) -> None:
        loop = asyncio.get_running_loop()
        work = self._work
        tokens = [] if self._manners("empty_done") else work.tokens
        usage = work.usage
        usage.hidden = usage.hidden or bool(self._manners("no_usage"))
        usage.completion_tokens = len(tokens)
        decode_began_s = loop.time()
        if work.stream:
            if self._fake.dialect.head_early:
                self._start()
            if not await self._tokens(tokens):
                return
        else:
            for _ in tokens:
                await self._pause()
        usage.decode_s = max(1e-6, loop.time() - decode_began_s)
        usage.total_s = loop.time() - began_s
        if work.stream:
            await self._finish()
        else:
            await self._whole(tokens)

    async def _pause(self) -> None:
        slow = self._manners("slow_tokens")
        await asyncio.sleep(slow.delay_s if slow else self._fake.token_delay_s)

    async def _tokens(self, tokens: list[Any]) -> bool:
        """False when the answer has ended here."""
        voice, fault = self._work.voice, self._fault
        opening = voice.opening()
        for n, token in enumerate(tokens):
            if fault and fault.after == n and not await self._break():
                return False
            await self._pause()
            await self._send(opening + voice.token(token))
            opening = b""
            self._fake.counters.tokens += 1
        if fault and fault.after >= len(tokens):
            return await self._break()
        return True

    async def _break(self) -> bool:
        """What the fault does in the middle of a stream. True: the stream goes on."""
        fault, connection, voice = self._fault, self._connection, self._work.voice
        assert fault is not None
        await self._flush()
        self._start()
        match fault.kind:
            case "malformed_at":
                await self._send(voice.malformed())
                return True
            case "error_after_n":
                await self._send(voice.error("injected error"))
                await self._end()
            case "clean_eof_after_n":
                await self._end()
            case "fin_after_n":
                connection.close()
            case "rst_after_n":
                await asyncio.sleep(fault.delay_s)  # let the client read what came before
                connection.reset()
            case "bad_chunk_size":
                connection.write(b"zz\r\nbroken\r\n")
                await connection.drain()
                connection.close()
            case "stall_after_n":
                await connection.hang()
        return False

    async def _finish(self) -> None:
        records = self._work.voice.last(self._work.usage)
        for record in records * (2 if self._manners("duplicate_done") else 1):
            await self._send(record)
        await self._end()

    async def _whole(self, tokens: list[Any]) -> None:
        dialect, connection, voice = self._fake.dialect, self._connection, self._work.voice
        body = voice.whole(tokens, self._work.usage)
        headers = dialect.headers(voice.whole_type)
        fault = self._fault
        if fault is None:
            connection.respond(200, headers, body)
        elif fault.kind == "error_after_n":
            reply = dialect.error(self._path, "injected error")
            connection.respond(reply.status, dialect.headers(reply.content_type), reply.body)
        elif fault.kind == "malformed_at":
            connection.respond(200, headers, body[: len(body) // 2])
        elif fault.kind == "bad_chunk_size":
            connection.head(200, [*headers, ("Transfer-Encoding", "chunked")])
            connection.write(b"zz\r\n" + body)
            connection.close()
        else:
            connection.head(200, [*headers, ("Content-Length", str(len(body)))])
            connection.write(body[: len(body) // 2])
            await self._break_whole(fault)
        await connection.drain()

    async def _break_whole(self, fault: Fault) -> None:
        if fault.kind == "stall_after_n":
            await self._connection.hang()
        elif fault.kind == "rst_after_n":
            await asyncio.sleep(fault.delay_s)
            self._connection.reset()
        else:
            self._connection.close()

    # ---- chunked body

    def _start(self) -> None:
        if not self._started:
            self._started = True
            stream_headers = list(self._work.voice.stream_headers)
            rest = [pair for pair in self._fake.dialect.headers("") if pair != ("Content-Type", "")]
            self._connection.head(200, [*stream_headers, *rest, ("Transfer-Encoding", "chunked")])

    async def _send(self, record: bytes) -> None:
        if self._manners("coalesce"):
            self._held.append(record)
            return
        self._start()
        if self._manners("byte_drip"):
            pieces = [record[at : at + 1] for at in range(len(record))]
        elif self._manners("split_utf8"):
            record = record.replace(b"t0", "ü0".encode())
            cut = record.find("ü".encode()) + 1
            pieces = [record[:cut], record[cut:]] if cut else [record]
        else:
            pieces = [record]
        for piece in pieces:
            self._connection.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
            await self._connection.drain()

    async def _flush(self) -> None:
        held, self._held = b"".join(self._held), []
        if held:
            self._start()
            self._connection.write(f"{len(held):x}\r\n".encode() + held + b"\r\n")
            await self._connection.drain()

    async def _end(self) -> None:
        await self._flush()
        self._start()
        self._connection.write(b"0\r\n\r\n")
        await self._connection.drain()
        if self._fake.dialect.closes_after_stream:
            self._connection.close()


def parse_model(text: str) -> FakeModel:
    """A name, or a JSON object of FakeModel's fields."""
    return FakeModel(**json.loads(text)) if text.startswith("{") else FakeModel(text)


async def _main(options: argparse.Namespace) -> None:
    fake = FakeBackend(
        kind=options.kind,
        models=[parse_model(text) for text in options.model] or None,
        slots=options.slots,
        tokens=options.tokens,
        token_delay_s=options.token_delay_s,
        load_s=options.load_s,
        api_key=options.api_key,
        port=options.port,
    )
    async with fake:
        print(json.dumps({"url": fake.url, "control": fake.control_url}), flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.buffer.read)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fakes.backend")
    parser.add_argument("--kind", choices=["ollama", "llama-server"], default="ollama")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", action="append", default=[], help="a name, or JSON; repeatable")
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--token-delay-s", type=float, default=0.0)
    parser.add_argument("--load-s", type=float, default=0.0)
    parser.add_argument("--api-key")
    asyncio.run(_main(parser.parse_args()))


if __name__ == "__main__":
    main()
