"""The node state machine: one table. Whoever changes a node's state does it through `next_status`.

A node comes online only through `probe_ok`: a heartbeat proves that the node can call us, a probe that we can
call it. `beat` therefore means "from a node whose address and boot a probe has proven", `beat_unproven`
every other one; the first beat of an unknown node finds it `offline`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from herd.fleet.snapshot import NodeStatus

Who = Literal["agent", "router", "admin"]
Cause = Literal[
    "beat",
    "beat_unproven",
    "drain_beat",
    "new_boot",
    "new_address",
    "bad_address",
    "beat_late_15s",
    "beat_late_30s",
    "connect_failed",
    "call_refused",
    "call_refused_thrice",
    "probe_ok",
    "probe_failed",
    "approved",
]


class Row(NamedTuple):
    """Where one cause leads from each state, and who may be that cause."""

    cause: Cause
    who: Who
    pending: NodeStatus
    online: NodeStatus
    degraded: NodeStatus
    offline: NodeStatus
    draining: NodeStatus


# `pending` (a node that nobody approved yet) comes with keys: only an admin leads out of it.
TABLE: tuple[Row, ...] = (
    # cause                 who       pending    online      degraded    offline     draining
    Row("beat",               "agent",  "pending", "online",   "online",   "online",   "draining"),
    Row("beat_unproven",      "agent",  "pending", "offline",  "offline",  "offline",  "draining"),
    Row("drain_beat",         "agent",  "pending", "draining", "draining", "draining", "draining"),
    Row("new_boot",           "agent",  "pending", "offline",  "offline",  "offline",  "offline"),
    Row("new_address",        "agent",  "pending", "offline",  "offline",  "offline",  "draining"),
    Row("bad_address",        "router", "pending", "offline",  "offline",  "offline",  "offline"),
    Row("beat_late_15s",      "router", "pending", "degraded", "degraded", "offline",  "draining"),
    Row("beat_late_30s",      "router", "pending", "offline",  "offline",  "offline",  "offline"),
    Row("connect_failed",     "router", "pending", "offline",  "offline",  "offline",  "offline"),
    Row("call_refused",       "router", "pending", "offline",  "offline",  "offline",  "draining"),
    Row("call_refused_thrice", "router", "pending", "offline",  "offline",  "offline",  "offline"),
    Row("probe_ok",           "router", "pending", "online",   "degraded", "online",   "draining"),
    Row("probe_failed",       "router", "pending", "offline",  "offline",  "offline",  "offline"),
    Row("approved",           "admin",  "offline", "online",   "degraded", "offline",  "draining"),
)  # fmt: skip

STATUSES: tuple[NodeStatus, ...] = get_args(NodeStatus)
CAUSES: tuple[Cause, ...] = get_args(Cause)

_NEXT: dict[tuple[NodeStatus, Cause], NodeStatus] = {
    (status, row.cause): getattr(row, status) for row in TABLE for status in STATUSES
}


def next_status(status: NodeStatus, cause: Cause) -> NodeStatus:
    """Where `cause` leads from `status`."""
    return _NEXT[status, cause]
