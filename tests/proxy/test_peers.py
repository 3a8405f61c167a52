"""Nodes as they are called: kept from call to call, made anew when they change, signed for as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from herd.proxy.calls import CallSigner, KeyRing, Peer, Peers
from herd_node.protocol import auth, wire
from tests.fleet.build import AGENT, BOOT, HOST, beat, join, online

SECRET, ROUTER_BOOT = b"s" * 32, "c" * 16
HASH = auth.body_hash(b"{}")


def test_a_node_is_the_same_peer_until_its_next_beat():
    registry = online()
    peers = Peers(registry)
    peer = peers.of("attic")
    assert (peer.node_id, peer.origin, peer.boot, peer.agent_version) == (
        "attic",
        (HOST, 11436),
        BOOT,
        "0.1.0",
    )
    assert peers.of("attic") is peer


@pytest.mark.parametrize(
    ("changed", "host"),
    [
        ({"boot": "e" * 16}, HOST),
        ({"gateway": wire.Gateway(port=5000, addresses=(HOST,))}, HOST),
        ({}, "10.0.0.77"),
    ],
)
def test_what_a_beat_changes_is_called_and_signed_for_at_once(changed: dict[str, object], host: str):
    registry = online()
    peers, signer = Peers(registry), CallSigner(KeyRing(SECRET), ROUTER_BOOT)
    signer.sign(peers.of("attic"), "POST", "/api/chat", HASH)
    later = replace(beat(seq=2), **changed)
    join(registry, later, 20.0, host)
    peer = peers.of("attic")
    assert (peer.origin, peer.boot) == ((host, later.gateway.port), later.boot)
    header = auth.parse_auth(signer.sign(peer, "POST", "/api/chat", HASH))
    assert (header.receiver_boot, header.seq) == (later.boot, 2)


def test_an_unknown_node_is_no_peer():
    with pytest.raises(KeyError):
        Peers(online()).of("cellar")


def test_each_signature_has_a_number_of_its_own_and_is_good_for_its_head_alone():
    keys = KeyRing(SECRET)
    signer, peer = CallSigner(keys, ROUTER_BOOT), Peer("attic", HOST, 1, AGENT, BOOT)
    heads = [("POST", "/api/chat"), ("POST", "/api/chat"), ("GET", "/api/chat"), ("POST", "/v1/embeddings")]
    signed = [auth.parse_auth(signer.sign(peer, method, target, HASH)) for method, target in heads]
    assert [header.seq for header in signed] == [1, 2, 3, 4]
    key = keys.key_for(auth.key_id("attic", AGENT))
    for header, (method, target) in zip(signed, heads, strict=True):
        assert auth.mac_ok(key, header, direction="call", method=method, target=target)
        assert not auth.mac_ok(key, header, direction="call", method="PUT", target=target)
