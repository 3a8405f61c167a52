"""Several hosts on one machine: network namespaces of our own, joined by a switch that is one more namespace.

Nothing is made in the machine's own namespace, so no real interface is touched; all names begin with
`herdtest-` and the process id, and what a killed run left behind is removed by the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tests.e2e.kit import Program, until

_PREFIX = "herdtest-"
_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()
T = TypeVar("T")


def why_not() -> str | None:
    """Why hosts cannot be made here; None when they can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "the program `ip` (iproute2) is not installed"
    try:
        with Network() as network:
            network.host("probe", "10.77.0.1/24")
    except CannotRun as error:
        return f"network namespaces cannot be made here: {error}"
    return None


class CannotRun(Exception):
    """A command that sets up the network failed."""


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        raise CannotRun(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


class Network:
    """One switch, and hosts that hang on it. Leaving the context removes everything."""

    def __init__(self) -> None:
        self._made: list[str] = []
        self._programs: list[Program] = []

    def __enter__(self) -> Network:
        remove_left_over()
        try:
            self._switch = self._namespace("switch")
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "br0", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        for program in reversed(self._programs):
            program.close()
        for name in reversed(self._made):
            with contextlib.suppress(CannotRun):
                _ip("netns", "del", name)
        self._made.clear()

    def host(self, name: str, *addresses: str) -> Host:
        """A host whose interface `lan0` has these addresses (`10.77.0.1/24`)."""
        host = Host(self._namespace(name), self._programs)
        port = f"port{len(self._made)}"
        pair = ("type", "veth", "peer", "name", "lan0", "netns", host.namespace)
        _ip("-n", self._switch, "link", "add", port, *pair)
        _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
        host.bring_up("lan0", *addresses)
        return host

    def behind(self, name: str, gateway: Host, near: str, far: str) -> Host:
        """A host on a wire of its own to `gateway`, which has the address `near` there and routes for it."""
        host = Host(self._namespace(name), self._programs)
        pair = ("type", "veth", "peer", "name", "lan0", "netns", host.namespace)
        _ip("-n", gateway.namespace, "link", "add", "lan1", *pair)
        gateway.bring_up("lan1", near)
        host.bring_up("lan0", far)
        host.ip("route", "add", "default", "via", near.partition("/")[0])
        gateway.run("sysctl", "-qw", "net.ipv4.ip_forward=1")
        return host

    def _namespace(self, name: str) -> str:
        full = f"{_PREFIX}{os.getpid()}-{next(_numbers)}-{name}"
        _ip("netns", "add", full)
        self._made.append(full)
        # No duplicate address detection: nobody else is on this wire, and it takes seconds.
        for scope in ("default", "all"):
            with contextlib.suppress(CannotRun):  # IPv6 is switched off
                _run(*_within(full), "sysctl", "-qw", f"net.ipv6.conf.{scope}.accept_dad=0")
        return full


def remove_left_over() -> None:
    """What runs of ours left behind that could not clean up (SIGKILL)."""
    for path in _NAMESPACES.glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX).partition("-")[0]
        if not Path("/proc", pid).exists():
            _ip("netns", "del", path.name)


def _within(namespace: str) -> tuple[str, ...]:
    return ("ip", "netns", "exec", namespace)


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Host:
    """One host: its interface, the programs on it, and calls that are made from it."""

    def __init__(self, namespace: str, programs: list[Program]) -> None:
        self.namespace = namespace
        self._programs = programs

    # -- network -----------------------------------------------------------------------------------------

    def bring_up(self, device: str, *addresses: str) -> None:
        self.ip("link", "set", "lo", "up")
        self.ip("link", "set", device, "up")
        for address in addresses:
            self.ip("address", "add", address, "dev", device, *(["nodad"] if ":" in address else []))

    def ip(self, *arguments: str) -> None:
        _ip("-n", self.namespace, *arguments)

    def firewall(self, *rule: str) -> None:
        self.run("iptables", "-w", *rule)

    # -- programs ----------------------------------------------------------------------------------------

    def run(self, *command: str) -> None:
        _run(*_within(self.namespace), *command)

    def start(
        self, log: Path, *arguments: str, stdin: str | None = None, env: dict[str, str] | None = None
    ) -> Program:
        """`python -m …` on this host; `stdin` is what it reads, None leaves the pipe open."""
        program = _Inside(self.namespace, log, *arguments, stdin=stdin, env=env)
        self._programs.append(program)
        return program

    def command(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """A client command of `herd` on this host."""
        return subprocess.run(
            [*_within(self.namespace), sys.executable, "-m", "herd", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env=_clean_environment(env or {}),
        )

    # -- calls -------------------------------------------------------------------------------------------

    def do(self, function: Callable[[], T]) -> T:
        """Call it in a thread that stands on this host; sockets that it makes stay here."""
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(self._inside, function).result()

    def call(self, url: str, body: object = None, *, timeout_s: float = 60) -> Answer:
        """GET, or POST of JSON; raises OSError when nothing answers."""
        return self.do(lambda: _call(url, body, timeout_s))

    def _inside(self, function: Callable[[], T]) -> T:
        libc = ctypes.CDLL(None, use_errno=True)
        with (_NAMESPACES / self.namespace).open() as handle:
            if libc.setns(handle.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns {self.namespace}")
        return function()


def _call(url: str, body: object, timeout_s: float) -> Answer:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=timeout_s) as answer:
            return Answer(answer.status, dict(answer.headers), answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), error.read())


def _clean_environment(env: dict[str, str]) -> dict[str, str]:
    return {**{name: value for name, value in os.environ.items() if not name.startswith("FLEET_")}, **env}


class _Inside(Program):
    """A program in a namespace."""

    def __init__(
        self,
        namespace: str,
        log: Path,
        *arguments: str,
        stdin: str | None,
        env: dict[str, str] | None,
    ) -> None:
        self.log = log
        self._file = log.open("ab")
        command: Sequence[str] = [*_within(namespace), sys.executable, "-m", *arguments]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env=_clean_environment(env or {}),
        )
        if stdin is not None and self.process.stdin is not None:
            self.process.stdin.write(stdin.encode())
            self.process.stdin.close()

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        super().close()


PORT = 11435


class RouterHost:
    """`herd` on a host of its own, on the default port."""

    def __init__(self, host: Host, folder: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.host = host
        self.data_dir = folder / "router"
        self.local = f"http://127.0.0.1:{PORT}"
        where = ("--data-dir", str(self.data_dir))
        self._where = where
        self.program = host.start(folder / "router.log", "herd", *where, *arguments, env=env)
        until(self._is_ready, "the router to be ready", patience_s=20)

    def _is_ready(self) -> bool:
        if self.program.process.poll() is not None:
            raise AssertionError(f"the router ended: {self.program.said()}")
        try:
            return self.host.call(f"{self.local}/readyz").status == 200
        except OSError:
            return False

    def command(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return self.host.command(*self._where, *arguments, env=env)

    def join(self) -> dict[str, str]:
        done = self.command("join", "--json")
        assert done.returncode == 0, done.stderr
        said: dict[str, str] = json.loads(done.stdout)
        return said

    def node(self, node_id: str) -> dict[str, Any]:
        rows = self.host.call(f"{self.local}/fleet/status").json["nodes"]
        return next((row for row in rows if row["node_id"] == node_id), {})

    def until_status(self, node_id: str, status: str, *, patience_s: float = 30) -> dict[str, Any]:
        def row() -> dict[str, Any] | None:
            node = self.node(node_id)
            return node if node.get("status") == status else None

        found: dict[str, Any] = until(row, f"{node_id} to be {status}", patience_s=patience_s)
        return found
