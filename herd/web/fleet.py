"""Heartbeats in, and the fleet's state out: `/heartbeat`, `/fleet/status`, `/healthz`, `/readyz`.

A beat is checked in the order of docs/protocol.md §2: head, signature, hash, JSON; nothing that fails a check
changes anything.
"""

from __future__ import annotations

import hmac
import logging
from collections import Counter
from collections.abc import Callable
from typing import Literal
from urllib.parse import parse_qs

import orjson

from herd.errors import ApiError, BadRequest
from herd.fleet.registry import BeatOutcome, Registry
from herd.proxy.calls import KeyRing
from herd.proxy.pulls import Pulls
from herd.proxy.slots import WaitingRoom
from herd.proxy.trace_writer import TraceWriter
from herd.request import Principal
from herd_node.net.exchange import BodyTooLarge, Exchange
from herd_node.protocol import auth, wire
from herd_node.protocol.routes import Route
from herd_node.runtime import logs
from herd_node.runtime.clock import Clock

_log = logging.getLogger(__name__)
_JSON = (b"content-type", b"application/json")

Phase = Literal["starting", "serving", "draining"]


class _Refused(ApiError):
    """A beat that is not taken."""

    kind = "bad_request"

    def __init__(self, status: int, message: str, boot: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.boot = boot


class Heartbeats:
    """The handler of `POST /heartbeat`. `on_beat` is told of every accepted one."""

    def __init__(
        self,
        registry: Registry,
        keys: KeyRing,
        gate: auth.BeatGate,
        clock: Clock,
        on_beat: Callable[[str, BeatOutcome], None],
    ) -> None:
        self._registry = registry
        self._keys = keys
        self._gate = gate
        self._clock = clock
        self._on_beat = on_beat
        self.refused: Counter[int] = Counter()
        """By status, for people."""

    async def __call__(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        try:
            header, beat = await self._accepted(exchange)
            outcome = self._registry.on_beat(beat, exchange.peer, self._clock.now_s())
            if outcome.conflict:
                raise _Refused(409, outcome.reason or "the node id is taken")
        except _Refused as refused:
            await self._refuse(exchange, refused)
            return
        self._gate.accept(header)
        try:
            await self._reply(exchange, header, outcome)
        finally:
            # Afterwards: an agent takes no ping of a router whose reply it has not seen.
            self._on_beat(beat.node_id, outcome)

    async def _accepted(self, exchange: Exchange) -> tuple[auth.AuthHeader, wire.Heartbeat]:
        header = self._head(exchange)
        try:
            body = await exchange.read_body(wire.MAX_BEAT_BYTES)
        except BodyTooLarge as error:
            raise _Refused(413, str(error)) from error
        if not hmac.compare_digest(auth.body_hash(body), header.body_sha256):
            raise _Refused(401, "the body is not the one that was signed")
        # Checked once more: another beat of the same agent may have come while the body was read.
        self._check(header)
        try:
            beat = wire.parse_heartbeat(orjson.loads(body))
        except orjson.JSONDecodeError as error:
            raise _Refused(400, f"the beat is not valid JSON: {error.msg}") from error
        except wire.WireError as error:
            raise _Refused(error.status, str(error)) from error
        if (auth.key_id(beat.node_id, beat.agent_id), beat.boot, beat.seq) != (
            header.key_id,
            header.sender_boot,
            header.seq,
        ):
            raise _Refused(400, "the beat's ids, boot or seq differ from those of its signature")
        return header, beat

    def _head(self, exchange: Exchange) -> auth.AuthHeader:
        value = exchange.header(b"x-herd-auth")
        if value is None:
            raise _Refused(401, "a heartbeat must be signed (X-Herd-Auth); run `herd join` to let a node in")
        try:
            header = auth.parse_auth(value.decode("latin-1"))
        except auth.AuthError as error:
            raise _Refused(error.status, str(error)) from error
        key = self._keys.key_for(header.key_id)
        if not auth.mac_ok(key, header, direction="beat", method="POST", target=exchange.target):
            raise _Refused(401, "the signature is wrong: this node has not joined this router")
        self._check(header)
        return header

    def _check(self, header: auth.AuthHeader) -> None:
        refusal = self._gate.check(header)
        if refusal is not None:
            raise _Refused(refusal.status, refusal.reason, refusal.boot)

    async def _refuse(self, exchange: Exchange, refused: _Refused) -> None:
        self.refused[refused.status] += 1
        if refused.boot is None:  # naming a boot is how every agent begins; it is no trouble
            key = f"{exchange.peer} {refused.status}"
            logs.once(_log, key, "refused a heartbeat from %s: %s", exchange.peer, refused.message)
        body: dict[str, object] = {"error": refused.message}
        if refused.boot is not None:
            body["boot"] = refused.boot
        headers = [_JSON, (b"connection", b"close")] if refused.status == 413 else [_JSON]
        await exchange.respond(refused.status, headers, orjson.dumps(body))

    async def _reply(self, exchange: Exchange, header: auth.AuthHeader, outcome: BeatOutcome) -> None:
        reply = wire.BeatReply(
            router_id=self._registry.router_id,
            boot=self._gate.router_boot,
            state=outcome.reply_state,
            reason=outcome.reason,
        )
        body = orjson.dumps(wire.render_reply(reply))
        signature = auth.sign(
            self._keys.key_for(header.key_id),
            direction="reply",
            method="POST",
            target=exchange.target,
            key_id=header.key_id,
            sender_boot=self._gate.router_boot,
            receiver_boot=header.sender_boot,
            seq=header.seq,
            body_sha256=auth.body_hash(body),
        )
        await exchange.respond(200, [_JSON, (b"x-herd-auth", signature.encode())], body)


class Status:
    """Handlers of the state rows. `phase` is what `/readyz` goes by."""

    def __init__(
        self,
        registry: Registry,
        room: WaitingRoom,
        traces: TraceWriter,
        heartbeats: Heartbeats,
        pulls: Pulls,
        clock: Clock,
    ) -> None:
        self._registry = registry
        self._pulls = pulls
        self._room = room
        self._traces = traces
        self._heartbeats = heartbeats
        self._clock = clock
        self.phase: Phase = "starting"
        self.crashes: Counter[str] = Counter()
        """Background loops that raised and were started again, by name."""
        self.notices: list[str] = []

    def fleet(self) -> dict[str, object]:
        """`GET /fleet/status`: a contract for scripts (docs/behaviour.md)."""
        now_s = self._clock.now_s()
        rows = self._registry.nodes_for_status(now_s)
        online = [row for row in rows if row.status in ("online", "degraded")]
        hot = {model.name for row in online for model in row.models if model.state == "hot"}
        nodes = []
        for row in rows:
            node = row.as_dict()
            node["waiting"] = self._room.claims_on(row.node_id)
            nodes.append(node)
        return {
            "fleet": {
                "nodes_total": len(rows),
                "nodes_online": len(online),
                "models_loaded": len(hot),
                "requests_active": sum(row.in_flight for row in rows),
                "requests_waiting": len(self._room),
            },
            "nodes": nodes,
            "queues": {model: row._asdict() for model, row in self._room.queues().items()},
            "pulls": [pull.as_dict(now_s) for pull in self._pulls],
            "timestamp": self._clock.wall_s(),
            "router": {
                "router_id": self._registry.router_id,
                "phase": self.phase,
                "traces": self._traces.stats(),
                "beats_refused": {str(status): n for status, n in self._heartbeats.refused.items()},
                "loops_restarted": dict(self.crashes),
                "notices": self.notices,
            },
        }

    async def status(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        await exchange.respond(200, [_JSON], orjson.dumps(self.fleet()))

    async def healthz(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        """200 while the process lives."""
        await exchange.respond(200, [_JSON], b'{"status":"ok"}')

    async def readyz(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        """200 while it takes requests, with no node too: those are held."""
        nodes = self._registry.snapshot(self._clock.now_s()).nodes.values()
        online = sum(node.status in ("online", "degraded") for node in nodes)
        ready = self.phase == "serving"
        body = orjson.dumps({"nodes_online": online, "phase": self.phase})
        await exchange.respond(200 if ready else 503, [_JSON], body)

    async def traces(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        """`GET /dashboard/api/traces?limit=&request_id=`; client addresses only for this machine."""
        limit, request_id = _trace_query(exchange)
        rows = await self._traces.latest(limit, request_id)
        if principal.kind != "loopback":
            rows = [{key: value for key, value in row.items() if key != "client_ip"} for row in rows]
        await exchange.respond(200, [_JSON], orjson.dumps({"traces": rows}))


def _trace_query(exchange: Exchange) -> tuple[int, str | None]:
    query = parse_qs(exchange.target.partition("?")[2])
    text = query.get("limit", ["50"])[-1]
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 10_000):
        raise BadRequest("'limit' must be a whole number from 1 to 10000")
    return int(text), query.get("request_id", [None])[-1]
