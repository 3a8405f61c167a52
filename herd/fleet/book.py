"""What every part of the registry shares: the nodes, what happened, what is due, and what was touched.

The parts (`beats`, `liveness`, `attempts`) change nodes only through it, so nothing changes unseen: whoever
changes a node says so with `_touch` or `_worked`, and an event is noted where it happened.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

from herd.fleet.events import EVENT_TYPES, Event, InstanceFreed, NodeChanged
from herd.fleet.instance import Instance
from herd.fleet.node import Cause, next_status
from herd.fleet.rates import EMBEDDING_STATS, LearnedRates
from herd.fleet.record import Node
from herd.fleet.snapshot import FleetSnapshot, ModelStats
from herd.fleet.views import Views

MAX_EVENTS = 4096
DEFAULT_SLOTS: Mapping[str, int] = {"ollama": 1, "llama-server": 1, "openai": 4}


class Book:
    """Not thread-safe: it belongs to the event loop."""

    def __init__(
        self,
        *,
        router_id: str,
        degraded_after_s: float = 15.0,
        offline_after_s: float = 30.0,
        slots_default: Mapping[str, int] | None = None,
        rates: LearnedRates | None = None,
    ) -> None:
        self.router_id = router_id
        self.version = 0
        self.rates = rates if rates is not None else LearnedRates()
        self._degraded_after_s = degraded_after_s
        self._offline_after_s = offline_after_s
        self._slots_default = DEFAULT_SLOTS if slots_default is None else slots_default
        self._nodes: dict[str, Node] = {}
        self._unproven: dict[str, None] = {}
        self._events: deque[tuple[Any, ...]] = deque(maxlen=MAX_EVENTS)
        """Each as its type and its fields: most are never read one by one."""
        self._due: list[tuple[float, int, Instance]] = []
        self._due_count = 0
        self._last_sweep_s: float | None = None
        self._resumed_s = float("-inf")
        # what the snapshot is made of
        self._views = Views()
        self._remembered: dict[str, frozenset[str]] = {}
        self._remembered_nodes: frozenset[str] = frozenset()
        self._stats: dict[str, ModelStats] = {}
        self._stats_shown: Mapping[str, ModelStats] | None = None
        """A copy that snapshots have; None when it is out of date."""
        self._waiting: dict[str, int] = {}
        self._waiting_by_node: Mapping[str, int] | None = None
        self._last_sent_s: dict[str, float] = {}
        self._snapshot: FleetSnapshot | None = None

    def drain_events(self, of: Collection[type[Event]] = EVENT_TYPES) -> list[Event]:
        """What happened since the last call, of these types. Of more than MAX_EVENTS only the last are kept.

        What nobody wants is thrown away without having been made.
        """
        events: list[Event] = [event[0](*event[1:]) for event in self._events if event[0] in of]
        self._events.clear()
        return events

    # ---- what is due --------------------------------------------------------------------------------------

    def next_due_s(self) -> float | None:
        """When the next settling slot, busy or bad mark ends; a snapshot after that shows it."""
        return self._due[0][0] if self._due else None

    def _remind(self, until_s: float, instance: Instance) -> None:
        self._due_count += 1
        heapq.heappush(self._due, (until_s, self._due_count, instance))

    def _expire(self, now_s: float) -> None:
        while self._due and self._due[0][0] <= now_s:
            _, _, instance = heapq.heappop(self._due)
            node = self._nodes[instance.node_id]
            for token, (_, until_s) in list(instance.settling.items()):
                if until_s <= now_s:
                    del instance.settling[token]
            self._freed(node, instance)

    def _freed(self, node: Node, instance: Instance) -> None:
        self._touch(node, instance)
        self._drop_if_gone(node, instance)
        self._events.append((InstanceFreed, node.node_id, instance.key))

    def _drop_if_gone(self, node: Node, instance: Instance) -> None:
        if not instance.listed and not instance.occupied and node.instances.get(instance.key) is instance:
            del node.instances[instance.key]

    # ---- what is known of models --------------------------------------------------------------------------

    def _refresh_rates(self, node: Node, instance: Instance) -> None:
        rates = self.rates.rates(node.node_id, instance.facts.rates_key, instance.guess)
        if rates != instance.rates:
            instance.rates = rates
            self._touch(node, instance)

    def _note_stats(self, instance: Instance) -> None:
        """The statistics of its names belong into the snapshot; an embedding model answers with one token."""
        for name in instance.facts.names:
            stats = self.rates.stats(name.canonical)
            if stats is None and "embedding" in name.capabilities and "completion" not in name.capabilities:
                stats = EMBEDDING_STATS
            if stats is not None and self._stats.get(name.canonical) != stats:
                self._learned(name.canonical, stats)

    def _learned(self, model: str, stats: ModelStats) -> None:
        self._stats[model] = stats
        self._stats_shown = None

    # ---- what changed -------------------------------------------------------------------------------------

    def _apply(self, node: Node, cause: Cause, reason: str | None, now_s: float) -> None:
        """The only way to another status."""
        was = node.status
        node.status = next_status(was, cause)
        if node.status == "online":
            reason = None
            if was not in ("online", "degraded"):
                node.online_since_s = now_s
        elif reason is None or (node.status == was == "draining"):
            reason = node.reason
        if (was, node.reason) != (node.status, reason):
            node.reason = reason
            self._touch(node)
            self._events.append((NodeChanged, node.node_id, node.status, reason))

    def _touch(self, node: Node, instance: Instance | None = None) -> None:
        """The node's own facts changed, or those of an instance."""
        self._views.touch(node, instance)
        self._changed()

    def _worked(self, node: Node, instance: Instance) -> None:
        """Work came or went, and that is all that changed: the cheap half of `_touch`."""
        self.version += 1
        if instance.worked and self._snapshot is None:
            return  # it was said before, and nobody has looked since
        self._snapshot = None
        if instance.listed and not instance.delisted:
            self._views.worked(node, instance)
        else:
            self._views.touch(node, instance)  # whether it is seen at all may depend on its work

    def _changed(self) -> None:
        self.version += 1
        self._snapshot = None
