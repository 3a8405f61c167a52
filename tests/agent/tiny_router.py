"""The router's side of heartbeats, as small as it can be: a real gate, real signatures, scripted moods."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Literal

from herd_node.protocol import auth, wire
from tests.agent.agent_kit import SECRET, Backendish, Request

Mood = Callable[[Request, auth.AuthHeader], bool]
"""Answers the beat itself and says True, or leaves it to the router."""


class TinyRouter:
    """Accepts beats signed by the join secret; `restart` gives it a new boot."""

    def __init__(self, router_id: str = "router-1", secret: bytes = SECRET) -> None:
        self.server = Backendish()
        self.server.on("/heartbeat", self._beat)
        self.router_id = router_id
        self.secret = secret
        self.boot = "1" * 16
        self.gate = auth.BeatGate(self.boot)
        self.beats: list[wire.Heartbeat] = []
        self.headers: list[auth.AuthHeader] = []
        self.arrived = asyncio.Condition()
        self.mood: Mood | None = None
        self.interval_s: float | None = None
        self.state: Literal["online", "unreachable"] = "online"
        self.reason: str | None = None

    @property
    def url(self) -> str:
        return self.server.url

    def restart(self, boot: str) -> None:
        self.boot = boot
        self.gate = auth.BeatGate(boot)

    async def wait_for(self, number: int) -> wire.Heartbeat:
        """The accepted beat with this number, counted from 1."""
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.beats) >= number)
        return self.beats[number - 1]

    async def _beat(self, request: Request) -> None:
        header = auth.parse_auth(request.headers["x-herd-auth"])
        self.headers.append(header)
        if self.mood is not None and self.mood(request, header):
            return
        key = auth.node_key(self.secret, header.key_id)
        if not auth.mac_ok(key, header, direction="beat", method="POST", target="/heartbeat"):
            request.answer(401, {"error": "the heartbeat is not signed with our join secret"})
            return
        assert header.body_sha256 == auth.body_hash(request.body)
        refusal = self.gate.check(header)
        if refusal is not None:
            said: dict[str, object] = {"error": refusal.reason}
            request.answer(refusal.status, said | ({"boot": refusal.boot} if refusal.boot else {}))
            return
        beat = wire.parse_heartbeat(json.loads(request.body))
        assert (beat.boot, beat.seq) == (header.sender_boot, header.seq)
        self.gate.accept(header)
        self.reply(request, header, key)
        self.beats.append(beat)
        async with self.arrived:
            self.arrived.notify_all()

    def reply(
        self, request: Request, header: auth.AuthHeader, key: bytes, said_boot: str | None = None
    ) -> None:
        """`said_boot` contradicts the signature."""
        reply = wire.BeatReply(
            router_id=self.router_id,
            boot=said_boot or self.boot,
            state=self.state,
            reason=self.reason,
            interval_s=self.interval_s,
        )
        body = json.dumps(wire.render_reply(reply)).encode()
        signature = auth.sign(
            key,
            direction="reply",
            method="POST",
            target="/heartbeat",
            key_id=header.key_id,
            sender_boot=self.boot,
            receiver_boot=header.sender_boot,
            seq=header.seq,
            body_sha256=auth.body_hash(body),
        )
        head = f"HTTP/1.1 200 OK\r\nX-Herd-Auth: {signature}\r\nContent-Length: {len(body)}\r\n\r\n"
        request.write(head.encode() + body)
