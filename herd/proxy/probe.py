"""Signed pings to nodes: before a node comes online, when its address changed, and while it is unreachable.

A beat proves that the node can call us; only a ping proves that we can call it. Who is due is the registry's
decision (docs/protocol.md §1, §2).
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

import httpx
import orjson

from herd.fleet.record import ProbeTarget
from herd.fleet.registry import Registry
from herd.proxy.calls import CallSigner, KeyRing, Peer
from herd_node.protocol import auth
from herd_node.runtime.clock import Clock
from herd_node.runtime.tasks import Tasks

TARGET = "/herd/v1/ping"
_EMPTY_HASH = auth.body_hash(b"")
_LOOK_S = 0.5
#: The agent may still be reading the reply that tells it our boot.
_ONCE_MORE_S = 0.25
_UNKNOWN_TO_IT = "it answers 401 to a signed ping"
_MAX_REPLY_BYTES = 65536


class Prober:
    """Pings whom the registry names. `changed` is called after each probe."""

    def __init__(
        self,
        registry: Registry,
        signer: CallSigner,
        keys: KeyRing,
        router_boot: str,
        clock: Clock,
        tasks: Tasks,
        *,
        connect_timeout_s: float,
        changed: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._signer = signer
        self._keys = keys
        self._router_boot = router_boot
        self._clock = clock
        self._tasks = tasks
        self._timeout = httpx.Timeout(5.0, connect=connect_timeout_s)
        self._due = asyncio.Event()
        self._changed = changed

    def look(self) -> None:
        """A beat asked for a probe: do not wait for the next look."""
        self._due.set()

    async def run(self) -> None:
        """For ever."""
        # Nodes are on the local network: proxies, redirects and cookies have no business there. And a probe
        # asks whether a connection can be made, so none is kept.
        async with httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            timeout=self._timeout,
            verify=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        ) as client:
            while True:
                for target in self._registry.probes_due(self._clock.now_s()):
                    self._tasks.spawn(self._probe(client, target), name=f"probe {target.node_id}")
                self._due.clear()
                try:
                    async with asyncio.timeout(_LOOK_S):
                        await self._due.wait()
                except TimeoutError:
                    continue

    async def _probe(self, client: httpx.AsyncClient, target: ProbeTarget) -> None:
        trouble = await self._ping(client, target)
        if trouble == _UNKNOWN_TO_IT:
            await self._clock.sleep(_ONCE_MORE_S)
            trouble = await self._ping(client, target)
        now_s = self._clock.now_s()
        self._registry.on_probe(target.node_id, trouble is None, now_s, trouble, target=target)
        self._changed()

    async def _ping(self, client: httpx.AsyncClient, target: ProbeTarget) -> str | None:
        """None when the right agent answered; else what is wrong, in a few words."""
        node_id, agent_id = auth.split_key_id(target.key_id)
        peer = Peer(node_id, target.host, target.port, agent_id, target.boot)
        signature = self._signer.sign(peer, "GET", TARGET, _EMPTY_HASH)
        host = f"[{target.host}]" if ":" in target.host else target.host
        try:
            answer = await client.get(
                f"http://{host}:{target.port}{TARGET}", headers={"X-Herd-Auth": signature}
            )
        except httpx.ConnectTimeout:
            return "no answer to the connection"
        except httpx.ConnectError:
            return "connection refused or no route"
        except httpx.HTTPError as error:
            return f"{type(error).__name__}"
        if answer.status_code == 401:
            return _UNKNOWN_TO_IT
        if answer.status_code != 200:
            return f"it answers {answer.status_code} to a signed ping"
        return None if self._is_genuine(target, signature, answer) else "another program answers there"

    def _is_genuine(self, target: ProbeTarget, signature: str, answer: httpx.Response) -> bool:
        body = answer.content[:_MAX_REPLY_BYTES]
        try:
            reply = auth.parse_auth(answer.headers.get("x-herd-auth", ""))
            said = orjson.loads(body)
        except (auth.AuthError, orjson.JSONDecodeError):
            return False
        node_id, agent_id = auth.split_key_id(target.key_id)
        return (
            auth.mac_ok(
                self._keys.key_for(target.key_id), reply, direction="reply", method="GET", target=TARGET
            )
            and hmac.compare_digest(auth.body_hash(body), reply.body_sha256)
            and reply.key_id == target.key_id
            and reply.seq == auth.parse_auth(signature).seq
            and reply.sender_boot == target.boot
            and reply.receiver_boot == self._router_boot
            and said == {"node_id": node_id, "agent_id": agent_id, "boot": target.boot}
        )
