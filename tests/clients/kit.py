"""A fleet of processes, and the programs that are its clients.

    program (Python or Node) ── its own client ──▶ herd ──▶ agent `a` ──▶ llama.cpp, embedded: SmolLM2
                                                      │                   llama.cpp: SmolLM2 with tools
                                                      └───▶ agent `b` ──▶ the fake Ollama

Router and agents have proxies in their environment that lead nowhere: if they used them, nothing would work.
Clients have them too, but not for loopback: nothing that one sends home gets out.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.clients.cells import BACKENDS, Backend
from tests.e2e.kit import Fleet, until

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NPM = HERE / "npm"
LLAMA, OLLAMA = BACKENDS["llama.cpp"], BACKENDS["ollama"]
PATIENCE_S = 60.0
_AS_IT_CAME = ("PATH", "SYSTEMROOT", "TMPDIR", "LANG")


class Absent(Exception):
    """A client cannot be run here; the message says why."""


class Lines:
    """A child that is asked and answers line by line, and ends with its standard input."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as errors:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=env,
            )
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._in, self._out = self._child.stdin, self._child.stdout
        self._read = b""

    @property
    def pid(self) -> int:
        return self._child.pid

    def say(self, value: object) -> None:
        self._in.write(json.dumps(value).encode() + b"\n")
        self._in.flush()

    def hear(self) -> dict[str, Any]:
        while b"\n" not in self._read:
            ready, _, _ = select.select([self._out], [], [], PATIENCE_S)
            more = os.read(self._out.fileno(), 1 << 20) if ready else b""
            assert more, f"no answer, but: {self.log.read_text(errors='replace')[-4000:]}"
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        heard: dict[str, Any] = json.loads(line)
        return heard

    def close(self) -> None:
        self._in.close()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait(10)
        self._out.close()


class Program(Lines):
    """One client."""

    def do(self, deed: str, **order: Any) -> Any:
        self.say({"deed": deed, **order})
        heard = self.hear()
        assert "trouble" not in heard, heard["trouble"]
        return heard["value"]


class Stage:
    """The fleet, what stands behind it, and the clients that were started."""

    def __init__(self, fleet: Fleet, engine: Lines, fake: Lines, closing: ExitStack) -> None:
        self.fleet = fleet
        self.engine_url = engine.hear()["url"]
        told = fake.hear()
        self.fake_url, self._control_url = told["url"], told["control"] + "/__control"
        self._closing = closing
        self._programs: dict[str, Program] = {}

    # ---- clients

    def program(self, client: str) -> Program:
        if client not in self._programs:
            command = [*self._command(client), self.fleet.url]
            log = self.fleet.folder / f"{client}.log"
            self._programs[client] = Program(command, log, self.client_env())
            self._closing.callback(self._programs[client].close)
        return self._programs[client]

    def _command(self, client: str) -> list[str]:
        if not client.startswith("npm-"):
            return [sys.executable, "-m", "tests.clients.programs", client]
        package = client.removeprefix("npm-")
        node = shutil.which("node")
        if node is None:
            raise Absent("there is no node on this machine")
        if not (NPM / "node_modules" / package).is_dir():
            raise Absent("its package is not installed: npm ci --prefix tests/clients/npm")
        return [node, str(NPM / "program.mjs"), package]

    def client_env(self) -> dict[str, str]:
        """A user's environment with nothing of this one's: no keys, a home of its own, no telemetry."""
        home = self.fleet.folder / "home"
        home.mkdir(exist_ok=True)
        kept = {name: os.environ[name] for name in _AS_IT_CAME if name in os.environ}
        return {
            **kept,
            **nowhere(),
            "NO_PROXY": "127.0.0.1",
            "HOME": str(home),
            "LLM_USER_PATH": str(home / "llm"),
            "OLLAMA_HOST": self.fleet.url,
            "LANGSMITH_TRACING": "false",
            "LANGCHAIN_TRACING_V2": "false",
        }

    # ---- backends

    def busy(self, backend: Backend) -> bool:
        """Whether a slot of the watched model is taken, by the backend's own word."""
        if backend is OLLAMA:
            counters = _get(self._control_url)
            return bool(counters["live"] + counters["waiting"])
        return any(slot["is_processing"] for slot in _get(f"{self.engine_url}/slots"))

    @contextmanager
    def talking_slowly(self) -> Iterator[None]:
        """The fake is too quick to be left in the middle."""
        self._order(tokens=100_000, token_delay_s=0.01)
        try:
            yield
        finally:
            self._order(tokens=8, token_delay_s=0)

    def _order(self, **orders: object) -> None:
        with urllib.request.urlopen(self._control_url, json.dumps(orders).encode(), timeout=10):
            pass

    # ---- rows

    def requests(self) -> set[str]:
        return {row["request_id"] for row in self.fleet.traces(500)}

    def row_since(self, before: set[str], model: str) -> dict[str, Any]:
        """The one finished row of a request for this model that was not there before."""

        def new() -> list[dict[str, Any]]:
            rows = self.fleet.traces(500)
            new = [row for row in rows if row["request_id"] not in before and row["model"] == model]
            return new if all(row["status"] != "started" for row in new) else []

        (row,) = until(new, "the row of the request", patience_s=10)
        found: dict[str, Any] = row
        return found


def nowhere() -> dict[str, str]:
    """Proxies where nobody listens."""
    dead = "http://127.0.0.1:9"
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    return {spelled: dead for name in names for spelled in (name, name.lower())}


def _get(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.loads(answer.read())


@contextmanager
def staged(folder: Path, model: Path) -> Iterator[Stage]:
    lost = nowhere()
    with ExitStack() as closing:
        engine = Lines([sys.executable, "-m", "tests.fakes.templated_server"], folder / "engine.log")
        closing.callback(engine.close)
        engine.say(
            {
                "model": str(model),
                "alias": LLAMA.tools,
                "api_key": "",
                "threads": 1,
                "slots": 2,
                "context_tokens": 1024,
                "batch_tokens": 512,
                "template": str(ROOT / "tests" / "fakes" / "templates" / "tools.jinja"),
            }
        )
        models = [
            {"name": OLLAMA.chat, "loaded": True},
            {"name": OLLAMA.tools, "capabilities": ["tools", "completion"], "loaded": True},
            {"name": OLLAMA.embeddings, "capabilities": ["embedding"], "loaded": True},
        ]
        named = [part for one in models for part in ("--model", json.dumps(one))]
        command = [sys.executable, "-m", "tests.fakes.backend", "--kind", "ollama", "--slots", "4", *named]
        fake = Lines(command, folder / "fake.log")
        closing.callback(fake.close)
        fleet = Fleet(folder, env=lost)
        closing.callback(fleet.close)
        stage = Stage(fleet, engine, fake, closing)
        beat = ("--heartbeat-interval", "0.5")
        embedded = ("--embedded", "--model", str(model))
        fleet.start_agent("a", *embedded, "--backend", stage.engine_url, *beat, env=lost)
        fleet.start_agent("b", "--backend", stage.fake_url, *beat, env={**lost, "OLLAMA_NUM_PARALLEL": "4"})
        fleet.until_online("a", model=LLAMA.chat)
        fleet.until_online("a", model=LLAMA.tools)
        fleet.until_online("b", model=OLLAMA.embeddings)
        yield stage
