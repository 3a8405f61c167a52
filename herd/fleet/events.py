"""What happened in the fleet, typed. The registry collects events; the planner wakes on them.

Events say that something changed, never what to do: whoever wakes takes a new snapshot and decides.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias, get_args

from herd.fleet.snapshot import InstanceState, NodeStatus


class NodeReported(NamedTuple):
    """A beat was accepted."""

    node_id: str


class NodeChanged(NamedTuple):
    """Status or reason of a node is another one."""

    node_id: str
    status: NodeStatus
    reason: str | None


class ModelChanged(NamedTuple):
    """An instance appeared, changed its state or its names, or is gone (`state` None)."""

    node_id: str
    instance_key: str
    state: InstanceState | None


class AttemptStarted(NamedTuple):
    node_id: str
    instance_key: str
    request_id: str


class AttemptFirstRecord(NamedTuple):
    node_id: str
    instance_key: str
    request_id: str


class AttemptEnded(NamedTuple):
    """The request left. Its slot is free, unless `settling`: then `InstanceFreed` follows."""

    node_id: str
    instance_key: str
    request_id: str
    ok: bool
    settling: bool


class InstanceFreed(NamedTuple):
    """A mark ended: settling slots, `busy`, or `bad`."""

    node_id: str
    instance_key: str


Event: TypeAlias = (
    NodeReported
    | NodeChanged
    | ModelChanged
    | AttemptStarted
    | AttemptFirstRecord
    | AttemptEnded
    | InstanceFreed
)

EVENT_TYPES: frozenset[type[Event]] = frozenset(get_args(Event))
