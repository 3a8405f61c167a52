"""Which nodes may be called: probes, failed calls, and beats that do not come."""

from __future__ import annotations

from herd.fleet import address as addresses
from herd.fleet.book import Book
from herd.fleet.record import FIRST_PROBE_AFTER_S, Node, ProbeTarget

#: Sweeps further apart than this mean that this process stood still, not that the nodes were silent.
LAG_S = 5.0
#: So many refused signatures in so long: the node is unreachable.
REFUSALS = 3
REFUSALS_WITHIN_S = 60.0


class Liveness(Book):
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


def _unreachable(node: Node, reason: str | None) -> str:
    """Beats come in but calls do not go out: the commonest trouble at home, so it says what to open."""
    host, port = node.address
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    told = f" ({reason})" if reason else ""
    parsed = addresses.normal_host(host)
    if parsed is not None and parsed.is_loopback:
        return f"unreachable: it does not answer at {where}{told}"
    return (
        f"unreachable: its heartbeats arrive, but calls to {where} fail{told};"
        f" open TCP port {port} in the firewall of {host}"
    )
