"""What the router believes about its nodes, and the only place where that belief changes.

    beats, probes, failed calls ──▶ Registry ──▶ snapshot()      frozen views, for the planner
    starts, records, ends       ──▶          ──▶ drain_events()  what to wake up for
                                             ──▶ status rows     for people

It does no I/O and reads no clock. A slot is a live attempt in a set; counts are `len()`, never arithmetic.
Only touched nodes and instances get new views, so an event costs what it changed.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from herd.fleet import address, hardware
from herd.fleet.attempt import AttemptResult, AttemptToken, sample
from herd.fleet.events import (
    AttemptEnded,
    AttemptFirstRecord,
    AttemptStarted,
    Event,
    InstanceFreed,
    ModelChanged,
    NodeChanged,
    NodeReported,
)
from herd.fleet.held import NOTHING_HELD
from herd.fleet.instance import Instance, Report, merge
from herd.fleet.node import Cause, next_status
from herd.fleet.rates import EMBEDDING_STATS, LearnedRates, first_guess
from herd.fleet.record import FIRST_PROBE_AFTER_S, NOT_PROBED, Node, ProbeTarget
from herd.fleet.snapshot import FleetSnapshot, InstanceView, ModelStats, NodeView, Running
from herd.fleet.status import NodeStatusRow, status_row
from herd.fleet.views import Views
from herd.request import PrefixMark
from herd_node.protocol import wire
from herd_node.protocol.names import canonical

__all__ = ["AttemptResult", "AttemptToken", "BeatOutcome", "NodeStatusRow", "ProbeTarget", "Registry"]

#: A node id belongs to the agent that was heard so recently.
CONFLICT_S = 30.0
#: Sweeps further apart than this mean that this process stood still, not that the nodes were silent.
LAG_S = 5.0
#: So many refused signatures in so long: the node is unreachable.
REFUSALS = 3
REFUSALS_WITHIN_S = 60.0
#: A beat tells about a cancelled request only if it was written after the cancel reached the backend.
SETTLE_SEEN_S = 1.0
MAX_EVENTS = 4096
DEFAULT_SLOTS: Mapping[str, int] = {"ollama": 1, "llama-server": 1, "openai": 4}

ReplyState = Literal["online", "draining", "pending", "unreachable"]


class BeatOutcome(NamedTuple):
    """What to answer a beat with. `conflict`: 409, and nothing has changed."""

    reply_state: ReplyState
    reason: str | None
    needs_probe: bool
    conflict: bool


class Registry:
    """Every node that was heard since the start. Not thread-safe: it belongs to the event loop."""

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
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._due: list[tuple[float, int, Instance]] = []
        self._due_count = 0
        self._last_sweep_s: float | None = None
        self._resumed_s = float("-inf")
        # what the snapshot is made of
        self._views = Views()
        self._remembered: dict[str, frozenset[str]] = {}
        self._remembered_nodes: frozenset[str] = frozenset()
        self._stats: dict[str, ModelStats] = {}
        self._waiting: dict[str, int] = {}
        self._waiting_by_node: Mapping[str, int] | None = None
        self._last_sent_s: dict[str, float] = {}
        self._snapshot: FleetSnapshot | None = None

    # ---- heartbeats -------------------------------------------------------------------------------------

    def on_beat(self, hb: wire.Heartbeat, peer_host: str, now_s: float) -> BeatOutcome:
        """Take in a beat whose signature and sequence were right."""
        host = str(address.normal_host(peer_host) or peer_host)
        node = self._nodes.get(hb.node_id)
        # 1. the id is another agent's
        if node is not None and node.beat.agent_id != hb.agent_id and now_s - node.last_beat_s < CONFLICT_S:
            reason = (
                f"another agent, at {node.host}, has the node id {hb.node_id!r}: choose another --node-id"
            )
            return BeatOutcome("unreachable", reason, needs_probe=False, conflict=True)
        # 2. first sight, or the same node elsewhere or anew
        if node is None:
            node = self._nodes[hb.node_id] = Node(hb, host, now_s)
            self._unproven[hb.node_id] = None
        else:
            self._moved(node, hb, host, now_s)
        self._take_in(node, hb, now_s)
        # 3. may it be called there at all
        refused = address.refused(peer_host, hb.gateway.port, hb.gateway.addresses)
        if refused is not None:
            node.refuse_address()
            self._unproven[node.node_id] = None
            self._apply(node, "bad_address", refused, now_s)
        else:
            self._heard(node, now_s)
        self._events.append(NodeReported(node.node_id))
        return BeatOutcome(_reply_state(node), node.reason, node.probe_due(now_s), conflict=False)

    def _moved(self, node: Node, hb: wire.Heartbeat, host: str, now_s: float) -> None:
        """Another boot or address must be proven anew; what runs there is left to end by itself (F38)."""
        rebooted = (hb.agent_id, hb.boot) != (node.beat.agent_id, node.beat.boot)
        if not rebooted and (host, hb.gateway.port) == node.address:
            return
        node.host = host
        self._distrust(node, now_s)
        self._apply(node, "new_boot" if rebooted else "new_address", NOT_PROBED, now_s)
        if rebooted:
            node.refusals_s.clear()
            for instance in node.instances.values():
                instance.held = NOTHING_HELD
                self._touch(node, instance)

    def _heard(self, node: Node, now_s: float) -> None:
        """A beat from where the node may be called."""
        anew = node.silent or node.address_refused
        node.silent = False
        if node.address_refused:
            node.want_probe(now_s)
        if node.draining:
            self._apply(node, "drain_beat", "draining: it finishes what runs and takes nothing new", now_s)
        elif node.proven:
            self._apply(node, "beat", None, now_s)
        else:
            reason = NOT_PROBED if anew else node.reason or NOT_PROBED
            self._apply(node, "beat_unproven", reason, now_s)

    def _take_in(self, node: Node, hb: wire.Heartbeat, now_s: float) -> None:
        """The beat becomes the node's last one, its models the node's instances."""
        before = (node.beat.hardware, [gpu.name for gpu in node.beat.gpus])
        fresh_machine = not node.instances or before != (hb.hardware, [gpu.name for gpu in hb.gpus])
        node.beat, node.last_beat_s = hb, now_s
        if hb.draining:
            node.drain_boot = hb.boot
        if fresh_machine:
            node.machine = hardware.machine(hb.hardware, hb.gpus)
        reports = merge(hb)
        for key, report in reports.items():
            self._take_in_instance(node, key, report, now_s, fresh_machine)
        self._unlist_others(node, hb, reports, now_s)
        if sum(hb.in_flight.values()) > len(node.attempts) + node.settling():
            node.company += 1  # another router works there too
        self._forget_remembered(hb)
        self._touch(node)

    def _take_in_instance(
        self, node: Node, key: str, report: Report, now_s: float, fresh_machine: bool
    ) -> None:
        instance = node.instances.get(key)
        facts = report.facts
        if instance is None:
            guess = first_guess(node.machine, facts.size_bytes, facts.parameters)
            rates = self.rates.rates(node.node_id, facts.rates_key, guess)
            instance = node.instances[key] = Instance(node.node_id, key, report, rates, guess)
            if report.state == "loading":
                instance.loading_since_s = now_s
            self._note_stats(instance)
            self._touch(node, instance)
            self._events.append(ModelChanged(node.node_id, key, instance.state))
            return
        resized = (facts.size_bytes, facts.parameters, facts.rates_key) != (
            instance.facts.size_bytes,
            instance.facts.parameters,
            instance.facts.rates_key,
        )
        if instance.hear(report, now_s):
            self._note_stats(instance)
            self._touch(node, instance)
            self._events.append(ModelChanged(node.node_id, key, instance.state))
        if resized or fresh_machine:
            instance.guess = first_guess(node.machine, facts.size_bytes, facts.parameters)
            self._refresh_rates(node, instance)
        if report.slots_taken is not None and report.slots_taken <= len(instance.running):
            self._settle(node, instance, now_s - SETTLE_SEEN_S)

    def _unlist_others(
        self, node: Node, hb: wire.Heartbeat, reports: Mapping[str, Report], now_s: float
    ) -> None:
        """What the beat does not list is gone; but a backend that is down has only lost its tongue."""
        listing = {model.backend for model in hb.models}
        mute = {backend.id for backend in hb.backends if not backend.ready and backend.id not in listing}
        for key, instance in list(node.instances.items()):
            if key in reports:
                continue
            if instance.facts.backend_id in mute and instance.listed:
                down = Report(instance.facts._replace(context_tokens=None), "cold", None, None)
                changed = instance.hear(down, now_s)
            else:
                changed = instance.listed
                instance.unlist()
                if not instance.occupied:
                    del node.instances[key]
            if changed:
                self._touch(node, instance)
                state = instance.state if instance.listed else None
                self._events.append(ModelChanged(node.node_id, key, state))

    def _forget_remembered(self, hb: wire.Heartbeat) -> None:
        """A node that was heard speaks for itself, once all of its backends do."""
        if hb.node_id not in self._remembered_nodes:
            return
        if hb.backends and all(backend.ready for backend in hb.backends):
            self._remembered_nodes -= {hb.node_id}
            left = {model: holders - {hb.node_id} for model, holders in self._remembered.items()}
            self._remembered = {model: holders for model, holders in left.items() if holders}

    # ---- probes and failed calls --------------------------------------------------------------------------

    def probes_due(self, now_s: float) -> list[ProbeTarget]:
        """Whom to ping now. Each target is handed out once; `on_probe` must follow."""
        targets = []
        for node_id in self._unproven:
            node = self._nodes[node_id]
            if node.probe_due(now_s):
                node.probing, node.probing_since_s = node.target(), now_s
                targets.append(node.probing)
        return targets

    def on_probe(
        self,
        node_id: str,
        ok: bool,
        now_s: float,
        reason: str | None = None,
        *,
        target: ProbeTarget | None = None,
    ) -> None:
        """A probe ended. One whose `target` is no longer where the node is proves nothing."""
        node = self._nodes[node_id]
        asked = target or node.probing
        if node.probing == asked:
            node.probing = None
        if asked is not None and asked != node.target():
            return
        if node.address_refused:
            return
        if not ok:
            node.probe_failed(now_s)
            self._unproven[node_id] = None
            self._apply(node, "probe_failed", _unreachable(node, reason), now_s)
            return
        if node.silent:
            return  # it answers but does not beat: its next beat asks for a new probe
        node.proven = True
        self._unproven.pop(node_id, None)
        self._apply(node, "probe_ok", None, now_s)

    def on_connect_failed(
        self, node_id: str, now_s: float, reason: str | None = None, *, address: tuple[str, int] | None = None
    ) -> None:
        """A connection was refused or timed out: nothing more goes there until a probe succeeds."""
        node = self._nodes[node_id]
        if address is not None and address != node.address:
            return
        if node.proven:
            self._distrust(node, now_s, after_s=FIRST_PROBE_AFTER_S)
        self._apply(node, "connect_failed", _unreachable(node, reason), now_s)

    def on_stale_auth(self, node_id: str, now_s: float) -> None:
        """It refused a call's signature, boot or version: nothing more goes there until its next beat."""
        node = self._nodes[node_id]
        node.refusals_s = [at_s for at_s in node.refusals_s if now_s - at_s < REFUSALS_WITHIN_S] + [now_s]
        if len(node.refusals_s) < REFUSALS:
            refused = "it refused the signature of a call; its next beat clears that"
            self._apply(node, "call_refused", refused, now_s)
            return
        node.refusals_s.clear()
        self._distrust(node, now_s, after_s=FIRST_PROBE_AFTER_S)
        self._apply(node, "call_refused_thrice", "it keeps refusing the signature of calls", now_s)

    def _distrust(self, node: Node, now_s: float, *, after_s: float = 0.0) -> None:
        node.want_probe(now_s, after_s=after_s)
        self._unproven[node.node_id] = None

    # ---- time ---------------------------------------------------------------------------------------------

    def sweep(self, now_s: float) -> None:
        """Liveness by receipt time. Call about once a second."""
        last_s, self._last_sweep_s = self._last_sweep_s, now_s
        self._expire(now_s)
        if last_s is not None and now_s - last_s > LAG_S:
            # We stood still, and what came meanwhile is still unread: everybody gets their time anew.
            self._resumed_s = now_s
            return
        for node in self._nodes.values():
            silence_s = now_s - max(node.last_beat_s, self._resumed_s)
            if silence_s > self._offline_after_s:
                if not node.silent:
                    node.silent = True
                    self._distrust(node, now_s)
                    late = f"no heartbeat for more than {self._offline_after_s:g} s"
                    self._apply(node, "beat_late_30s", late, now_s)
            elif silence_s > self._degraded_after_s and node.status == "online":
                late = f"no heartbeat for more than {self._degraded_after_s:g} s"
                self._apply(node, "beat_late_15s", late, now_s)

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

    # ---- attempts -----------------------------------------------------------------------------------------

    def start_attempt(
        self,
        node_id: str,
        instance_key: str,
        request_id: str,
        model: str,
        prefill_s: float,
        out_tokens: float,
        prefixes: tuple[PrefixMark, ...],
        now_s: float,
    ) -> AttemptToken:
        """Take a slot. Whether one is free is the planner's business; KeyError: the instance is not known."""
        node = self._nodes[node_id]
        instance = node.instances[instance_key]
        running = Running(request_id, model, now_s, None, prefill_s, out_tokens)
        token = AttemptToken(node, instance, running, prefixes)
        was = instance.state
        instance.start(token, running, prefixes, instance.loaded_slots(self._slots_default))
        node.attempts.add(token)
        if len(node.attempts) > 1 or node.settling():
            node.company += 1
        node.last_chosen_s = now_s
        node.count_busy(now_s)
        self._last_sent_s[model] = now_s
        self._touch(node, instance)
        if instance.state != was:
            self._events.append(ModelChanged(node_id, instance_key, instance.state))
        self._events.append(AttemptStarted(node_id, instance_key, request_id))
        return token

    def evict(self, node_id: str, instance_keys: Iterable[str], now_s: float) -> None:
        """A load that was just started pushes these out: they are warm before a beat can say so."""
        node = self._nodes[node_id]
        for key in instance_keys:
            instance = node.instances.get(key)
            if instance is not None and instance.evicted(now_s):
                self._touch(node, instance)
                self._events.append(ModelChanged(node_id, key, instance.state))

    def first_record(self, token: AttemptToken, now_s: float) -> None:
        """The first content record came: the model is hot, whatever the last beat said."""
        if token.ended or token.running.first_record_s is not None:
            return
        node, instance = token.node, token.instance
        token.running = instance.running[token] = token.running._replace(first_record_s=now_s)
        self._proved_hot(node, instance, now_s)
        self._touch(node, instance)
        self._events.append(AttemptFirstRecord(node.node_id, instance.key, token.running.request_id))

    def end_attempt(self, token: AttemptToken, now_s: float, outcome: AttemptResult) -> None:
        """Give the slot back, or let it settle, and learn from what happened. A second end does nothing."""
        if token.ended:
            return
        token.ended = True
        node, instance = token.node, token.instance
        del instance.running[token]
        node.attempts.remove(token)
        node.count_busy(now_s)
        instance.last_used_s = now_s
        settling = outcome.cancelled and outcome.settle_s > 0
        if settling:
            instance.settling[token] = (now_s, now_s + outcome.settle_s)
            self._remind(now_s + outcome.settle_s, instance)
        if outcome.ok:
            self._proved_hot(node, instance, now_s)
            self._learn(token, outcome)
        elif not outcome.cancelled and token.running.first_record_s is None:
            self._never_began(token, now_s)
        self._touch(node, instance)
        self._drop_if_gone(node, instance)
        self._events.append(
            AttemptEnded(node.node_id, instance.key, token.running.request_id, outcome.ok, settling)
        )

    def abandon_attempt(self, token: AttemptToken, now_s: float) -> None:
        """The slot was taken, and then nothing was sent."""
        self.end_attempt(token, now_s, AttemptResult(ok=False))

    def settled(self, node_id: str, instance_key: str, now_s: float) -> None:
        """The backend shows its slots idle: what settles there has settled."""
        node = self._nodes[node_id]
        instance = node.instances.get(instance_key)
        if instance is not None and instance.settling:
            self._settle(node, instance, now_s)

    def _settle(self, node: Node, instance: Instance, since_s: float) -> None:
        """Free the slots that have been settling since `since_s` or longer."""
        ended = [token for token, (from_s, _) in instance.settling.items() if from_s <= since_s]
        for token in ended:
            del instance.settling[token]
        if ended:
            self._freed(node, instance)

    def _freed(self, node: Node, instance: Instance) -> None:
        self._touch(node, instance)
        self._drop_if_gone(node, instance)
        self._events.append(InstanceFreed(node.node_id, instance.key))

    def _proved_hot(self, node: Node, instance: Instance, now_s: float) -> None:
        if instance.proved_hot(now_s):
            self._events.append(ModelChanged(node.node_id, instance.key, instance.state))

    def _never_began(self, token: AttemptToken, now_s: float) -> None:
        node, instance = token.node, token.instance
        instance.forget_sequence(token.prefixes)
        if instance.load_failed(now_s):
            self._events.append(ModelChanged(node.node_id, instance.key, instance.state))

    def _drop_if_gone(self, node: Node, instance: Instance) -> None:
        if not instance.listed and not instance.occupied and node.instances.get(instance.key) is instance:
            del node.instances[instance.key]

    # ---- learning -----------------------------------------------------------------------------------------

    def _learn(self, token: AttemptToken, outcome: AttemptResult) -> None:
        instance, model = token.instance, token.model
        if outcome.completion_tokens:
            self.rates.learn_output(model, outcome.completion_tokens)
        est_tokens = outcome.est_tokens or (token.prefixes[-1].tokens if token.prefixes else None)
        if outcome.prompt_tokens and est_tokens:
            self.rates.learn_correction(model, outcome.prompt_tokens, est_tokens)
        stats = self.rates.stats(model)
        if stats is not None:
            self._stats = {**self._stats, model: stats}
        if token.alone:
            key = instance.facts.rates_key
            if self.rates.learn(token.node.node_id, key, sample(token, outcome), instance.guess):
                self._refresh_rates(token.node, instance)

    def load_rates(self, rows: Iterable[tuple[str, str, str, float]]) -> None:
        """Take learned rates of an earlier run; call before the first beat."""
        self.rates.load(rows)
        for node in self._nodes.values():
            for instance in node.instances.values():
                self._refresh_rates(node, instance)
                self._note_stats(instance)

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
                self._stats = {**self._stats, name.canonical: stats}

    # ---- marks --------------------------------------------------------------------------------------------

    def mark_busy(self, node_id: str, instance_key: str, until_s: float) -> None:
        """The node itself said busy: not sent to before `until_s`."""
        instance = self._nodes[node_id].instances.get(instance_key)
        if instance is not None:
            instance.busy_until_s = max(instance.busy_until_s, until_s)
            self._marked(instance, until_s)

    def mark_bad(self, node_id: str, instance_key: str, until_s: float) -> None:
        """It could not be loaded there: not tried again before `until_s`."""
        instance = self._nodes[node_id].instances.get(instance_key)
        if instance is not None:
            instance.bad_until_s = max(instance.bad_until_s, until_s)
            self._marked(instance, until_s)

    def _marked(self, instance: Instance, until_s: float) -> None:
        self._remind(until_s, instance)
        self._touch(self._nodes[instance.node_id], instance)

    def delist(self, node_id: str, model: str) -> None:
        """The node says it has no such model (404): believed until its next beat."""
        node, name = self._nodes[node_id], canonical(model)
        for instance in node.instances.values():
            if any(shown.canonical == name for shown in instance.shown_names()):
                instance.delisted |= {name}
                self._touch(node, instance)
                self._events.append(ModelChanged(node_id, instance.key, instance.state))

    # ---- what others see ----------------------------------------------------------------------------------

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
        self._expire(now_s)
        if self._snapshot is None:
            self._snapshot = self._views.snapshot(
                self._slots_default,
                remembered=self._remembered,
                stats=self._stats,
                waiting=self._waiting,
                last_sent_s=self._last_sent_s.copy(),
            )
        return self._snapshot

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

    def agent(self, node_id: str) -> tuple[str, str, str]:
        """Agent id, boot and version, as its last beat has them."""
        beat = self._nodes[node_id].beat
        return beat.agent_id, beat.boot, beat.agent_version

    def drain_events(self) -> list[Event]:
        """What happened since the last call. Of more than MAX_EVENTS only the last ones are kept."""
        events = list(self._events)
        self._events.clear()
        return events

    # ---- bookkeeping --------------------------------------------------------------------------------------

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
            self._events.append(NodeChanged(node.node_id, node.status, reason))

    def _touch(self, node: Node, instance: Instance | None = None) -> None:
        """The node's own facts changed, or only an instance and what work changes."""
        if instance is not None:
            instance.view = None
        else:
            node.view = None
        self._views.touch(node)
        self._changed()

    def _changed(self) -> None:
        self.version += 1
        self._snapshot = None


def _reply_state(node: Node) -> ReplyState:
    match node.status:
        case "online" | "degraded":
            return "online"
        case "offline":
            return "unreachable"
        case "draining" | "pending":
            return node.status


def _unreachable(node: Node, reason: str | None) -> str:
    """Beats come in but calls do not go out: the commonest trouble at home, so it says what to open."""
    host, port = node.address
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    told = f" ({reason})" if reason else ""
    parsed = address.normal_host(host)
    if parsed is not None and parsed.is_loopback:
        return f"unreachable: it does not answer at {where}{told}"
    return (
        f"unreachable: its heartbeats arrive, but calls to {where} fail{told};"
        f" open TCP port {port} in the firewall of {host}"
    )
