"""What clients ask before they chat: model lists in both dialects, versions, `GET /`.

Entries have the dialect's own shape (docs/backends.md) and `nodes`, the ids of the nodes that have the model.
Every list is made from the last heartbeats; no node is asked.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from hashlib import sha256

import orjson

from herd.errors import ModelNotFound
from herd.fleet.catalogue import Entry, catalogue
from herd.fleet.registry import Registry
from herd.request import Principal
from herd_node.net.exchange import Exchange
from herd_node.protocol.names import canonical
from herd_node.protocol.routes import Route
from herd_node.runtime.clock import Clock

#: What `/api/version` says without an Ollama node: the version whose wire docs/backends.md describes.
DESCRIBED_OLLAMA_VERSION = "0.99.0"
_JSON = (b"content-type", b"application/json; charset=utf-8")
_FOREVER = timedelta(days=365 * 292)


class Lists:
    """Handlers of the list rows."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock

    async def openai_models(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        """`GET /v1/models`."""
        data = [_openai(entry) for entry in self._entries()]
        await _answer(exchange, {"object": "list", "data": data})

    async def openai_model(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        """`GET /v1/models/{id}`; ids have slashes."""
        asked = exchange.path.removeprefix("/v1/models/")
        wanted = canonical(asked)
        for entry in self._entries():
            if entry.canonical == wanted:
                await _answer(exchange, {**_openai(entry), "id": asked})
                return
        raise ModelNotFound(f"model '{asked[:200]}' not found")

    async def tags(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        """`GET /api/tags`."""
        await _answer(exchange, {"models": [_tag(entry) for entry in self._entries()]})

    async def ps(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        """`GET /api/ps`: what is loaded somewhere."""
        now = datetime.fromtimestamp(self._clock.wall_s(), UTC)
        models = [_running(entry, now) for entry in self._entries() if entry.hot_nodes]
        await _answer(exchange, {"models": models})

    async def version(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        """`GET /api/version`: the lowest among online Ollama nodes."""
        versions = [
            backend.version
            for view, beat in self._registry.beats()
            if view.status in ("online", "degraded")
            for backend in beat.backends
            if backend.kind == "ollama" and backend.version
        ]
        await _answer(exchange, {"version": min(versions, key=_as_numbers, default=DESCRIBED_OLLAMA_VERSION)})

    async def status(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        """`GET /api/status`: nobody signs in to a cloud through the router."""
        await _answer(exchange, {"cloud": {"disabled": True, "source": "config"}})

    async def root(self, exchange: Exchange, route: Route, principal: Principal) -> None:
        """`GET /`: the sentence by which clients know an Ollama."""
        await exchange.respond(200, [(b"content-type", b"text/plain; charset=utf-8")], b"Ollama is running")

    def _entries(self) -> tuple[Entry, ...]:
        return catalogue(self._registry.beats())


async def _answer(exchange: Exchange, value: object) -> None:
    await exchange.respond(200, [_JSON], orjson.dumps(value))


def _openai(entry: Entry) -> dict[str, object]:
    owner = "library" if entry.backend_kind == "ollama" else "llamacpp"
    return {
        "id": entry.shown,
        "object": "model",
        "created": int(entry.model.modified_s or 0),
        "owned_by": owner,
        "nodes": entry.nodes,
    }


def _tag(entry: Entry) -> dict[str, object]:
    model = entry.model
    modified = datetime.fromtimestamp(model.modified_s or 0, UTC)
    return {
        "name": entry.shown,
        "model": entry.shown,
        "modified_at": _rfc3339(modified),
        "size": model.size_bytes or 0,
        "digest": _digest(entry),
        "details": {
            **_details(entry),
            "context_length": model.context_train_tokens or 0,
            "embedding_length": model.embedding_length or 0,
        },
        "capabilities": list(model.capabilities),
        "nodes": entry.nodes,
    }


def _running(entry: Entry, now: datetime) -> dict[str, object]:
    model = entry.model
    left = timedelta(seconds=model.expires_in_s) if model.expires_in_s is not None else _FOREVER
    return {
        "name": entry.shown,
        "model": entry.shown,
        "size": model.size_bytes or 0,
        "digest": _digest(entry),
        "details": _details(entry),
        "expires_at": _rfc3339(now + min(left, _FOREVER)),
        "size_vram": model.vram_bytes or 0,
        "context_length": model.context_tokens or 0,
        "nodes": entry.hot_nodes,
    }


def _details(entry: Entry) -> dict[str, object]:
    model = entry.model
    family = model.family or ""
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family] if family else None,
        "parameter_size": _parameters(model.parameters),
        "quantization_level": model.quantisation or "",
    }


def _digest(entry: Entry) -> str:
    """The node's own; where it has none, one that differs between models and stays the same over restarts."""
    model = entry.model
    made_of = f"{entry.canonical}\n{model.weights}\n{model.size_bytes}"
    return model.digest or sha256(made_of.encode()).hexdigest()


def _parameters(count: int | None) -> str:
    if not count:
        return ""
    return f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def _rfc3339(moment: datetime) -> str:
    return moment.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _as_numbers(version: str) -> tuple[int, ...]:
    """`0.12.3-rc1` -> (0, 12, 3). What is no number counts as 0."""
    parts = version.split("-")[0].split(".")
    return tuple(int(part) if part.isascii() and part.isdigit() else 0 for part in parts)
