"""Back-pressure through both programs: a client that asks for much and reads nothing costs little, and is
dropped in the end (docs/behaviour.md, "Deadlines")."""

from __future__ import annotations

import json
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bench import machine
from bench.build import build
from bench.targets import Stage, Target
from tests.e2e.kit import until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

CLIENTS = 200
MOST_KIB = 256
"""Of each of the programs, for each of the clients."""
WRITE_TIMEOUT_S = 12


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    """A router and an agent in front of a backend that writes as fast as it is read."""
    data_dir = tmp_path / "router-of-agent-data"
    data_dir.mkdir(mode=0o700)
    (data_dir / "herd.toml").write_text(f"write_timeout_s = {WRITE_TIMEOUT_S}\n")
    with Stage(build(), tmp_path, []) as stage:
        (found,) = stage.targets(["agent"])
        yield found


def ask(port: int) -> socket.socket:
    body = json.dumps(
        {
            "model": "bench",
            "messages": [{"role": "user", "content": "Tell me everything."}],
            "max_tokens": 100_000_000,
            "stream": True,
        }
    ).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body)
    sock.sendall(head + body)
    return sock


def get(target: Target, path: str) -> Any:
    with urllib.request.urlopen(f"http://127.0.0.1:{target.port}{path}", timeout=10) as answer:
        return json.loads(answer.read())


def in_flight(target: Target) -> int:
    return int(get(target, "/fleet/status")["nodes"][0]["in_flight"])


def statuses(target: Target) -> list[str]:
    rows = get(target, f"/dashboard/api/traces?limit={2 * CLIENTS}")["traces"]
    return [row["status"] for row in rows]


def test_clients_that_read_nothing_cost_little_and_are_dropped(target: Target) -> None:
    with ExitStack() as clients:
        clients.enter_context(ask(target.port)).recv(1)  # whatever is made at the first request
        assert in_flight(target) == 1
        at_first = {name: machine.pss_bytes(pid) for name, pid in target.parts.items()}
        for _ in range(CLIENTS):
            clients.enter_context(ask(target.port))
        most = dict(at_first)

        def all_dropped() -> bool:
            for name, pid in target.parts.items():
                most[name] = max(most[name], machine.pss_bytes(pid))
            return not in_flight(target)

        until(all_dropped, "all clients to be dropped")
        cost_kib = {name: (most[name] - at_first[name]) / CLIENTS / 1024 for name in most}
        assert max(cost_kib.values()) <= MOST_KIB, cost_kib
        until(lambda: statuses(target).count("client_gone") == CLIENTS + 1, "their rows to say so")
        assert "started" not in statuses(target)
