"""From an HTTP request to an InferenceRequest: body, dialect, chain. `herd.proxy.dispatch` does the rest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from functools import lru_cache

from herd.dialects import DIALECT_BY_PATH, Parsed
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
#: Whether a field goes on; those that are neither are not here.
_GOES_ON = dict.fromkeys(_FORWARDED, True) | dict.fromkeys(_READ, False)
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
        if read and (coding := read.get(b"content-encoding", b"").lower()) not in (b"", b"identity"):
            body = await self._unpacked(body, coding, route)
        dialect = DIALECT_BY_PATH[route.path]
        parsed = dialect.parse(route, body)
        if read:
            parsed = _as_the_fields_say(parsed, read)
        if len(parsed.asked) > 1:
            parsed = parsed._replace(asked=_chain(parsed.asked, route, parsed.fallback))
        resolved = self._aliases.resolve(parsed.asked)
        client_request_id, only, progress = _wishes(read) if read else _NO_WISHES
        # by place and past the generated constructor, at a third of the cost: a test reads each field
        request = tuple.__new__(
            InferenceRequest,
            (
                self._new_id(),
                route,
                _canonical(resolved or parsed.asked),
                body,
                *parsed,
                forwarded,
                client_request_id,
                principal,
                resolved,
                None,
                only,
                progress,
                arrival_s,
                arrival_wall_s,
            ),
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
                chain=_canonical(resolved or parsed.asked),
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


@lru_cache(256)  # all day the same few are asked for; how long a name may be, the dialects have seen to
def _canonical(asked: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(map(canonical, asked))


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
        goes_on = _GOES_ON.get(field[0])
        if goes_on:
            forwarded.append(field)
        elif goes_on is not None:
            read.setdefault(*field)
    return forwarded, read


#: The caller's own id, the node that alone may serve it, whether it wants to be told what it waits for.
_NO_WISHES: tuple[str | None, str | None, bool] = (None, None, False)


def _wishes(read: Mapping[bytes, bytes]) -> tuple[str | None, str | None, bool]:
    wants_progress = read.get(b"x-fleet-progress", b"0") not in (b"", b"0")
    return _text(read.get(b"x-request-id")), _node_id(read.get(b"x-fleet-node")), wants_progress


def _as_the_fields_say(parsed: Parsed, read: Mapping[bytes, bytes]) -> Parsed:
    """What header fields add to a body, or overrule."""
    fallback = "none" if _is_on(read.get(b"x-fleet-no-fallback")) else parsed.fallback
    return parsed._replace(fallback=fallback, tags=parsed.tags + _header_tags(read.get(b"x-herd-tags")))


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
