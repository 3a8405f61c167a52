"""Managing models over HTTP: Ollama's own endpoints, and the dashboard's, which `herd pull` and others use.

Served to this machine only until there are admin principals: `admit` sees to that. Which node, and what its
answer was, is `herd.proxy.managing`'s business; here it is put into words.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any, Literal
from urllib.parse import parse_qs

import httpx
import orjson

from herd.errors import BadRequest, UpstreamFailed
from herd.proxy.managing import Done, Managing
from herd.proxy.node_calls import read_at_most
from herd.request import Principal
from herd_node.net.exchange import Exchange, Headers
from herd_node.net.leaving import UntilGone
from herd_node.net.spool import Spool
from herd_node.protocol.jsonedit import JsonEditError, find_top_level
from herd_node.protocol.names import is_model_name
from herd_node.protocol.routes import Route, Verb, managing
from herd_node.runtime.clock import Clock

_JSON = (b"content-type", b"application/json")
_MAX_ANSWER_BYTES = 1024 * 1024
#: As large as model files get. A spool that fills the disk fails by itself.
_MAX_BLOB_BYTES = 1024**4
#: As Ollama reads it. Nothing else goes to a node: such a path would not be sent as it was signed.
_BLOB = re.compile(r"/api/blobs/sha256[:-][0-9a-fA-F]{64}")

Everywhere = Literal["delete", "unload"]


class OllamaManagement:
    """Handlers of pull, push, create, copy, delete and blobs, as Ollama's clients know them."""

    def __init__(self, models: Managing, clock: Clock, *, max_body_bytes: int) -> None:
        self._models = models
        self._clock = clock
        self._max_body_bytes = max_body_bytes

    async def __call__(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        verb = managing(exchange.path)
        if verb is None or (verb == "blobs" and not _BLOB.fullmatch(exchange.path)):
            raise BadRequest("invalid digest format")
        limit_bytes = _MAX_BLOB_BYTES if verb == "blobs" else self._max_body_bytes
        with Spool() as body:
            async for piece in exchange.pieces(limit_bytes):
                await body.write(piece)
            await body.end()
            fields = {} if verb == "blobs" else _object(await body.whole())
            with UntilGone(exchange):
                await self._serve(exchange, verb, fields, body, principal)

    async def _serve(
        self, exchange: Exchange, verb: Verb, fields: dict[str, Any], body: Spool, principal: Principal
    ) -> None:
        node_id = _named_node(exchange, fields)
        if verb == "delete" and node_id is None:
            await self._delete_everywhere(exchange, _model(fields))
            return
        model = _source(verb, fields)
        if node_id is None:
            node_id = self._choose(verb, model, principal)
        if verb == "pull" and model is not None:
            with self._models.pulls.one(node_id, model, self._clock.now_s()) as pull:
                await self._pass_on(exchange, node_id, body, pull.feed)
        else:
            await self._pass_on(exchange, node_id, body)

    def _choose(self, verb: Verb, model: str | None, principal: Principal) -> str:
        if model is None:
            return self._models.for_blobs(principal.address)
        if verb == "pull":
            return self._models.to_pull(model)
        return self._models.base_of(model, verb)

    async def _pass_on(
        self,
        exchange: Exchange,
        node_id: str,
        body: Spool,
        look: Callable[[bytes], object] = lambda _piece: None,
    ) -> None:
        """One node's answer, as it comes; `look` sees each piece go by."""
        kind = (exchange.header(b"content-type") or b"application/json").decode("ascii", "ignore")
        call = self._models.passed_on(node_id, exchange.method, exchange.path, body, kind)
        async with call as response:
            headers = [(b"x-fleet-node", node_id.encode())]
            if (found := response.headers.get("content-type")) is not None:
                headers.append((b"content-type", found.encode("latin-1")))
            if "ndjson" in (found or "") and exchange.method != "HEAD":
                await _stream(exchange, response, headers, node_id, look)
            else:
                answer = await read_at_most(response, _MAX_ANSWER_BYTES)
                await exchange.respond(response.status_code, headers, answer)

    async def _delete_everywhere(self, exchange: Exchange, model: str) -> None:
        done = await self._models.everywhere("delete", model, self._models.holders(model))
        _raise_failures(done, "deleted")
        await exchange.respond(200, [(b"x-fleet-node", ",".join(done.nodes).encode())], b"")


class DashboardManagement:
    """Handlers under `/dashboard/api`: the inventory; pull, delete, load and unload by `{model, node_id}`."""

    def __init__(self, models: Managing, *, max_body_bytes: int) -> None:
        self._models = models
        self._max_body_bytes = max_body_bytes

    async def inventory(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        await exchange.respond(200, [_JSON], orjson.dumps(self._models.inventory()))

    async def pull(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        """Progress as server-sent events: Ollama's lines, the last one `success` or an error."""
        fields = _object(await exchange.read_body(self._max_body_bytes))
        model = _model(fields)
        node_id = _named_node(exchange, fields) or self._models.to_pull(model)
        with UntilGone(exchange):
            async with aclosing(self._models.pull(node_id, model)) as lines:
                await _events(exchange, lines, node_id)

    async def delete(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        await self._at_holders(exchange, "delete", "deleted")

    async def unload(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        await self._at_holders(exchange, "unload", "unloaded")

    async def load(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        fields = _object(await exchange.read_body(self._max_body_bytes))
        model = _model(fields)
        node_id = _named_node(exchange, fields) or self._models.to_load(model)
        with UntilGone(exchange):
            await self._models.load(node_id, model)
        await exchange.respond(200, [_JSON], orjson.dumps({"loaded": [node_id]}))

    async def _at_holders(self, exchange: Exchange, verb: Everywhere, participle: str) -> None:
        fields = _object(await exchange.read_body(self._max_body_bytes))
        model, node_id = _model(fields), _named_node(exchange, fields)
        nodes = (node_id,) if node_id is not None else self._models.holders(model)
        with UntilGone(exchange):
            if node_id is not None:
                await self._models.only(verb, model, node_id)
                done = Done(nodes, {})
            else:
                done = await self._models.everywhere(verb, model, nodes)
        _raise_failures(done, participle)
        await exchange.respond(200, [_JSON], orjson.dumps({participle: done.nodes}))


async def _stream(
    exchange: Exchange,
    response: httpx.Response,
    headers: Headers,
    node_id: str,
    look: Callable[[bytes], object],
) -> None:
    """NDJSON: a stream that breaks off ends with an error line, as Ollama's own failures do."""
    await exchange.start(response.status_code, headers)
    try:
        async for piece in response.aiter_raw():
            look(piece)
            await exchange.send(piece)
    except httpx.HTTPError:
        line = {"error": f"the connection to node '{node_id}' broke off"}
        await exchange.finish(b"\n" + orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE))
        return
    await exchange.finish()


async def _events(exchange: Exchange, lines: AsyncGenerator[dict[str, Any], None], node_id: str) -> None:
    headers = [
        (b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"), (b"x-fleet-node", node_id.encode()),
    ]  # fmt: skip
    async for line in lines:
        if not exchange.started:
            await exchange.start(200, headers)
        await exchange.send(b"data: " + orjson.dumps(line) + b"\n\n")
    if not exchange.started:
        raise UpstreamFailed(f"node '{node_id}' ended the pull without a word")
    await exchange.finish()


def _raise_failures(done: Done, participle: str) -> None:
    if not done.failed:
        return
    told = "; ".join(f"{node_id}: {why}" for node_id, why in sorted(done.failed.items()))
    where = f"{participle} on {', '.join(done.nodes)}, but not everywhere: " if done.nodes else ""
    raise UpstreamFailed(where + told)


def _object(body: bytes) -> dict[str, Any]:
    if not body.strip():
        raise BadRequest("missing request body")
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error.msg} at character {error.pos}") from error
    if not isinstance(fields, dict):
        raise BadRequest("the body must be a JSON object")
    try:  # Go matches `MODEL` too: a node would read another one than we
        find_top_level(body, "model")
    except JsonEditError as error:
        raise BadRequest(str(error)) from error
    return fields


def _source(verb: Verb, fields: dict[str, Any]) -> str | None:
    """The model that it is done with, checked whichever node it goes to; None: there is none yet."""
    match verb:
        case "blobs":
            return None
        case "copy":
            return _name(fields, "source")
        case "create":
            return None if fields.get("from") in (None, "") else _name(fields, "from")
    return _model(fields)


def _model(fields: dict[str, Any]) -> str:
    return _name(fields, "model" if fields.get("model") else "name")


def _name(fields: dict[str, Any], key: str) -> str:
    name = fields.get(key)
    if name is None or name == "":
        raise BadRequest("model is required")
    if not isinstance(name, str):
        raise BadRequest(f"'{key}' must be a string")
    # A model that comes from a URL is named by it, query and all: the node reads it more strictly.
    if not is_model_name(name) and not name.lower().startswith(("http://", "https://")):
        raise BadRequest("invalid model name")
    return name


def _named_node(exchange: Exchange, fields: dict[str, Any]) -> str | None:
    """The node that the caller wants: `node_id`, `?node=`, or `X-Fleet-Node`."""
    found = fields.get("node_id")
    if found is None:
        query = parse_qs(exchange.target.partition("?")[2])
        found = query.get("node", [None])[-1] or (exchange.header(b"x-fleet-node") or b"").decode("latin-1")
    if not isinstance(found, str):
        raise BadRequest("'node_id' must be a string")
    return found or None
