"""Serves the router's calls that manage models: which backend they are for, and its answer back.

The signature was checked before; here the body is taken in (to a file once it is large), and only what it
says when its hash was found right decides anything. Like all calls these end when the caller leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qs

import orjson

from herd_node.backends.base import Backend, LoadFailed
from herd_node.models.manager import Answer, Broken, Call, Offer, Refused, cannot
from herd_node.net.exchange import BodyTooLarge, Exchange
from herd_node.net.leaving import UntilGone
from herd_node.net.spool import Spool
from herd_node.protocol.names import canonical, source_of
from herd_node.protocol.routes import MANAGED, Verb
from herd_node.relay import Trouble

#: Larger than any model that anybody has at home; what the disk cannot hold is refused by the disk.
MAX_BLOB_BYTES = 1024**4
MAX_FIELDS_BYTES = 16 * 1024 * 1024
_STARTS_WORK: frozenset[Verb] = frozenset({"pull", "push", "create", "blobs", "load"})
_BY_SOURCE: Mapping[str, tuple[Offer, ...]] = {
    "registry": ("pull",),
    "url": ("pull-gguf",),
    "hub": ("pull", "pull-gguf"),
}
_ALONE: Mapping[Verb, tuple[Offer, ...]] = {
    "push": ("push",),
    "create": ("create",),
    "copy": ("copy",),
    "delete": ("delete",),
    "blobs": ("blobs",),
    "load": ("load",),
    "unload": ("unload",),
}


class Management:
    """`backends` is asked anew for each call. `spool_folder` is where large bodies are kept meanwhile."""

    def __init__(
        self,
        backends: Callable[[], Sequence[Backend]],
        draining: Callable[[], bool],
        spool_folder: Path | None,
    ) -> None:
        self._backends = backends
        self._draining = draining
        self._spool_folder = spool_folder

    async def serve(self, exchange: Exchange, verb: Verb, accept: Callable[[str], None]) -> None:
        """`accept` is told the body's hash, and raises where it is not the signed one. Raises Trouble."""
        if exchange.method not in MANAGED[verb].methods:
            raise Trouble(405, None, "method not allowed")
        with Spool(self._spool_folder) as body:
            await _take_in(exchange, body, MAX_BLOB_BYTES if verb == "blobs" else MAX_FIELDS_BYTES)
            accept(body.sha256)
            fields = {} if verb == "blobs" else _fields(await body.whole())
            call = Call(verb, exchange.method, exchange.path, fields, body)
            if self._draining() and verb in _STARTS_WORK:
                raise Trouble(503, "busy", "the node is shutting down", retry_after_s=2)
            backend = self._choose(call, _wanted(exchange.target))
            with UntilGone(exchange):
                await _answer(exchange, await _manage(backend, call))

    def _choose(self, call: Call, wanted: str | None) -> Backend:
        """The one that is named, else the one that has the model, else the first that can."""
        backends = [one for one in self._backends() if wanted in (None, one.id)]
        if wanted is not None and not backends:
            raise Trouble(404, None, "this node has no backend of that id")
        offers = _BY_SOURCE[source_of(call.model)] if call.verb == "pull" else _ALONE[call.verb]
        able = [one for one in backends if not one.manager.offers.isdisjoint(offers)]
        if call.model and call.verb not in ("pull", "create"):
            name = canonical(call.model)
            has_it = next((one for one in backends if one.model(name) is not None), None)
            able = [has_it] if has_it is not None else able
        if not able:
            if any(not one.reading.ready for one in backends):
                raise Trouble(503, "not-ready", "no backend of this node that could do it is ready")
            raise _trouble(cannot(call.verb))
        ready = next((one for one in able if one.reading.ready), None)
        if ready is None:
            raise Trouble(503, "not-ready", "the backend that could do it is not ready")
        return ready


async def _take_in(exchange: Exchange, body: Spool, limit_bytes: int) -> None:
    try:
        async for piece in exchange.pieces(limit_bytes):
            await body.write(piece)
        await body.end()
    except BodyTooLarge as error:
        raise Trouble(413, None, str(error)) from error
    except OSError as error:
        raise Trouble(507, None, f"the body cannot be kept: {error.strerror or error}") from error


def _fields(body: bytes) -> dict[str, object]:
    """In Ollama's words where it has some."""
    if not body:
        raise Trouble(400, None, "missing request body")
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Trouble(400, None, f"the request body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise Trouble(400, None, "the request body must be a JSON object")
    return fields


def _wanted(target: str) -> str | None:
    """`?backend=ID`."""
    return next(iter(parse_qs(target.partition("?")[2]).get("backend", ())), None)


async def _manage(backend: Backend, call: Call) -> Answer:
    try:
        return await backend.manager.manage(call)
    except Refused as refused:
        raise _trouble(refused) from refused
    except LoadFailed as failed:
        raise Trouble(failed.status, None, failed.message) from failed
    except Broken as broken:
        raise _broken(broken) from broken


async def _answer(exchange: Exchange, answer: Answer) -> None:
    """A stream that breaks off is cut, so that the router sees it."""
    headers = [] if answer.content_type is None else [(b"content-type", answer.content_type)]
    lines = answer.lines
    if lines is None:
        await exchange.respond(answer.status, headers, answer.body)
        return
    try:  # the first line before the head: what fails until then still has a status, and a stream is begun
        first = await anext(lines, b"")
        await exchange.start(answer.status, headers)
        await exchange.send(first)
        async for piece in lines:
            await exchange.send(piece)
        await exchange.finish()
    except Broken as broken:
        if not exchange.started:
            raise _broken(broken) from broken
        exchange.abort()
    finally:
        await lines.aclose()


def _broken(broken: Broken) -> Trouble:
    status, word = (503, "refused") if broken.refused else (502, "reset")
    return Trouble(status, word, broken.message)


def _trouble(refused: Refused) -> Trouble:
    return Trouble(refused.status, None, refused.message)
