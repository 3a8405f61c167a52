"""From touched nodes to the next snapshot: only what changed is made anew.

Keeps, beside the nodes' views, who lists which model, and who is online. A snapshot costs the touched nodes
and two shallow copies, however many models they list; `snapshot.listing_of` makes the same from nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from herd.fleet.instance import Instance
from herd.fleet.record import Node
from herd.fleet.snapshot import FleetSnapshot, Listing, ModelStats, NodeView, listed_names

_Names = tuple[tuple[str, int], ...]


class Views:
    def __init__(self) -> None:
        self._touched: dict[str, Node] = {}
        self._nodes: dict[str, NodeView] = {}
        self._names: dict[str, _Names] = {}
        """What each node's view lists, to find what it no longer does."""
        self._listing: Listing = {}
        self._online: set[str] = set()

    def touch(self, node: Node, instance: Instance | None = None) -> None:
        """The node's own facts changed, or those of an instance: which names it has, its state, its marks."""
        if instance is not None:
            instance.view = None
        node.view = None
        self._touched[node.node_id] = node

    def worked(self, node: Node, instance: Instance) -> None:
        """Work came or went, or taught us something: nothing but the last fields of both views changed."""
        if not instance.worked:
            instance.worked = True
            node.worked.append(instance)
        self._touched[node.node_id] = node

    def snapshot(
        self,
        slots_default: Mapping[str, int],
        remembered: Mapping[str, frozenset[str]],
        stats: Mapping[str, ModelStats],
        waiting: Mapping[str, int],
        last_sent_s: Mapping[str, float],
    ) -> FleetSnapshot:
        touched, before, worked = self._touched, self._nodes, None
        if touched:
            nodes = self._nodes = before.copy()  # whoever has the one before keeps it
            only_work = True
            for node_id, node in touched.items():
                anew = node.view is None
                view = nodes[node_id] = node.current_view(slots_default)
                if anew:
                    only_work = False
                    self._note(view)
            if only_work:
                worked = (before, nodes, tuple(touched))
            touched.clear()
        online = bool(self._online)
        seen = (self._nodes, self._listing, remembered, stats, waiting, online, last_sent_s, worked)
        return tuple.__new__(FleetSnapshot, seen)  # past the generated constructor: once a request

    def _note(self, view: NodeView) -> None:
        """What only a new view can change: whether it is online, and what it lists."""
        node_id = view.node_id
        if view.status in ("online", "degraded"):
            self._online.add(node_id)
        else:
            self._online.discard(node_id)
        before, names = self._names.get(node_id), listed_names(view)
        if before == names:
            return
        self._names[node_id] = names
        listing = dict(self._listing)
        for name, _ in before or ():
            listing[name] = tuple([place for place in listing[name] if place[0] != node_id])
        for name, at in names:
            listing[name] = (*listing.get(name, ()), (node_id, at))
        for name, _ in before or ():
            if not listing[name]:
                del listing[name]
        self._listing = listing
