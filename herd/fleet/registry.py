"""What the router believes about its nodes, and the only place where that belief changes.

    beats, probes, failed calls ──▶ Registry ──▶ snapshot()      frozen views, for the planner
    starts, records, ends       ──▶          ──▶ drain_events()  what to wake up for
                                             ──▶ status rows     for people

It does no I/O and reads no clock. A slot is a live attempt in a set; counts are `len()`, never arithmetic.
Only touched nodes and instances get new views, so an event costs what it changed.

In parts: `book` is what all share, `beats` and `liveness` take in what nodes say and do not say, `attempts`
keeps the slots; here is what others see.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from herd.fleet.attempt import AttemptResult, AttemptToken
from herd.fleet.beats import BeatOutcome, Beats
from herd.fleet.record import Node, ProbeTarget
from herd.fleet.snapshot import FleetSnapshot, InstanceView, NodeView
from herd.fleet.status import NodeStatusRow, status_row
from herd_node.protocol import wire
from herd_node.protocol.names import canonical

__all__ = ["AttemptResult", "AttemptToken", "BeatOutcome", "NodeStatusRow", "ProbeTarget", "Registry"]


class Registry(Beats):
    """Every node that was heard since the start. Not thread-safe: it belongs to the event loop."""

    def load_rates(self, rows: Iterable[tuple[str, str, str, float]]) -> None:
        """Take learned rates of an earlier run; call before the first beat."""
        self.rates.load(rows)
        for node in self._nodes.values():
            for instance in node.instances.values():
                self._refresh_rates(node, instance)
                self._note_stats(instance)

    def set_waiting(self, waiting: Mapping[str, int], by_node: Mapping[str, int] | None = None) -> None:
        """Requests waiting or held, by model; by node as the last plan claimed, if the caller counts that."""
        self._waiting_by_node = by_node
        if waiting != self._waiting:
            self._waiting = dict(waiting)
            self._changed()

    def set_remembered(self, holders: Mapping[str, Iterable[str]]) -> None:
        """Model → ids of nodes that listed it before the restart; those heard since speak for themselves."""
        known = set(self._nodes)
        left = {canonical(model): frozenset(nodes) - known for model, nodes in holders.items()}
        self._remembered = {model: nodes for model, nodes in left.items() if nodes}
        self._remembered_nodes = frozenset().union(*self._remembered.values())
        self._changed()

    def snapshot(self, now_s: float) -> FleetSnapshot:
        """The fleet now. The same object as the last time if nothing changed."""
        if self._due:
            self._expire(now_s)
        snapshot = self._snapshot
        if snapshot is None:
            stats = self._stats_shown
            if stats is None:
                stats = self._stats_shown = self._stats.copy()
            snapshot = self._snapshot = self._views.snapshot(
                self._slots_default, self._remembered, stats, self._waiting, self._last_sent_s.copy()
            )
        return snapshot

    def instance(self, node_id: str, instance_key: str) -> InstanceView:
        """The view of one instance as it is now."""
        return self._nodes[node_id].instances[instance_key].current_view(self._slots_default)

    def nodes_for_status(self, now_s: float) -> tuple[NodeStatusRow, ...]:
        """One row a node, by id: what `GET /fleet/status` and `herd status` show."""
        self._expire(now_s)
        waiting = self._waiting_by_node
        return tuple(
            status_row(
                node,
                now_s,
                self._slots_default,
                waiting=waiting.get(node_id, 0) if waiting is not None else self._waiting_for(node),
            )
            for node_id, node in sorted(self._nodes.items())
        )

    def _waiting_for(self, node: Node) -> int:
        names = {name.canonical for one in node.instances.values() for name in one.shown_names()}
        return sum(self._waiting.get(name, 0) for name in names)

    def beats(self) -> tuple[tuple[NodeView, wire.Heartbeat], ...]:
        """Every node's view and its last beat, by id, for the lists that clients ask for."""
        views = self.snapshot(float("-inf")).nodes
        return tuple((views[node_id], node.beat) for node_id, node in sorted(self._nodes.items()))

    def listed(self) -> dict[str, tuple[str, ...]]:
        """Canonical names that each node lists, for the database; without nodes not fully heard yet."""
        return {
            node_id: tuple(
                name.canonical
                for instance in node.instances.values()
                if instance.listed
                for name in instance.facts.names
            )
            for node_id, node in self._nodes.items()
            if node_id not in self._remembered_nodes
        }

    def address(self, node_id: str) -> tuple[str, int]:
        """Host and port of its gateway."""
        return self._nodes[node_id].address

    def contact(self, node_id: str) -> tuple[str, wire.Heartbeat]:
        """The host that it is called at and its last beat: while both stay, it is called in the same way."""
        node = self._nodes[node_id]
        return node.host, node.beat

    def agent(self, node_id: str) -> tuple[str, str, str]:
        """Agent id, boot and version, as its last beat has them."""
        beat = self._nodes[node_id].beat
        return beat.agent_id, beat.boot, beat.agent_version
