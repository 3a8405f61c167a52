"""Real programs for the end-to-end tests: a router and agents as processes, watched and always ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def until(true: Callable[[], Any], what: str, *, patience_s: float = PATIENCE_S) -> Any:
    """Ask again and again, with a pause that no outcome depends on."""
    tick = threading.Event()
    for _ in range(int(patience_s / 0.05)):
        value = true()
        if value:
            return value
        tick.wait(0.05)
    raise AssertionError(f"waited {patience_s:.0f} s in vain for {what}")


class Program:
    """One process of ours; what it prints goes into a file."""

    def __init__(self, log: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.log = log
        self._file = log.open("ab")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env={**clean, **(env or {})},
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM and the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(40)
        finally:
            self.close()

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill()
        self._file.close()


class Fleet:
    """A router on a free port and agents beside it, in one data folder."""

    def __init__(self, folder: Path, *router_arguments: str, env: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.agents: dict[str, Program] = {}
        self._router_arguments = router_arguments
        self._router_env = env
        self.router = self._start_router()

    def _start_router(self) -> Program:
        arguments = ["herd", "--host", "127.0.0.1", "--port", str(self.port), "--no-mdns"]
        arguments += ["--data-dir", str(self.data_dir), *self._router_arguments]
        router = Program(self.folder / "router.log", *arguments, env=self._router_env)
        until(lambda: self._is_ready(router), "the router to be ready")
        return router

    def _is_ready(self, router: Program) -> bool:
        if router.process.poll() is not None:
            raise AssertionError(f"the router ended: {router.said()}")
        try:
            return bool(self.get("/readyz"))
        except OSError:
            return False

    def restart_router(self) -> None:
        self.router.close()
        self.router = self._start_router()

    def start_agent(self, node_id: str, *arguments: str, env: dict[str, str] | None = None) -> Program:
        if node_id in self.agents:
            self.agents[node_id].close()
        program = Program(
            self.folder / f"{node_id}.log",
            "herd_node",
            *("--node-id", node_id, "--router-url", self.url, "--data-dir", str(self.data_dir)),
            *("--port", "0", *arguments),
            env=env,
        )
        self.agents[node_id] = program
        return program

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return json.loads(answer.read())

    def node(self, node_id: str) -> dict[str, Any]:
        rows = self.get("/fleet/status")["nodes"]
        return next((row for row in rows if row["node_id"] == node_id), {})

    def until_online(self, *node_ids: str, model: str | None = None) -> None:
        for node_id in node_ids:
            until(lambda wanted=node_id: self._has(wanted, model), f"{node_id} to be online: {self._logs()}")

    def _has(self, node_id: str, model: str | None) -> bool:
        row = self.node(node_id)
        if row.get("status") != "online":
            return False
        return model is None or any(m["name"] == model and m["state"] == "hot" for m in row["models"])

    def _logs(self) -> str:
        return "\n".join(f"--- {name}\n{program.said()}" for name, program in self.agents.items())

    def post(self, path: str, body: object) -> tuple[int, dict[str, str], bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, dict(error.headers), error.read()

    def traces(self, limit: int = 50) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.get(f"/dashboard/api/traces?limit={limit}")["traces"]
        return rows

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A client command of `herd` against this fleet."""
        where = ["--port", str(self.port), "--data-dir", str(self.data_dir)]
        return subprocess.run(
            [sys.executable, "-m", "herd", *where, *arguments], capture_output=True, text=True, timeout=60
        )

    def close(self) -> None:
        for program in (*self.agents.values(), self.router):
            program.stop()
