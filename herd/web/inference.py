"""From an HTTP request to an InferenceRequest: body, dialect, chain. `herd.proxy.dispatch` does the rest."""

from __future__ import annotations

from collections.abc import Callable

from herd.dialects import DIALECTS, Parsed
from herd.errors import UnsupportedEncoding
from herd.proxy.dispatch import Dispatcher
from herd.request import InferenceRequest, Principal
from herd_node.net.exchange import Exchange
from herd_node.protocol.names import canonical
from herd_node.protocol.routes import Route
from herd_node.runtime.clock import Clock

#: End-to-end fields that go on to the node; credentials, Host and Origin never do (docs/protocol.md §1).
_FORWARDED = (b"content-type", b"accept")
_MAX_ID_CHARS = 128


class Inference:
    """The handler of every forwarded row of the route table."""

    def __init__(
        self, dispatcher: Dispatcher, clock: Clock, new_id: Callable[[], str], *, max_body_bytes: int
    ) -> None:
        self._dispatcher = dispatcher
        self._clock = clock
        self._new_id = new_id
        self._max_body_bytes = max_body_bytes

    async def __call__(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        arrival_s, arrival_wall_s = self._clock.now_s(), self._clock.wall_s()
        encoding = exchange.header(b"content-encoding") or b""
        if encoding.lower() not in (b"", b"identity"):
            raise UnsupportedEncoding("compressed request bodies are not accepted; send plain JSON")
        body = await exchange.read_body(self._max_body_bytes)
        dialect = DIALECTS[route.dialect]
        parsed = dialect.parse(route, body)
        asked = _once(parsed)
        request = InferenceRequest(
            request_id=self._new_id(),
            route=route,
            chain=tuple(map(canonical, asked)),
            asked=asked,
            body=body,
            stream=parsed.stream,
            est_tokens=parsed.est_tokens,
            max_tokens=parsed.max_tokens,
            wanted_context_tokens=parsed.wanted_context_tokens,
            needs=parsed.needs,
            prefixes=parsed.prefixes,
            headers=_forwarded(exchange),
            client_request_id=_text(exchange.header(b"x-request-id")),
            principal=principal,
            user=parsed.user,
            tags=parsed.tags + _header_tags(exchange.header(b"x-herd-tags")),
            model_key=parsed.model_key,
            buffered=parsed.buffered,
            arrival_s=arrival_s,
            arrival_wall_s=arrival_wall_s,
        )
        await self._dispatcher.handle(exchange, request, dialect)


def _once(parsed: Parsed) -> tuple[str, ...]:
    """The chain without repetitions, in order."""
    if len(parsed.asked) == 1:
        return parsed.asked
    seen: dict[str, str] = {}
    for name in parsed.asked:
        seen.setdefault(canonical(name), name)
    return tuple(seen.values())


def _forwarded(exchange: Exchange) -> tuple[tuple[bytes, bytes], ...]:
    return tuple((name, value) for name, value in exchange.headers if name in _FORWARDED)


def _text(value: bytes | None) -> str | None:
    return value.decode("latin-1")[:_MAX_ID_CHARS] if value else None


def _header_tags(value: bytes | None) -> tuple[str, ...]:
    if not value:
        return ()
    parts = (part.strip() for part in value.decode("utf-8", "replace").split(","))
    return tuple(part[:64] for part in parts if part)[:16]
