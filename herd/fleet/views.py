"""From touched nodes to the next snapshot: only what changed is made anew.

Keeps, beside the nodes' views, the list of holders of every model. The next snapshot costs the touched
nodes, the models they have, and shallow copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from herd.fleet.record import Node
from herd.fleet.snapshot import FleetSnapshot, InstanceView, ModelStats, NodeView

Holder = tuple[NodeView, InstanceView]


class Views:
    def __init__(self) -> None:
        self._touched: dict[str, Node] = {}
        self._nodes: dict[str, NodeView] = {}
        self._names: dict[str, list[str]] = {}
        """What each node's view lists, to find what it no longer does."""
        self._by_model: dict[str, dict[str, Holder]] = {}
        self._holders: dict[str, tuple[Holder, ...]] = {}

    def touch(self, node: Node) -> None:
        self._touched[node.node_id] = node

    def snapshot(
        self,
        slots_default: Mapping[str, int],
        *,
        remembered: Mapping[str, frozenset[str]],
        stats: Mapping[str, ModelStats],
        waiting: Mapping[str, int],
        last_sent_s: Mapping[str, float],
    ) -> FleetSnapshot:
        changed: dict[str, None] = {}
        for node in self._touched.values():
            changed.update(dict.fromkeys(self._renew(node, slots_default)))
        self._touched.clear()
        for name in changed:
            pairs = self._by_model[name]
            if pairs:
                self._holders[name] = tuple(pairs.values())
            else:
                del self._by_model[name], self._holders[name]
        return FleetSnapshot(
            nodes=self._nodes.copy(),
            holders=self._holders.copy(),
            remembered=remembered,
            stats=stats,
            waiting=waiting,
            any_online=any(view.status in ("online", "degraded") for view in self._nodes.values()),
            last_sent_s=last_sent_s,
        )

    def _renew(self, node: Node, slots_default: Mapping[str, int]) -> Iterable[str]:
        """A new view of one node; the names whose holders are others now."""
        node_id = node.node_id
        view = self._nodes[node_id] = node.current_view(slots_default)
        listed = []
        for one in view.instances:
            holder = (view, one)
            for name in one.names:
                listed.append(name.canonical)
                self._by_model.setdefault(name.canonical, {})[node_id] = holder
        before, self._names[node_id] = self._names.get(node_id, []), listed
        if before == listed:
            return listed
        gone = [name for name in before if name not in listed]
        for canonical in gone:
            del self._by_model[canonical][node_id]
        return (*gone, *listed)
