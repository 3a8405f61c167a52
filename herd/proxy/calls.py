"""Signing of calls to nodes, and the key ring: nothing else knows where keys come from.

Source: docs/protocol.md §2.
"""

from __future__ import annotations

from typing import NamedTuple

from herd_node.protocol import auth

_MOST_SIGNERS = 4096


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


class Peer(NamedTuple):
    """A node as the signer and the pool need it."""

    node_id: str
    host: str
    port: int
    agent_id: str
    boot: str


class CallSigner:
    """Signs the router's calls: one rising sequence a node for the life of this process."""

    def __init__(self, keys: KeyRing, router_boot: str) -> None:
        self._keys = keys
        self._boot = router_boot
        self._seq: dict[str, int] = {}
        self._signers: dict[tuple[Peer, str, str], auth.Signer] = {}

    def sign(self, peer: Peer, method: str, target: str, body_sha256: str) -> str:
        """The header's value; each call of this is one physical send."""
        key_id = auth.key_id(peer.node_id, peer.agent_id)
        seq = self._seq[key_id] = self._seq.get(key_id, 0) + 1
        head = (peer, method, target)
        return (self._signers.get(head) or self._remember(head, key_id)).sign(seq, body_sha256)

    def _remember(self, head: tuple[Peer, str, str], key_id: str) -> auth.Signer:
        if len(self._signers) >= _MOST_SIGNERS:  # nodes come and go, and each boot is another peer
            self._signers.clear()
        peer, method, target = head
        signer = self._signers[head] = auth.Signer(
            self._keys.key_for(key_id),
            direction="call",
            method=method,
            target=target,
            key_id=key_id,
            sender_boot=self._boot,
            receiver_boot=peer.boot,
        )
        return signer
