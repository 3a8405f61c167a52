"""Heartbeat v1: the values, and the only parser and renderer of them (docs/protocol.md §3).

A value that is not known is None, never 0 and never invented. Unknown fields are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

VERSION = 1
MAX_BEAT_BYTES = 256 * 1024

PressureWord = Literal["normal", "warn", "critical"]
HeatWord = Literal["nominal", "fair", "serious", "critical"]
BackendKind = Literal["ollama", "llama-server", "llama-router", "openai"]
ModelState = Literal["hot", "loading", "warm", "cold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    port: int
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    os: str | None = None
    os_version: str | None = None
    arch: str | None = None
    cpu_model: str | None = None
    cores_physical: int | None = None
    cores_logical: int | None = None
    memory_bytes: int | None = None
    unified_memory: bool | None = None
    mac_addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    percent: float | None = None
    load_1m: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    total_bytes: int | None = None
    used_bytes: int | None = None
    available_bytes: int | None = None
    swap_used_bytes: int | None = None
    pressure: PressureWord | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    total_bytes: int | None = None
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    state: HeatWord | None = None
    cpu_c: float | None = None
    throttled: bool | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    on_battery: bool | None = None
    battery_percent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    name: str | None = None
    vendor: str | None = None
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    utilisation_percent: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    throttle: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    id: str
    kind: BackendKind | None = None
    version: str | None = None
    ready: bool = False
    reason: str | None = None
    max_loaded: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    name: str
    aliases: tuple[str, ...] = ()
    weights: str | None = None
    backend: str
    capabilities: tuple[str, ...] = ()
    state: ModelState = "cold"
    unloaded_s_ago: float | None = None
    size_bytes: int | None = None
    vram_bytes: int | None = None
    quantisation: str | None = None
    parameters: int | None = None
    kv_bytes_per_token: int | None = None
    context_train_tokens: int | None = None
    context_tokens: int | None = None
    context_fixed: bool = False
    slots: int | None = None
    slots_taken: int | None = None
    expires_in_s: float | None = None
    members: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """One beat, parsed and validated."""

    node_id: str
    agent_id: str
    boot: str
    seq: int
    interval_s: float
    agent_version: str
    draining: bool = False
    gateway: Gateway
    hardware: Hardware = field(default_factory=Hardware)
    cpu: Cpu = field(default_factory=Cpu)
    memory: Memory = field(default_factory=Memory)
    disk: Disk = field(default_factory=Disk)
    heat: Heat = field(default_factory=Heat)
    power: Power = field(default_factory=Power)
    gpus: tuple[Gpu, ...] = ()
    backends: tuple[Backend, ...] = ()
    models: tuple[Model, ...] = ()
    in_flight: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatReply:
    """The router's answer to an accepted beat."""

    router_id: str
    boot: str
    state: Literal["online", "draining", "pending", "unreachable"]
    reason: str | None = None
    interval_s: float | None = None
