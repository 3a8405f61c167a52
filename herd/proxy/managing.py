"""Managing the models of nodes: which node is asked, and what its answer was. The web layer only words it.

A management call goes to one node, named by the caller or chosen here; only a delete without a node goes to
every holder. The node's own answer is the answer: nothing is retried and no progress is invented.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple

import httpx
import orjson

from herd.dialects.base import error_text
from herd.errors import ApiError, BackendRefused, ModelNotFound, NotOffered, Saturated, UpstreamFailed
from herd.fleet.registry import Registry
from herd.fleet.snapshot import InstanceView
from herd.proxy.node_calls import NodeCalls, read_at_most
from herd.proxy.pulls import Pull, Pulls
from herd.scheduling.placement import Site, place, site
from herd_node.net.spool import Spool
from herd_node.protocol.names import canonical, source_of
from herd_node.protocol.routes import MANAGED, Verb
from herd_node.runtime.clock import Clock

_log = logging.getLogger(__name__)

_MAX_ANSWER_BYTES = 1024 * 1024
#: What a node must offer to pull a name, by where that comes from.
_PULLERS: Mapping[str, frozenset[str]] = {
    "registry": frozenset({"pull"}),
    "hub": frozenset({"pull", "pull-gguf"}),
    "url": frozenset({"pull-gguf"}),
}
_MAX_UPLOADERS = 256


class Done(NamedTuple):
    """What became of a call to several nodes."""

    nodes: tuple[str, ...]
    failed: Mapping[str, str]
    """Node id -> sentence."""


class Managing:
    """One a router."""

    def __init__(self, registry: Registry, calls: NodeCalls, clock: Clock) -> None:
        self._registry = registry
        self._calls = calls
        self._clock = clock
        self.pulls = Pulls()
        self._uploads: dict[str, str] = {}
        """Caller -> the node that got its first blob: what is created from several must lie on one."""

    # -- which node --------------------------------------------------------------------------------------

    def sites(self) -> list[Site]:
        found = (site(node, beat) for node, beat in self._registry.beats())
        return [one for one in found if one is not None]

    def to_pull(self, model: str, size_bytes: int | None = None) -> str:
        """The node that pulls it: most free memory that it fits. Raises NotOffered, Saturated."""
        choice = place(self.sites(), _PULLERS[source_of(model)], size_bytes, f"pull '{model}'")
        if choice.node_id is None:
            raise NotOffered(choice.why_not) if self.sites() else Saturated("no node is online")
        return choice.node_id

    def to_load(self, model: str) -> str:
        """The holder that is loaded already, else the one with the most free memory that it fits."""
        holders = self._holders(model)
        hot = sorted(node_id for node_id, one in holders.items() if one.state in ("hot", "loading"))
        if hot:
            return hot[0]
        sites = [one for one in self.sites() if one.node_id in holders]
        sizes = [one.size_bytes for one in holders.values() if one.size_bytes is not None]
        choice = place(sites, frozenset({"load"}), max(sizes, default=None), f"load '{model}' on request")
        if choice.node_id is None:
            raise NotOffered(choice.why_not)
        return choice.node_id

    def base_of(self, model: str, verb: Verb) -> str:
        """The node that holds it, a loaded one first, for what is made of it there.

        Where nobody does, one that could: what is to be said about it is that node's. Raises NotOffered.
        """
        sites = [one for one in self.sites() if verb in one.offers]
        able = {one.node_id for one in sites}
        snapshot = self._registry.snapshot(self._clock.now_s())
        held = snapshot.holders.get(canonical(model), ())
        holders = {node.node_id: one.state for node, one in held if node.node_id in able}
        if holders:
            return min(holders, key=lambda node_id: (holders[node_id] != "hot", node_id))
        choice = place(sites, frozenset({verb}), None, f"{verb} models")
        if choice.node_id is None or held:
            raise NotOffered(f"no node that is online and holds '{model}' can {verb} models")
        return choice.node_id

    def for_blobs(self, caller: str) -> str:
        """The node that got this caller's blobs before, else that with the most free memory."""
        sites = {one.node_id: one for one in self.sites() if "blobs" in one.offers}
        known = self._uploads.get(caller)
        if known is not None and known in sites:
            return known
        choice = place(sites.values(), frozenset({"blobs"}), None, "keep blobs")
        if choice.node_id is None:
            raise NotOffered(choice.why_not)
        if len(self._uploads) >= _MAX_UPLOADERS:
            self._uploads.clear()
        self._uploads[caller] = choice.node_id
        return choice.node_id

    def is_listed(self, model: str) -> bool:
        """Some node that is there has it."""
        holders = self._registry.snapshot(self._clock.now_s()).holders.get(canonical(model), ())
        return any(node.status in ("online", "degraded") for node, _ in holders)

    def holders(self, model: str) -> tuple[str, ...]:
        """Every node that lists it, by id. Raises ModelNotFound."""
        return tuple(sorted(self._holders(model)))

    def _holders(self, model: str) -> dict[str, InstanceView]:
        snapshot = self._registry.snapshot(self._clock.now_s())
        found = {node.node_id: one for node, one in snapshot.holders.get(canonical(model), ())}
        if not found:
            raise ModelNotFound(f"model '{model}' not found", model=model)
        return found

    # -- what is done there ------------------------------------------------------------------------------

    @asynccontextmanager
    async def passed_on(
        self, node_id: str, method: str, path: str, body: Spool, content_type: str
    ) -> AsyncIterator[httpx.Response]:
        """A caller's own call, and the node's answer as it comes."""
        async with self._calls.send(node_id, method, path, body, content_type) as response:
            yield response

    async def pull(self, node_id: str, model: str) -> AsyncGenerator[dict[str, Any], None]:
        """Pull, line by line; close it to end the pull. Raises for what fails before the first line.

        A failure after that is a last line `{"error": …}`, as Ollama says it.
        """
        route = MANAGED["pull"]
        with self.pulls.one(node_id, model, self._clock.now_s()) as pull, Spool() as spool:
            await _fill(spool, orjson.dumps({"model": model}))
            _log.info("pull of a model to node %s begins", node_id)
            told = 0
            async with self._calls.send(node_id, "POST", route.path, spool) as response:
                await _raise_refusal(response, node_id)
                async with aclosing(_lines(response, pull)) as lines:
                    async for line in lines:
                        told = _log_progress(pull, told)
                        yield line
            _log.info("pull of a model to node %s: %s", node_id, pull.error or pull.status)

    async def load(self, node_id: str, model: str) -> None:
        await self.only("load", model, node_id)

    async def only(self, verb: Verb, model: str, node_id: str) -> None:
        """At one node. Raises what it says against it."""
        route = MANAGED[verb]
        with Spool() as spool:
            await _fill(spool, orjson.dumps({"model": model}))
            async with self._calls.send(node_id, route.methods[0], route.path, spool) as response:
                await _raise_refusal(response, node_id)
                await read_at_most(response, _MAX_ANSWER_BYTES)

    async def everywhere(self, verb: Verb, model: str, nodes: tuple[str, ...]) -> Done:
        """One node after the other; one that fails does not keep the others from it."""
        done: list[str] = []
        failed: dict[str, str] = {}
        for node_id in nodes:
            try:
                await self.only(verb, model, node_id)
                done.append(node_id)
            except ApiError as error:
                failed[node_id] = error.message
        return Done(tuple(done), failed)

    # -- what there is -----------------------------------------------------------------------------------

    def inventory(self) -> dict[str, object]:
        """Model by node: how large, whether loaded, when last used; where more could go; what is pulled."""
        now_s, wall_s = self._clock.now_s(), self._clock.wall_s()
        models: dict[str, list[dict[str, object]]] = {}
        sites = sorted(self.sites(), key=lambda one: one.node_id)
        for _, node in sorted(self._registry.snapshot(now_s).nodes.items()):
            for one in node.instances:
                used = round(wall_s - (now_s - one.last_used_s), 3) if one.last_used_s else None
                row: dict[str, object] = {
                    "node_id": node.node_id,
                    "node_status": node.status,
                    "backend_kind": one.backend_kind,
                    "state": one.state,
                    "loaded": one.state == "hot",
                    "size_bytes": one.size_bytes,
                    "context_tokens": one.context_tokens,
                    "in_flight": len(one.running),
                    "last_used": used,
                }
                for name in one.names:
                    models.setdefault(name.shown, []).append(row)
        return {
            "models": [{"model": name, "nodes": rows} for name, rows in sorted(models.items())],
            "nodes": [one._asdict() | {"offers": sorted(one.offers)} for one in sites],
            "pulls": [pull.as_dict(now_s) for pull in self.pulls],
        }


def _log_progress(pull: Pull, told: int) -> int:
    """A line each tenth. Without the model's name: one that is a URL may hold a secret."""
    tenth = pull.percent // 10 * 10
    if tenth > told:
        _log.info("pull of a model to node %s: %d %%", pull.node_id, tenth)
    return max(told, tenth)


async def _lines(response: httpx.Response, pull: Pull) -> AsyncGenerator[dict[str, Any], None]:
    try:
        async for piece in response.aiter_raw():
            for line in pull.feed(piece):
                yield line
        for line in pull.end():
            yield line
    except httpx.HTTPError:
        pull.error = f"the connection to node '{pull.node_id}' broke off"
        yield {"error": pull.error}
        return
    if pull.error is None and not pull.ok:
        pull.error = f"node '{pull.node_id}' ended the pull without a result"
        yield {"error": pull.error}


async def _raise_refusal(response: httpx.Response, node_id: str) -> None:
    """A node's answer that is no success, as an error of ours with its status and its sentence."""
    if response.status_code in (200, 201):
        return
    text = error_text(await read_at_most(response, _MAX_ANSWER_BYTES))
    if response.status_code == 501:
        raise NotOffered(text)
    if response.status_code == 404:
        raise ModelNotFound(text)
    if 400 <= response.status_code < 500:
        raise BackendRefused(response.status_code, text)
    raise UpstreamFailed(f"node '{node_id}': {text}")


async def _fill(spool: Spool, body: bytes) -> None:
    await spool.write(body)
    await spool.end()
