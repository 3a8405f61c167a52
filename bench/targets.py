"""What requests are sent through: nothing, the router alone, router and agent, and other routers.

All of them run at the same time in front of one synthetic backend, so that rounds can go from one to the
next; each is idle while another is measured. A peer that is not installed is left out, never replaced.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from bench import fleet
from bench.build import Tools
from bench.errors import BenchError
from bench.processes import Program, free_port, until

DIRECT, ROUTER, AGENT, NGINX, SGLANG, VLLM = "direct", "router", "agent", "nginx", "sglang", "vllm"
ALL = (DIRECT, ROUTER, AGENT, NGINX, SGLANG, VLLM)
PEERS = (NGINX, SGLANG, VLLM)

TITLES = {
    DIRECT: "direct",
    ROUTER: "router",
    AGENT: "router + agent",
    NGINX: "nginx",
    SGLANG: "sglang-router",
    VLLM: "vllm-router",
}
DIRECT_NODES = 8
#: More than any scenario that goes through the agent has connections.
AGENT_SLOTS = 512
#: The peers would otherwise refuse what the scenarios of thousands of streams send.
_PEER_CONCURRENCY = "8192"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that listens. `parts`: whose CPU is counted, by name."""

    name: str
    port: int
    parts: Mapping[str, int] = field(default_factory=dict)
    version: str = ""
    wide: bool = False
    """Has the model twice, once with many slots (`fleet.WIDE_MODEL`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """A `herd` process with its own data folder."""

    program: Program
    port: int
    data_dir: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Stage:
    """Starts programs and ends them all. A context manager."""

    def __init__(self, tools: Tools, folder: Path, peer_venvs: Sequence[Path]) -> None:
        self.tools = tools
        self.folder = folder
        self._peer_venvs = peer_venvs
        self._programs = ExitStack()
        self._last: Program

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_error: object) -> None:
        self._programs.close()

    def start(self, name: str, command: Sequence[str], **options: object) -> Program:
        program = Program(name, command, self.folder / f"{name}.log", **options)  # type: ignore[arg-type]
        self._last = program
        return self._programs.enter_context(program)

    def backend(self, name: str, relay_port: int = 0) -> int:
        """A synthetic backend; returns its port."""
        command = [str(self.tools.backend), "--port", "0", "--relay-port", str(relay_port)]
        program = self.start(name, command, pipe_output=True)
        return int(program.first_line() or "0") or _failed(program)

    def targets(self, names: Sequence[str]) -> list[Target]:
        """Start those that are asked for and installed, in the order of ALL."""
        signer_port = free_port()
        backend_port = self.backend("backend", signer_port)
        found: list[Target] = []
        for name in ALL:
            if name not in names:
                continue
            target = self._target(name, backend_port, signer_port)
            if target is not None:
                port = target.port
                until(partial(_answers, port), f"{name} to answer", self._last, patience_s=60)
                found.append(target)
        return found

    def _target(self, name: str, backend_port: int, signer_port: int) -> Target | None:
        match name:
            case "direct":
                return Target(name=name, port=backend_port)
            case "router":
                router = self.router("router")
                self.direct_nodes("nodes", router, backend_port, signer_port)
                return Target(name=name, port=router.port, parts={"router": router.program.pid}, wide=True)
            case "agent":
                return self._router_and_agent(backend_port)
            case "nginx":
                return self._nginx(backend_port)
            case _:
                return self._peer(name, backend_port)

    # -- ours ------------------------------------------------------------------------------------------------

    def router(self, name: str) -> Router:
        """A router process as a user starts it: log level info, traces on disk."""
        port, data_dir = free_port(), self.folder / f"{name}-data"
        command = [sys.executable, "-m", "herd", "--host", "127.0.0.1", "--port", str(port), "--no-mdns"]
        command += ["--data-dir", str(data_dir), "--log-level", "info"]
        program = self.start(name, command)
        until(lambda: _nodes_online(port) is not None, f"{name} to be ready", program)
        return Router(program=program, port=port, data_dir=data_dir)

    def direct_nodes(self, name: str, router: Router, backend_port: int, signer_port: int) -> None:
        """Eight nodes whose gateway is the synthetic backend; returns when they are online."""
        command = [sys.executable, "-m", "bench.direct_nodes", "--router-url", router.url]
        command += ["--data-dir", str(router.data_dir), "--gateway-port", str(backend_port)]
        command += ["--listen-port", str(signer_port), "--nodes", str(DIRECT_NODES)]
        program = self.start(name, command)
        online = f"{DIRECT_NODES} nodes to be online"
        until(lambda: _nodes_online(router.port) == DIRECT_NODES, online, program, router.program)

    def _router_and_agent(self, backend_port: int) -> Target:
        router = self.router("router-of-agent")
        command = [sys.executable, "-m", "herd_node", "--router-url", router.url, "--node-id", "bench"]
        command += ["--backend", f"http://127.0.0.1:{backend_port}", "--data-dir", str(router.data_dir)]
        command += ["--port", "0", "--log-level", "info"]
        agent = self.start("agent", command, env={"FLEET_NODE_SLOTS": str(AGENT_SLOTS)})
        until(lambda: _nodes_online(router.port) == 1, "the agent to be online", agent, router.program)
        return Target(name=AGENT, port=router.port, parts={"router": router.program.pid, "agent": agent.pid})

    # -- peers -----------------------------------------------------------------------------------------------

    def _nginx(self, backend_port: int) -> Target | None:
        found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
        if found is None:
            return None
        port, folder = free_port(), self.folder / "nginx"
        folder.mkdir()
        config = folder / "nginx.conf"
        config.write_text(_NGINX_CONF.format(folder=folder, port=port, backend_port=backend_port))
        program = self.start(NGINX, [found, "-c", str(config), "-e", str(folder / "error.log")])
        said = subprocess.run([found, "-v"], capture_output=True, text=True, timeout=10, check=False).stderr
        return Target(
            name=NGINX, port=port, parts={NGINX: program.pid}, version=said.strip().rpartition("/")[2]
        )

    def _peer(self, name: str, backend_port: int) -> Target | None:
        module = {SGLANG: "sglang_router", VLLM: "vllm_router"}[name]
        found = _find_peer(name, module, self._peer_venvs)
        if found is None:
            return None
        python, version = found
        port = free_port()
        command = [str(python), "-m", f"{module}.launch_router", "--policy", "round_robin"]
        command += ["--worker-urls", f"http://127.0.0.1:{backend_port}", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--prometheus-port", str(free_port())]
        command += ["--max-concurrent-requests", _PEER_CONCURRENCY, "--queue-size", _PEER_CONCURRENCY]
        command += ["--log-level", {SGLANG: "warn", VLLM: "warning"}[name]]
        # One of them looks for its model's tokenizer on the internet; nothing here leaves the machine.
        program = self.start(name, command, env={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"})
        return Target(name=name, port=port, parts={name: program.pid}, version=version)


_NGINX_CONF = """\
daemon off;
worker_processes 1;
worker_rlimit_nofile 16384;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 8192; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  client_max_body_size 64m;
  client_body_buffer_size 16m;
  keepalive_requests 100000000;
  upstream backend {{
    server 127.0.0.1:{backend_port};
    keepalive 2048;
    keepalive_requests 100000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://backend;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 300s;
    }}
  }}
}}
"""


def _find_peer(name: str, module: str, venvs: Sequence[Path]) -> tuple[Path, str] | None:
    """The Python that has it, and its version: in the venvs that were named, else beside it on PATH."""
    script = {SGLANG: "sglang-router", VLLM: "vllm-router"}[name]
    pythons = [venv / "bin" / "python" for venv in venvs]
    if on_path := shutil.which(script):
        pythons.append(Path(on_path).resolve().parent / "python")
    ask = f"import importlib.metadata as m, {module}; print(m.version({script!r}))"
    for python in pythons:
        with suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(
                [str(python), "-c", ask], capture_output=True, text=True, timeout=60, check=False
            )
            if done.returncode == 0:
                return python, done.stdout.strip()
    return None


def _failed(program: Program) -> int:
    raise BenchError(f"{program.name} did not start: {program.last_words()}")


def _nodes_online(port: int) -> int | None:
    """None while the router does not answer yet."""
    answer = _ask(port, "GET", "/readyz", None)
    return None if answer is None else int(json.loads(answer)["nodes_online"])


def _answers(port: int) -> bool:
    chat = {"model": fleet.MODEL, "messages": [{"role": "user", "content": "hello"}]}
    return _ask(port, "POST", "/v1/chat/completions", json.dumps(chat)) is not None


def _ask(port: int, method: str, path: str, body: str | None) -> bytes | None:
    """The body of a 200, else None."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request(method, path, body, {"content-type": "application/json"} if body else {})
        answer = connection.getresponse()
        read = answer.read()
        return read if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
