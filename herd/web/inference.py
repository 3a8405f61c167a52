"""From an HTTP request to an InferenceRequest: body, dialect, chain. `herd.proxy.dispatch` does the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from herd.dialects import DIALECT_BY_PATH
from herd.dialects.services import parse_form
from herd.errors import NotFound, UnsupportedEncoding
from herd.proxy.dispatch import Dispatcher
from herd.request import Fallback, InferenceRequest, Principal
from herd.web.aliases import Aliases
from herd.web.encodings import unpack
from herd_node.net.exchange import Exchange, Headers
from herd_node.net.uploads import read_upload, release
from herd_node.protocol.names import canonical, is_node_id
from herd_node.protocol.routes import Route
from herd_node.runtime.clock import Clock

#: End-to-end fields that go on to the node; credentials, Host and Origin never do (docs/protocol.md §1).
_FORWARDED = frozenset({b"content-type", b"accept", b"anthropic-version", b"anthropic-beta"})
#: Fields that the router itself reads. Of equal ones the first counts.
_READ = frozenset(
    {
        b"content-encoding", b"x-request-id", b"x-herd-tags",
        b"x-fleet-node", b"x-fleet-no-fallback", b"x-fleet-progress",
    }
)  # fmt: skip
_MAX_ID_CHARS = 128


class Inference:
    """The handler of every forwarded row of the route table."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        clock: Clock,
        new_id: Callable[[], str],
        aliases: Aliases,
        *,
        max_body_bytes: int,
    ) -> None:
        self._dispatcher = dispatcher
        self._aliases = aliases
        self._clock = clock
        self._new_id = new_id
        self._max_body_bytes = max_body_bytes

    async def __call__(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        if route.body == "spooled":
            await self._upload(exchange, route, principal)
            return
        arrival_s, arrival_wall_s = self._clock.now_s(), self._clock.wall_s()
        forwarded, read = _sorted_out(exchange.headers)
        body = await exchange.read_body(self._max_body_bytes)
        coding = read.get(b"content-encoding", b"")
        if coding and coding.lower() != b"identity":
            body = await self._unpacked(body, coding, route)
        dialect = DIALECT_BY_PATH[route.path]
        parsed = dialect.parse(route, body)
        fallback = "none" if _is_on(read.get(b"x-fleet-no-fallback")) else parsed.fallback
        asked = parsed.asked if len(parsed.asked) == 1 else _chain(parsed.asked, route, fallback)
        resolved = self._aliases.resolve(asked)
        request = InferenceRequest(
            request_id=self._new_id(),
            route=route,
            chain=tuple(map(canonical, resolved or asked)),
            asked=asked,
            body=body,
            stream=parsed.stream,
            est_tokens=parsed.est_tokens,
            max_tokens=parsed.max_tokens,
            wanted_context_tokens=parsed.wanted_context_tokens,
            load_options=parsed.load_options,
            needs=parsed.needs,
            prefixes=parsed.prefixes,
            headers=forwarded,
            client_request_id=_text(read.get(b"x-request-id")),
            principal=principal,
            user=parsed.user,
            tags=parsed.tags + _header_tags(read.get(b"x-herd-tags")),
            model_key=parsed.model_key,
            buffered=parsed.buffered,
            progress=read.get(b"x-fleet-progress", b"0") not in (b"", b"0"),
            resolved=resolved,
            only=_node_id(read.get(b"x-fleet-node")),
            fallback=fallback,
            arrival_s=arrival_s,
            arrival_wall_s=arrival_wall_s,
        )
        await self._dispatcher.handle(exchange, request, dialect)

    async def _upload(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        """A multipart form. It is kept, in a file if it is large, until its request has ended."""
        arrival_s, arrival_wall_s = self._clock.now_s(), self._clock.wall_s()
        forwarded, read = _sorted_out(exchange.headers)
        if read.get(b"content-encoding", b"identity").lower() != b"identity":
            raise UnsupportedEncoding("compressed forms are not accepted; send it plain")
        body = await read_upload(exchange, self._max_body_bytes)
        try:
            parsed, span = parse_form(route, exchange.header(b"content-type") or b"", body)
            resolved = self._aliases.resolve(parsed.asked)
            request = InferenceRequest(
                request_id=self._new_id(),
                route=route,
                chain=tuple(map(canonical, resolved or parsed.asked)),
                asked=parsed.asked,
                body=body,
                stream=False,
                est_tokens=parsed.est_tokens,
                needs=parsed.needs,
                headers=forwarded,
                client_request_id=_text(read.get(b"x-request-id")),
                principal=principal,
                tags=_header_tags(read.get(b"x-herd-tags")),
                resolved=resolved,
                form_span=span,
                only=_node_id(read.get(b"x-fleet-node")),
                arrival_s=arrival_s,
                arrival_wall_s=arrival_wall_s,
            )
            await self._dispatcher.handle(exchange, request, DIALECT_BY_PATH[route.path])
        finally:
            release(body)

    async def _unpacked(self, body: bytes, coding: bytes, route: Route) -> bytes:
        if not route.path.startswith("/v1/"):
            raise UnsupportedEncoding("compressed request bodies are accepted on /v1 only; send plain JSON")
        return await asyncio.to_thread(unpack, body, coding, self._max_body_bytes)


def _chain(asked: tuple[str, ...], route: Route, fallback: Fallback) -> tuple[str, ...]:
    """Without repetitions, in order. Of an embedding the first alone: other models have other vectors."""
    if fallback == "none" or route.kind == "embedding":
        return asked[:1]
    seen: dict[str, str] = {}
    for name in asked:
        seen.setdefault(canonical(name), name)
    return tuple(seen.values())


def _sorted_out(headers: Headers) -> tuple[Headers, dict[bytes, bytes]]:
    """The fields that go on, and those that are read here."""
    forwarded = []
    read: dict[bytes, bytes] = {}
    for field in headers:
        if field[0] in _FORWARDED:
            forwarded.append(field)
        elif field[0] in _READ:
            read.setdefault(*field)
    return forwarded, read


def _text(value: bytes | None) -> str | None:
    return value.decode("latin-1")[:_MAX_ID_CHARS] if value else None


def _is_on(value: bytes | None) -> bool:
    return value is not None and value.strip().lower() not in (b"", b"0", b"false")


def _node_id(value: bytes | None) -> str | None:
    """The node that alone may serve it. Raises NotFound for what no node can be called."""
    if not value:
        return None
    node_id = value.decode("latin-1")
    if not is_node_id(node_id):
        raise NotFound("X-Fleet-Node names no node")
    return node_id


def _header_tags(value: bytes | None) -> tuple[str, ...]:
    if not value:
        return ()
    parts = (part.strip() for part in value.decode("utf-8", "replace").split(","))
    return tuple(part[:64] for part in parts if part)[:16]
