"""Calls to one node that are no inference: signed as all calls are, but without slot, score, retry or trace.

Plain httpx, because comfort counts here and speed does not. Nothing is sent twice: what manages models is not
safe to repeat.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import httpx

from herd.dialects.base import error_text
from herd.errors import ApiError, NotFound, Saturated, UpstreamFailed
from herd.fleet.registry import Registry
from herd.proxy import failures
from herd.proxy.calls import CallSigner, Peer
from herd_node.net.spool import Spool
from herd_node.runtime.clock import Clock

_MAX_ERROR_BYTES: Final = 256 * 1024
_WRITE_S: Final = 60.0


class NodeCalls:
    """One a router. `close` it at the end."""

    def __init__(
        self, registry: Registry, signer: CallSigner, clock: Clock, *, connect_timeout_s: float
    ) -> None:
        self._registry = registry
        self._signer = signer
        self._clock = clock
        # No time-out for reading: a node is silent while it checks a pull of gigabytes, or loads one.
        timeout = httpx.Timeout(None, connect=connect_timeout_s, write=_WRITE_S)
        # Nodes are on the local network: proxies, redirects and cookies have no business there.
        self._http = httpx.AsyncClient(
            trust_env=False, follow_redirects=False, timeout=timeout, verify=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )  # fmt: skip

    async def close(self) -> None:
        await self._http.aclose()

    @asynccontextmanager
    async def send(
        self, node_id: str, method: str, path: str, body: Spool, content_type: str = "application/json"
    ) -> AsyncIterator[httpx.Response]:
        """The answer's head, whatever its status; read the body inside, as it comes.

        Raises NotFound for a node that is not known, Saturated for one that is not there, UpstreamFailed for
        an answer that breaks off (inside the block too), and what the agent itself says is the matter.
        """
        peer = self._peer(node_id)
        host, port = peer.origin
        request = self._http.build_request(
            method,
            f"http://{f'[{host}]' if ':' in host else host}:{port}{path}",
            headers={
                "content-type": content_type,
                "content-length": str(body.size_bytes),
                "x-herd-auth": self._signer.sign(peer, method, path, body.sha256),
            },
            content=body.pieces() if body.size_bytes else b"",
        )
        try:
            response = await self._http.send(request, stream=True)
        except httpx.ConnectError as error:
            raise self._unreachable(peer, "the connection was refused") from error
        except httpx.ConnectTimeout as error:
            raise self._unreachable(peer, "no answer to the connection") from error
        except httpx.HTTPError as error:
            raise _broke_off(node_id) from error
        try:
            await self._raise_trouble_of(node_id, response)
            yield response
        except httpx.HTTPError as error:
            raise _broke_off(node_id) from error
        finally:
            await response.aclose()

    def _peer(self, node_id: str) -> Peer:
        node = self._registry.snapshot(self._clock.now_s()).nodes.get(node_id)
        if node is None:
            raise NotFound(f"node '{node_id}' is not known here")
        if node.status not in ("online", "degraded"):
            raise Saturated(f"node '{node_id}' is {node.status}")
        host, port = self._registry.address(node_id)
        agent_id, boot, _ = self._registry.agent(node_id)
        return Peer(node_id, host, port, agent_id, boot)

    def _unreachable(self, peer: Peer, why: str) -> ApiError:
        now_s = self._clock.now_s()
        self._registry.on_connect_failed(peer.node_id, now_s, why, address=peer.origin)
        return failures.unreachable(peer.node_id, why).error

    async def _raise_trouble_of(self, node_id: str, response: httpx.Response) -> None:
        """What the agent says of itself; a backend's own answer, errors too, is the caller's to read."""
        word = response.headers.get("x-herd-error")
        if word is None:
            return
        body = await read_at_most(response, _MAX_ERROR_BYTES)
        failure = failures.by_agent(word, node_id, "", error_text(body), None)
        if word in ("auth", "boot", "stale"):
            self._registry.on_stale_auth(node_id, self._clock.now_s())
        if failure is not None and word != "no-model":
            raise failure.error


async def read_at_most(response: httpx.Response, most_bytes: int) -> bytes:
    """The body, or as much of it. What was read remains readable."""
    found = bytearray()
    async for piece in response.aiter_raw():
        found += piece
        if len(found) >= most_bytes:
            break
    return bytes(found[:most_bytes])


def _broke_off(node_id: str) -> ApiError:
    return UpstreamFailed(f"the connection to node '{node_id}' broke off")
