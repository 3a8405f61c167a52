"""What listens at a URL? Asked again whenever the answers stop fitting, above all after any 503.

The order is fixed, and the first that fits counts:
1. `/api/version` with a string `version` and `/api/tags` with a list: Ollama (never by the text of `/`);
2. `/props` with `role: router`: llama-server in router mode; with `total_slots`: with one model;
3. `/v1/models` with a list `data`: another OpenAI-compatible server.
A 503 on the way leaves it open: a llama-server that loads answers 503 everywhere, so no later step may count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import httpx

from herd_node.backends.base import (
    OPENAI_ONLY,
    Backend,
    Facts,
    Means,
    Reading,
    backend_id,
    base_url,
    origin_of,
)
from herd_node.backends.calls import Answer, Headers, NoAnswer, ask, error_text, whole
from herd_node.backends.llama_router import LlamaRouter
from herd_node.backends.llamacpp import LlamaCpp
from herd_node.backends.ollama import Ollama
from herd_node.backends.openai_compatible import OpenAICompatible
from herd_node.models.manager import Manager, NoManager
from herd_node.net.pool import Origin
from herd_node.protocol.wire import BackendKind, Model

#: Asked when the user names no backend.
DEFAULT_URLS = ("http://127.0.0.1:11434", "http://127.0.0.1:8080")

Kind = Literal["ollama", "llama-server", "llama-router", "openai"]

_NO_MANAGER = NoManager()


class Detected(NamedTuple):
    """`kind` is None while it is open; then `reason` says why, in one sentence."""

    kind: Kind | None
    reason: str | None = None


class _Busy(Exception):
    """Something answered 503."""


async def detect(url: str, http: httpx.AsyncClient, headers: Headers = ()) -> Kind | None:
    return (await look(url, http, headers)).kind


async def look(url: str, http: httpx.AsyncClient, headers: Headers = ()) -> Detected:
    """`detect`, with the reason when nothing fits."""

    async def get(path: str) -> Answer:
        answer = await ask(http, url.rstrip("/") + path, headers=headers)
        if answer.status == 503:
            raise _Busy(error_text(answer.body) or "no reason given")
        return answer

    try:
        # 1. Ollama
        if isinstance((await get("/api/version")).fields.get("version"), str):
            tags = (await get("/api/tags")).fields
            if isinstance(tags.get("models"), list):
                return Detected("ollama")
        # 2. llama-server
        props = (await get("/props")).fields
        if props.get("role") == "router":
            return Detected("llama-router")
        if whole(props.get("total_slots")) is not None:
            return Detected("llama-server")
        # 3. anything that speaks OpenAI's dialect
        if isinstance((await get("/v1/models")).fields.get("data"), list):
            return Detected("openai")
    except _Busy as busy:
        return Detected(None, f"{url} is not ready yet (503: {busy})")
    except NoAnswer as silence:
        return Detected(None, str(silence))
    return Detected(None, f"what listens at {url} is neither Ollama nor llama-server nor OpenAI-compatible")


def make(kind: str, url: str, means: Means, *, headers: Headers = ()) -> Backend:
    """The backend of a detected kind. Raises ValueError for unknown words."""
    origin = origin_of(url)
    match kind:
        case "ollama":
            return Ollama(origin, means, headers=headers)
        case "llama-server":
            return LlamaCpp(origin, means, headers=headers)
        case "openai":
            return OpenAICompatible(origin, means, headers=headers)
        case "llama-router":
            return LlamaRouter(origin, means, headers=headers)
    raise ValueError(f"there is no backend of kind {kind!r}")


class Watched:
    """A URL that the user named: the backend of whatever kind answers there now. A bad URL is a ValueError.

    It detects until something fits, delegates to that backend, and detects anew when its reading says so.
    While nothing has been found `kind` is None and it serves no model.
    """

    def __init__(self, url: str, means: Means, *, headers: Headers = ()) -> None:
        self.origin: Origin = origin_of(url)
        self.url = base_url(self.origin)
        self.headers = headers
        self._means = means
        self._inner: Backend | None = None
        self._unfound = Reading(reason="not asked yet")

    @property
    def id(self) -> str:
        if self._inner is not None:
            return self._inner.id
        return backend_id(self._unfound.kind or "backend", self.origin)

    @property
    def kind(self) -> BackendKind | None:
        return self.reading.kind

    @property
    def native(self) -> frozenset[str]:
        return OPENAI_ONLY if self._inner is None else self._inner.native

    @property
    def reading(self) -> Reading:
        return self._unfound if self._inner is None else self._inner.reading

    async def poll(self, now_s: float) -> Reading:
        # 1. it was known and fits: ask it; what it says now may be that it does not fit any more
        if self._inner is not None and not self._inner.reading.detect_again:
            reading = await self._inner.poll(now_s)
            if not reading.detect_again:
                return reading
        # 2. find out what it is; the same kind as before keeps its memory (shows, probes, models)
        found = await look(self.url, self._means.http, self.headers)
        if found.kind is None:
            return self._still_unknown(found.reason)
        if self._inner is None or self._inner.kind != found.kind:
            self._inner = make(found.kind, self.url, self._means, headers=self.headers)
        return await self._inner.poll(now_s)

    def _still_unknown(self, reason: str | None) -> Reading:
        if self._inner is not None:
            return self._inner.reading
        self._unfound = Reading(reason=reason, detect_again=True)
        return self._unfound

    def model(self, name: str) -> Model | None:
        return None if self._inner is None else self._inner.model(name)

    def upstream_model(self, name: str) -> str | None:
        return None if self._inner is None else self._inner.upstream_model(name)

    def facts(self, name: str) -> Facts | None:
        return None if self._inner is None else self._inner.facts(name)

    async def ensure_loaded(self, name: str, load_options: Mapping[str, object]) -> None:
        if self._inner is not None:
            await self._inner.ensure_loaded(name, load_options)

    async def unload(self, name: str) -> None:
        if self._inner is not None:
            await self._inner.unload(name)

    @property
    def manager(self) -> Manager:
        return _NO_MANAGER if self._inner is None else self._inner.manager

    async def slots_taken(self) -> int | None:
        return None if self._inner is None else await self._inner.slots_taken()
