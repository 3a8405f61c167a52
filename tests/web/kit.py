"""A real router without agents: beats are signed by hand, nodes are believed on a word."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from herd.app import Router
from herd_node.protocol import auth, wire
from tests.fleet.build import beat
from tests.router.kit import Answer, Fleet


class Lonely(Fleet):
    """The router's side alone; see tests.router.kit.Fleet for how to ask it."""

    def __init__(self, router: Router, folder: Any) -> None:
        super().__init__(router, folder)
        self._seq = 0

    def believe(self, *beats: wire.Heartbeat) -> None:
        """Each node has beaten from this machine and answered its probe."""
        registry, now_s = self.router.registry, self.router.clock.now_s()
        for one in beats:
            gateway = wire.Gateway(port=11436, addresses=("127.0.0.1",))
            registry.on_beat(replace(one, gateway=gateway), "127.0.0.1", now_s)
            for target in registry.probes_due(now_s):
                registry.on_probe(target.node_id, True, now_s, target=target)

    def signed(self, fields: dict[str, Any], **changed: Any) -> tuple[bytes, str]:
        """A beat's body and its header, both right but for what is changed."""
        self._seq += 1
        key_id = auth.key_id(str(fields["node_id"]), str(fields["agent_id"]))
        seq = changed.pop("seq", self._seq)
        body = changed.pop("body", None)
        raw = body if body is not None else json.dumps(fields | {"seq": seq}).encode()
        values: dict[str, Any] = {
            "direction": "beat",
            "method": "POST",
            "target": "/heartbeat",
            "key_id": key_id,
            "sender_boot": fields["boot"],
            "receiver_boot": self.router.boot,
            "seq": seq,
            "body_sha256": auth.body_hash(raw),
        }
        key = changed.pop("key", auth.node_key(self.router.identity.join_secret, key_id))
        return raw, auth.sign(key, **(values | changed))

    async def beat(self, fields: dict[str, Any], **changed: Any) -> Answer:
        raw, header = self.signed(fields, **changed)
        return await self.request("/heartbeat", raw, headers={"X-Herd-Auth": header})


def fields_of(node_id: str = "attic", **more: Any) -> dict[str, Any]:
    """A small beat as JSON."""
    gateway = wire.Gateway(port=11436, addresses=("127.0.0.1",))
    rendered = wire.render_heartbeat(beat(node_id, gateway=gateway, backends=()))
    return {**rendered, **more}
