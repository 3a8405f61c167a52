"""Heartbeats: what a node says of itself becomes what is believed of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from herd.fleet import address, hardware
from herd.fleet.attempts import Attempts
from herd.fleet.events import ModelChanged, NodeReported
from herd.fleet.instance import Instance, Report, merge
from herd.fleet.liveness import Liveness
from herd.fleet.rates import first_guess
from herd.fleet.record import NOT_PROBED, Node
from herd_node.protocol import wire

#: A node id belongs to the agent that was heard so recently.
CONFLICT_S = 30.0
#: A beat tells about a cancelled request only if it was written after the cancel reached the backend.
SETTLE_SEEN_S = 1.0

ReplyState = Literal["online", "draining", "pending", "unreachable"]


class BeatOutcome(NamedTuple):
    """What to answer a beat with. `conflict`: 409, and nothing has changed."""

    reply_state: ReplyState
    reason: str | None
    needs_probe: bool
    conflict: bool


class Beats(Liveness, Attempts):
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
        self._events.append((NodeReported, node.node_id))
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
                instance.prompts.clear()
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
            self._events.append((ModelChanged, node.node_id, key, instance.state))
            return
        resized = (facts.size_bytes, facts.parameters, facts.rates_key) != (
            instance.facts.size_bytes,
            instance.facts.parameters,
            instance.facts.rates_key,
        )
        if instance.hear(report, now_s):
            self._note_stats(instance)
            self._touch(node, instance)
            self._events.append((ModelChanged, node.node_id, key, instance.state))
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
                if instance.unlist():
                    self._touch(node, instance)
                if not instance.occupied:
                    del node.instances[key]
            if changed:
                self._touch(node, instance)
                state = instance.state if instance.listed else None
                self._events.append((ModelChanged, node.node_id, key, state))

    def _forget_remembered(self, hb: wire.Heartbeat) -> None:
        """A node that was heard speaks for itself, once all of its backends do."""
        if hb.node_id not in self._remembered_nodes:
            return
        if hb.backends and all(backend.ready for backend in hb.backends):
            self._remembered_nodes -= {hb.node_id}
            left = {model: holders - {hb.node_id} for model, holders in self._remembered.items()}
            self._remembered = {model: holders for model, holders in left.items() if holders}


def _reply_state(node: Node) -> ReplyState:
    match node.status:
        case "online" | "degraded":
            return "online"
        case "offline":
            return "unreachable"
        case "draining" | "pending":
            return node.status
