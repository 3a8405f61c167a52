"""A router's memory, fresh from its start and after many requests: one of its own, that did nothing else."""

from __future__ import annotations

import threading
from typing import NamedTuple

from bench import fleet, machine
from bench.errors import BenchError
from bench.processes import free_port
from bench.rounds import Bench
from bench.scenarios import BY_NAME
from bench.targets import Stage

REQUESTS = 20_000
#: Rows are written and start-up garbage is gone by then.
_SETTLE_S = 2.0


class Memory(NamedTuple):
    """Proportional set sizes in bytes."""

    fresh_bytes: int
    """It serves, and has never heard of a node."""
    with_nodes_bytes: int
    after_bytes: int
    requests: int

    @property
    def growth_bytes(self) -> int:
        return self.after_bytes - self.with_nodes_bytes


def measure(stage: Stage, bench: Bench, requests: int = REQUESTS) -> Memory:
    """Raises BenchError when a request fails."""
    signer_port = free_port()
    backend_port = stage.backend("backend-of-memory", signer_port)
    router = stage.router("router-of-memory")
    fresh = _settled_pss(router.program.pid)
    stage.direct_nodes("nodes-of-memory", router, backend_port, signer_port)
    with_nodes = _settled_pss(router.program.pid)
    scenario = BY_NAME["short-8"]
    path = stage.folder / "memory.request"
    path.write_bytes(scenario.request(fleet.MODEL))
    raw = bench.load(scenario, router.port, path, "--requests", str(requests), limit_s=300.0)
    if raw["errors"]:
        raise BenchError(f"{raw['errors']} of {requests} requests failed: {raw['first_error']}")
    return Memory(fresh, with_nodes, _settled_pss(router.program.pid), requests)


def _settled_pss(pid: int) -> int:
    threading.Event().wait(_SETTLE_S)
    return machine.pss_bytes(pid)
