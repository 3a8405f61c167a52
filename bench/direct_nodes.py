"""Nodes without agents: genuinely signed beats for several, and signed answers to the router's pings.

So the router does all of its work (signing, scoring, traces) and only the agent's hop is missing. Every
node's gateway is the synthetic backend, which takes calls without looking at their signatures and passes
`/herd/v1/ping` on to the port here. The key is derived from the join secret in the router's own data folder.

It never answers a caller's request.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import orjson

from bench import fleet
from herd_node.protocol import auth, wire
from herd_node.runtime.chance import new_hex
from herd_node.runtime.clock import SystemClock
from herd_node.runtime.paths import DataDir, read_private

_BEAT_TARGET = "/heartbeat"
_PING_TARGET = "/herd/v1/ping"
_INTERVAL_S = 5.0
_RETRY_S = 0.2


class DirectNode:
    """One node: its identity, its signatures."""

    def __init__(self, number: int, secret: bytes, gateway_port: int) -> None:
        self.node_id = f"direct-{number}"
        self.agent_id = new_hex(8)
        self.boot = new_hex(8)
        self.key_id = auth.key_id(self.node_id, self.agent_id)
        self._key = auth.node_key(secret, self.key_id)
        self._port = gateway_port
        self._clock = SystemClock()
        self._seq = 0
        self._router_boot: str | None = None

    async def run(self, http: httpx.AsyncClient, url: str) -> None:
        """Beat for ever."""
        while True:
            taken = await self._beat(http, url)
            await self._clock.sleep(_INTERVAL_S if taken else _RETRY_S)

    async def _beat(self, http: httpx.AsyncClient, url: str) -> bool:
        """Whether the router took it."""
        self._seq += 1
        beat = fleet.beat(self.node_id, self.agent_id, self.boot, self._seq, self._port)
        body = orjson.dumps(wire.render_heartbeat(beat))
        signature = auth.sign(
            self._key,
            direction="beat",
            method="POST",
            target=_BEAT_TARGET,
            key_id=self.key_id,
            sender_boot=self.boot,
            receiver_boot=self._router_boot,
            seq=self._seq,
            body_sha256=auth.body_hash(body),
        )
        headers = {"content-type": "application/json", "x-herd-auth": signature}
        try:
            answer = await http.post(url + _BEAT_TARGET, content=body, headers=headers)
        except httpx.HTTPError as error:
            sys.stderr.write(f"{self.node_id}: {error}\n")
            return False
        if answer.status_code == 401:  # the router's boot is learnt from its refusal
            self._router_boot = orjson.loads(answer.content).get("boot")
        return answer.status_code == 200

    def pong(self, call: auth.AuthHeader) -> tuple[str, bytes] | None:
        """Signature and body of the answer to a ping; None when the ping is not our router's."""
        if not auth.mac_ok(self._key, call, direction="call", method="GET", target=_PING_TARGET):
            return None
        body = orjson.dumps({"node_id": self.node_id, "agent_id": self.agent_id, "boot": self.boot})
        signature = auth.sign(
            self._key,
            direction="reply",
            method="GET",
            target=_PING_TARGET,
            key_id=self.key_id,
            sender_boot=self.boot,
            receiver_boot=call.sender_boot,
            seq=call.seq,
            body_sha256=auth.body_hash(body),
        )
        return signature, body


class Pings:
    """The server behind the backend's relay: one ping a connection."""

    def __init__(self, nodes: Sequence[DirectNode]) -> None:
        self._by_key = {node.key_id: node for node in nodes}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(self._answer(head))
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            sys.stderr.write(f"a ping broke off: {error}\n")
        finally:
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        made = None
        try:
            call = auth.parse_auth(_auth_field(head))
            node = self._by_key.get(call.key_id)
            made = None if node is None else node.pong(call)
        except auth.AuthError as error:
            sys.stderr.write(f"a ping is refused: {error}\n")
        if made is None:
            return b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n"
        signature, body = made
        fields = f"content-type: application/json\r\nx-herd-auth: {signature}\r\ncontent-length: {len(body)}"
        return b"HTTP/1.1 200 OK\r\n" + fields.encode() + b"\r\n\r\n" + body


def _auth_field(head: bytes) -> str:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == auth.HEADER:
            return value.strip().decode("latin-1")
    return ""


async def run(url: str, data_dir: Path, gateway_port: int, listen_port: int, count: int) -> None:
    """Until it is cancelled."""
    secret = read_private(DataDir(data_dir).join_file)
    if secret is None:
        raise SystemExit(f"direct_nodes: {data_dir} has no join secret")
    nodes = [DirectNode(number, secret, gateway_port) for number in range(count)]
    server = await asyncio.start_server(Pings(nodes).serve, "127.0.0.1", listen_port)
    async with server, httpx.AsyncClient(trust_env=False) as http, asyncio.TaskGroup() as beats:
        for node in nodes:
            beats.create_task(node.run(http, url), name=node.node_id)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.direct_nodes")
    parser.add_argument("--router-url", required=True)
    parser.add_argument("--data-dir", required=True, type=Path)
    parser.add_argument("--gateway-port", required=True, type=int)
    parser.add_argument("--listen-port", required=True, type=int)
    parser.add_argument("--nodes", type=int, default=8)
    args = parser.parse_args()
    try:
        asyncio.run(run(args.router_url, args.data_dir, args.gateway_port, args.listen_port, args.nodes))
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
