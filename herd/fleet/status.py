"""One node as people and scripts see it: the rows of `GET /fleet/status` (docs/behaviour.md).

Every count is the router's own and live; what the agent said of itself stands under `reported`. Field names
are a contract: renaming one breaks scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from herd.fleet.instance import Instance
from herd.fleet.record import Node
from herd.fleet.snapshot import InstanceState, NodeStatus
from herd_node.protocol import wire


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendRow:
    id: str
    kind: str | None
    version: str | None
    ready: bool
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """One name of an instance. `slots` are shared by all its names; `in_flight` is this name's own."""

    name: str
    state: InstanceState
    size_bytes: int | None
    context: int | None
    slots: int
    in_flight: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What the agent said in its last beat: all routers together."""

    in_flight_by_agent: int
    slots_taken: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatusRow:
    node_id: str
    status: NodeStatus
    reason: str | None
    agent_version: str | None
    last_seen_s: float
    hardware: wire.Hardware
    cpu: wire.Cpu
    memory: wire.Memory
    disk: wire.Disk
    heat: wire.Heat
    gpus: tuple[wire.Gpu, ...]
    backends: tuple[BackendRow, ...]
    models: tuple[ModelRow, ...]
    in_flight: int
    waiting: int
    settling: int
    reported: Reported

    def as_dict(self) -> dict[str, object]:
        """Plain values, for a JSON writer that knows no dataclasses."""
        return asdict(self)


def status_row(node: Node, now_s: float, defaults: Mapping[str, int], *, waiting: int) -> NodeStatusRow:
    beat = node.beat
    instances = list(node.instances.values())
    taken = [one.slots_taken for one in instances if one.slots_taken is not None]
    return NodeStatusRow(
        node_id=node.node_id,
        status=node.status,
        reason=node.reason,
        agent_version=beat.agent_version,
        last_seen_s=round(max(0.0, now_s - node.last_beat_s), 3),
        hardware=beat.hardware,
        cpu=beat.cpu,
        memory=beat.memory,
        disk=beat.disk,
        heat=beat.heat,
        gpus=beat.gpus,
        backends=tuple(
            BackendRow(id=one.id, kind=one.kind, version=one.version, ready=one.ready, reason=one.reason)
            for one in beat.backends
        ),
        models=tuple(row for instance in instances for row in _model_rows(instance, defaults)),
        in_flight=len(node.attempts),
        waiting=waiting,
        settling=node.settling(),
        reported=Reported(
            in_flight_by_agent=sum(beat.in_flight.values()), slots_taken=sum(taken) if taken else None
        ),
    )


def _model_rows(instance: Instance, defaults: Mapping[str, int]) -> list[ModelRow]:
    models = [running.model for running in instance.running.values()]
    return [
        ModelRow(
            name=name.shown,
            state=instance.state,
            size_bytes=instance.facts.size_bytes,
            context=instance.facts.context_tokens,
            slots=instance.slots(defaults),
            in_flight=models.count(name.canonical),
        )
        for name in instance.shown_names()
    ]
