"""What all backends do alike: keep the last reading, index its models, turn a failure into a reading."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256

from herd_node.backends.base import OPENAI_ONLY, Facts, LoadFailed, Means, Reading, backend_id, base_url
from herd_node.backends.calls import Answer, Headers, NoAnswer, ask, error_text
from herd_node.backends.offers import Offers
from herd_node.models.manager import Manager, NoManager
from herd_node.net.pool import Origin
from herd_node.protocol.names import canonical
from herd_node.protocol.wire import BackendKind, Model

log = logging.getLogger(__name__)


class Polled(ABC):
    """Base of the backends that are asked over HTTP. A subclass gives `kind` and `_read`."""

    kind: BackendKind
    native: frozenset[str] = OPENAI_ONLY
    manager: Manager = NoManager()

    def __init__(
        self, origin: Origin, means: Means, *, headers: Headers = (), backend: str | None = None
    ) -> None:
        self.id = backend or backend_id(self.kind, origin)
        self.origin = origin
        self.url = base_url(origin)
        self.headers = headers
        self.reading = Reading(kind=self.kind, reason="not asked yet")
        self._means = means
        self._offers = Offers()
        self._by_name: dict[str, Model] = {}

    async def poll(self, now_s: float) -> Reading:
        try:
            reading = await self._read(now_s)
        except NoAnswer as silence:
            reading = self._not_ready(str(silence))
        except Exception:  # a backend's odd answer must not end the agent's loop; it is logged
            log.exception("reading %s failed", self.id)
            reading = self._not_ready(f"{self.url} answered something this agent does not understand")
        if reading.ready:
            reading = replace(reading, endpoints=await self._endpoints(reading, now_s))
        self._set(reading)
        return reading

    def model(self, name: str) -> Model | None:
        return self._by_name.get(name)

    def upstream_model(self, name: str) -> str | None:
        model = self._by_name.get(name)
        return None if model is None else model.name

    def facts(self, name: str) -> Facts | None:
        model = self._by_name.get(name)
        return None if model is None else facts_of(model, model.name)

    async def ensure_loaded(self, name: str, load_options: Mapping[str, object]) -> None:  # noqa: B027 - most have nothing to load
        """Nothing to do: what such a server serves is loaded."""

    async def unload(self, name: str) -> None:
        raise LoadFailed(f"model '{name}' cannot be unloaded: its server keeps what it serves", 501)

    async def slots_taken(self) -> int | None:
        return None

    @abstractmethod
    async def _read(self, now_s: float) -> Reading:
        """Ask the server; NoAnswer and whatever else is raised becomes a reading that is not ready."""

    async def _endpoints(self, reading: Reading, now_s: float) -> tuple[str, ...]:
        """Of those that not every backend has, the ones that this one offers, tried once a start."""
        await self._offers.look(self._means.http, self.url, self.headers, now_s)
        return self._offers.endpoints

    async def _get(self, path: str) -> Answer:
        return await ask(self._means.http, self.url + path, headers=self.headers)

    def _set(self, reading: Reading) -> None:
        self.reading = reading
        self._by_name = index(reading.models)

    def _not_ready(self, reason: str, *, detect_again: bool = True) -> Reading:
        """The models stay listed, cold: the router shall wait for them, not answer that nobody has them."""
        self._offers.forget()
        last = self.reading
        models = tuple(replace(model, state="cold", slots_taken=None) for model in last.models)
        return replace(last, ready=False, reason=reason, models=models, detect_again=detect_again)

    def _unfit(self, path: str, answer: Answer) -> Reading:
        """An answer that does not belong to this kind of server, or a 503: who listens is asked anew."""
        said = error_text(answer.body)
        tail = f": {said}" if said else ""
        return self._not_ready(f"{self.url}{path} answers {answer.status}{tail}")


def index(models: tuple[Model, ...]) -> dict[str, Model]:
    """Canonical name → model. A model's own name goes before another's alias; of equals, the first."""
    by_name: dict[str, Model] = {}
    for model in models:
        by_name.setdefault(canonical(model.name), model)
    for model in models:
        for alias in model.aliases:
            by_name.setdefault(canonical(alias), model)
    return by_name


def facts_of(model: Model, upstream_id: str) -> Facts:
    """What a model's entry tells a translator."""
    return Facts(
        name=model.name,
        upstream_id=upstream_id,
        context_tokens=model.context_tokens,
        context_train_tokens=model.context_train_tokens,
        slots=model.slots,
        size_bytes=model.size_bytes,
        parameters=model.parameters,
        quantisation=model.quantisation,
        capabilities=frozenset(model.capabilities),
        digest=made_up_digest(upstream_id, model.size_bytes),
    )


def made_up_digest(upstream_id: str, size_bytes: int | None) -> str:
    """Stable, and different for different models: clients cache capabilities by digest."""
    return sha256(f"{upstream_id}\n{size_bytes}".encode()).hexdigest()
