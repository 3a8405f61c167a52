"""Readings in, heartbeat out. Pure: it decides what is said of this node, not when or to whom.

A name stands for one model on a node: when two backends list the same one, the first that is ready keeps it,
because that is the one the gateway sends to. What would not fit the wire (too many, too long) is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from herd_node.protocol.names import canonical, is_model_name
from herd_node.protocol.wire import (
    Backend,
    BackendKind,
    Cpu,
    Disk,
    Gateway,
    Gpu,
    Hardware,
    Heartbeat,
    Heat,
    Memory,
    Model,
    Power,
)

MAX_MODELS = 512
MAX_TEXT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What the sensors read of the machine; all unknown until the first reading is in."""

    hardware: Hardware = field(default_factory=Hardware)
    cpu: Cpu = field(default_factory=Cpu)
    memory: Memory = field(default_factory=Memory)
    disk: Disk = field(default_factory=Disk)
    heat: Heat = field(default_factory=Heat)
    power: Power = field(default_factory=Power)
    gpus: tuple[Gpu, ...] = ()


class BackendState(NamedTuple):
    """One backend as its last poll saw it."""

    id: str
    kind: BackendKind | None
    version: str | None
    ready: bool
    reason: str | None
    max_loaded: int | None
    models: tuple[Model, ...]
    endpoints: tuple[str, ...] = ()
    manages: tuple[str, ...] = ()
    disk_free_bytes: int | None = None


class Self(NamedTuple):
    """What does not change while the agent runs, but for its addresses."""

    node_id: str
    agent_id: str
    boot: str
    agent_version: str
    interval_s: float
    port: int


def heartbeat(
    me: Self,
    *,
    seq: int,
    draining: bool,
    addresses: Sequence[str],
    host: Host,
    backends: Sequence[BackendState],
    in_flight: Mapping[str, int],
) -> Heartbeat:
    """One beat. `in_flight` counts live calls by the model's name."""
    return Heartbeat(
        node_id=me.node_id,
        agent_id=me.agent_id,
        boot=me.boot,
        seq=seq,
        interval_s=me.interval_s,
        agent_version=me.agent_version,
        draining=draining,
        gateway=Gateway(port=me.port, addresses=tuple(addresses)[:MAX_MODELS]),
        hardware=host.hardware,
        cpu=host.cpu,
        memory=host.memory,
        disk=host.disk,
        heat=host.heat,
        power=host.power,
        gpus=host.gpus,
        backends=tuple(_backend(state) for state in backends),
        models=models(backends),
        in_flight=dict(in_flight),
    )


def models(backends: Sequence[BackendState]) -> tuple[Model, ...]:
    """Every model of the node once, in the order of the backends; those that are ready go first."""
    taken: set[str] = set()
    listed: list[Model] = []
    for state in sorted(backends, key=lambda state: not state.ready):
        for model in state.models:
            name = canonical(model.name)
            if name in taken or not is_model_name(model.name) or len(model.name) > MAX_TEXT:
                continue
            aliases = tuple(
                alias for alias in model.aliases if is_model_name(alias) and canonical(alias) not in taken
            )
            taken.add(name)
            taken.update(canonical(alias) for alias in aliases)
            listed.append(model if aliases == model.aliases else replace(model, aliases=aliases))
    return tuple(listed) if len(listed) <= MAX_MODELS else _first(listed, MAX_MODELS)


def shortened(beat: Heartbeat) -> Heartbeat:
    """A beat with fewer models, for when it would be larger than the router takes."""
    return replace(beat, models=_first(beat.models, len(beat.models) * 3 // 4))


def _first(listed: Sequence[Model], number: int) -> tuple[Model, ...]:
    """Those that are loaded stay: the router must not believe their memory free."""
    return tuple(sorted(listed, key=lambda model: model.state not in ("hot", "loading"))[:number])


def standing(backends: Sequence[BackendState]) -> object:
    """What must be told within 250 ms when it changes: a backend up or down, a model loaded or gone, slots
    that are idle again."""
    return tuple(
        (
            state.id,
            state.kind,
            state.ready,
            frozenset((model.name, model.state, model.slots_taken == 0) for model in state.models),
        )
        for state in backends
    )


def _backend(state: BackendState) -> Backend:
    return Backend(
        id=state.id,
        kind=state.kind,
        version=_short(state.version),
        ready=state.ready,
        reason=_short(state.reason),
        max_loaded=state.max_loaded,
        endpoints=state.endpoints,
        manages=state.manages,
        disk_free_bytes=state.disk_free_bytes,
    )


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
