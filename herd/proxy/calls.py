"""Signing of calls to nodes, and the key ring: nothing else knows where keys come from.

Source: docs/protocol.md §2.
"""

from __future__ import annotations

from herd.fleet.registry import Registry
from herd_node.net.pool import Origin
from herd_node.protocol import auth, wire


class KeyRing:
    """`key_for(key_id)`: in v1 derived from the join secret; later a stored secret a node."""

    def __init__(self, join_secret: bytes) -> None:
        self._secret = join_secret
        self._keys: dict[str, bytes] = {}

    def key_for(self, key_id: str) -> bytes:
        """The key of `<node id>/<agent id>`."""
        key = self._keys.get(key_id)
        if key is None:
            if len(self._keys) > 4096:  # ids come from strangers' beats too
                self._keys.clear()
            key = self._keys[key_id] = auth.node_key(self._secret, key_id)
        return key


class Peer:
    """A node as the signer and the pool need it. Whoever calls it often keeps it, and its signers with it."""

    __slots__ = ("agent_version", "boot", "key_id", "node_id", "origin", "signers")

    def __init__(
        self,
        node_id: str,
        host: str,
        port: int,
        agent_id: str,
        boot: str,
        agent_version: str | None = None,
    ) -> None:
        self.node_id = node_id
        self.origin = Origin(host, port)
        self.key_id = auth.key_id(node_id, agent_id)
        self.boot = boot
        self.agent_version = agent_version
        self.signers: dict[tuple[str, str], auth.Signer] = {}
        """The signer's: by method and target."""


class Peers:
    """The nodes of the registry as they are called: each the same object until its next beat."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._kept: dict[str, tuple[str, wire.Heartbeat, Peer]] = {}

    def of(self, node_id: str) -> Peer:
        """KeyError: the registry does not know it."""
        host, beat = self._registry.contact(node_id)
        kept = self._kept.get(node_id)
        if kept is None or kept[1] is not beat or kept[0] != host:
            peer = Peer(node_id, host, beat.gateway.port, beat.agent_id, beat.boot, beat.agent_version)
            kept = self._kept[node_id] = host, beat, peer
        return kept[2]


class CallSigner:
    """Signs the router's calls: one rising sequence a node for the life of this process."""

    def __init__(self, keys: KeyRing, router_boot: str) -> None:
        self._keys = keys
        self._boot = router_boot
        self._seq: dict[str, int] = {}

    def sign(self, peer: Peer, method: str, target: str, body_sha256: str) -> str:
        """The header's value; each call of this is one physical send."""
        key_id = peer.key_id
        seq = self._seq[key_id] = self._seq.get(key_id, 0) + 1
        signer = peer.signers.get((method, target)) or self._signer(peer, method, target)
        return signer.sign(seq, body_sha256)

    def _signer(self, peer: Peer, method: str, target: str) -> auth.Signer:
        signer = peer.signers[method, target] = auth.Signer(
            self._keys.key_for(peer.key_id),
            direction="call",
            method=method,
            target=target,
            key_id=peer.key_id,
            sender_boot=self._boot,
            receiver_boot=peer.boot,
        )
        return signer
