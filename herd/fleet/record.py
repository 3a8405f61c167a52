"""One node as the registry keeps it: its last beat, its state, its instances. Only the registry holds one."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from typing import NamedTuple

from herd.fleet.attempt import AttemptToken
from herd.fleet.hardware import UNIFIED_GPU_RATIO, UNKNOWN_CPU, Machine
from herd.fleet.instance import Instance
from herd.fleet.snapshot import NODE_FIXED, BusyShare, InstanceView, NodeStatus, NodeView
from herd_node.protocol import wire

BUSY_TAU_S = 180.0
FIRST_PROBE_AFTER_S = 1.0
LONGEST_PROBE_AFTER_S = 30.0
#: A probe that was handed out and never answered for: the prober lost it.
PROBE_LOST_S = 30.0
NOT_PROBED = "not probed yet"
_NEVER = float("inf")
_LOADED_A_DEVICE = 3


class ProbeTarget(NamedTuple):
    """Whom to ping, and where; `boot` is the agent's, which its reply must be signed with."""

    node_id: str
    host: str
    port: int
    boot: str
    key_id: str


class Node:
    __slots__ = (
        "attempts",
        "beat",
        "busy",
        "company",
        "drain_boot",
        "fixed",
        "host",
        "instances",
        "last_beat_s",
        "last_chosen_s",
        "machine",
        "next_probe_s",
        "node_id",
        "online_since_s",
        "probe_delay_s",
        "probing",
        "probing_since_s",
        "proven",
        "reason",
        "refusals_s",
        "silent",
        "status",
        "view",
        "views",
        "worked",
    )

    def __init__(self, beat: wire.Heartbeat, host: str, now_s: float) -> None:
        self.node_id = beat.node_id
        self.beat = beat
        self.host = host
        self.last_beat_s = now_s
        self.status: NodeStatus = "offline"
        self.reason: str | None = NOT_PROBED
        self.instances: dict[str, Instance] = {}
        self.attempts: set[AttemptToken] = set()
        """Every live attempt on this node, in whichever instance."""
        self.company = 0
        """How often two were seen to work here at once. One that saw it change was not alone."""
        self.machine: Machine = UNKNOWN_CPU
        self.busy = BusyShare(0.0, now_s, False)
        self.last_chosen_s = 0.0
        self.online_since_s = 0.0
        self.drain_boot: str | None = None
        self.silent = False
        """Whether its beats stopped since it was last called proven."""
        self.proven = False
        """Whether a probe has reached this boot at this address since the last failure."""
        self.probing: ProbeTarget | None = None
        self.probing_since_s = 0.0
        self.next_probe_s = now_s
        self.probe_delay_s = FIRST_PROBE_AFTER_S
        self.refusals_s: list[float] = []
        self.view: NodeView | None = None
        self.fixed: tuple[object, ...] = ()
        """The first fields of `view`, which work does not change."""
        self.views: list[InstanceView] = []
        """Its `instances`."""
        self.worked: list[Instance] = []
        """Instances whose part of `view` is out of date in what work changes, and in nothing else."""

    @property
    def address(self) -> tuple[str, int]:
        return self.host, self.beat.gateway.port

    @property
    def draining(self) -> bool:
        """Sticky: a boot that once said so drains until it ends."""
        return self.drain_boot == self.beat.boot

    def target(self) -> ProbeTarget:
        beat = self.beat
        key_id = f"{self.node_id}/{beat.agent_id}"
        return ProbeTarget(self.node_id, self.host, beat.gateway.port, beat.boot, key_id)

    def want_probe(self, now_s: float, *, after_s: float = 0.0) -> None:
        """From here on it is not called until a probe succeeds; the delays start anew."""
        self.proven = False
        self.next_probe_s = now_s + after_s
        self.probe_delay_s = 2 * after_s or FIRST_PROBE_AFTER_S

    def refuse_address(self) -> None:
        """It is not probed before a beat from an address that may be called (`want_probe`)."""
        self.proven = False
        self.next_probe_s = _NEVER

    @property
    def address_refused(self) -> bool:
        return self.next_probe_s == _NEVER

    def settling(self) -> int:
        return sum(len(instance.settling) for instance in self.instances.values())

    def probe_due(self, now_s: float) -> bool:
        if self.proven or self.status != "offline" or self.silent or now_s < self.next_probe_s:
            return False
        running = self.probing is not None and now_s - self.probing_since_s < PROBE_LOST_S
        return not running or self.probing != self.target()

    def probe_failed(self, now_s: float) -> None:
        self.proven = False
        self.next_probe_s = now_s + self.probe_delay_s
        self.probe_delay_s = min(2 * self.probe_delay_s, LONGEST_PROBE_AFTER_S)

    def count_busy(self, now_s: float) -> None:
        """Bring the busy share up to date; called after work came or went."""
        value, at_s, busy_now = self.busy
        if busy_now == bool(self.attempts):
            return
        kept = exp((at_s - now_s) / BUSY_TAU_S) if now_s > at_s else 1.0
        value = 1.0 - (1.0 - value) * kept if busy_now else value * kept
        self.busy = tuple.__new__(BusyShare, (value, now_s, not busy_now))

    def current_view(self, defaults: Mapping[str, int]) -> NodeView:
        """What work changes is made anew; the rest only after `view` was set to None."""
        view = self.view
        if view is None:
            view = self.view = self._make_view(defaults)
            self.fixed, self.views = view[:NODE_FIXED], list(view.instances)
        else:
            for instance in self.worked:
                self.views[instance.place] = instance.current_view(defaults)
            work = (tuple(self.views), self.busy, self.last_chosen_s)
            view = self.view = tuple.__new__(NodeView, self.fixed + work)
        self.worked.clear()
        return view

    def _make_view(self, defaults: Mapping[str, int]) -> NodeView:
        beat = self.beat
        gpu_total, gpu_used = gpu_memory(beat)
        return NodeView(
            node_id=self.node_id,
            status=self.status,
            reason=self.reason,
            last_beat_s=self.last_beat_s,
            agent_version=beat.agent_version,
            backends_ready={backend.id: backend.ready for backend in beat.backends},
            pressure=beat.memory.pressure or "normal",
            heat=beat.heat.state,
            memory_total_bytes=beat.memory.total_bytes or beat.hardware.memory_bytes,
            memory_available_bytes=beat.memory.available_bytes,
            gpu_total_bytes=gpu_total,
            gpu_used_bytes=gpu_used,
            max_loaded=max_loaded(beat),
            online_since_s=self.online_since_s,
            instances=self._instance_views(defaults),
            busy_share=self.busy,
            last_chosen_s=self.last_chosen_s,
        )

    def _instance_views(self, defaults: Mapping[str, int]) -> tuple[InstanceView, ...]:
        views: list[InstanceView] = []
        for instance in self.instances.values():
            view = instance.current_view(defaults)
            # One without names is seen only while work runs in it: nothing new goes there.
            if view.names or instance.occupied:
                instance.place = len(views)
                views.append(view)
        return tuple(views)


def gpu_memory(beat: wire.Heartbeat) -> tuple[int | None, int | None]:
    """Bytes in total and in use over all GPUs. None where nothing is known, or there is no GPU."""
    total = sum(gpu.memory_total_bytes or 0 for gpu in beat.gpus)
    if total:
        known = [gpu.memory_used_bytes for gpu in beat.gpus if gpu.memory_used_bytes is not None]
        return total, sum(known) if known else None
    memory_bytes = beat.hardware.memory_bytes or beat.memory.total_bytes
    if not beat.hardware.unified_memory or not memory_bytes:
        return None, None
    # Unified memory: a share of it is the GPU's, as far as nobody else has taken it.
    usable = int(memory_bytes * UNIFIED_GPU_RATIO)
    available = beat.memory.available_bytes
    return usable, usable - min(usable, available) if available is not None else None


def max_loaded(beat: wire.Heartbeat) -> int | None:
    """Most models that its Ollama keeps loaded (docs/scheduling.md §1); None: nothing there is unloaded."""
    for backend in beat.backends:
        if backend.kind == "ollama":
            return backend.max_loaded or _LOADED_A_DEVICE * max(1, len(beat.gpus))
    return None
