"""What every local backend looks like to the rest of the agent: one protocol, and the values it hands out.

A backend answers for one server on this machine: what it is, whether it is ready, which models it has and
in which state. It does no inference itself: the gateway sends the callers' requests to `origin` through the
pool. It knows nothing of routers, heartbeats or dialect translation.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

import httpx

from herd_node.backends.warm import WarmMemory
from herd_node.models.downloads import Downloads
from herd_node.models.manager import Manager
from herd_node.net.pool import Origin
from herd_node.protocol.wire import BackendKind, Model
from herd_node.runtime.clock import Clock
from herd_node.runtime.tasks import Tasks

OPENAI_ONLY = frozenset({"openai"})
BOTH_DIALECTS = frozenset({"openai", "ollama"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one poll saw. `models` carry the backend's id; `reason` is a sentence when it is not ready.

    `detect_again` is set when the answers no longer fit the kind (any 503, another program on the port):
    what listens there must be asked anew what it is.
    """

    kind: BackendKind | None = None
    version: str | None = None
    ready: bool = False
    reason: str | None = None
    max_loaded: int | None = None
    models: tuple[Model, ...] = ()
    endpoints: tuple[str, ...] = ()
    """Of those that not every backend has, the ones that this one offers."""
    detect_again: bool = False


class Facts(NamedTuple):
    """What a translator must know of a model; the fields of `translate.ModelFacts`, by the same names.

    A type of its own because `backends` and `translate` stand side by side and may not import each other:
    the gateway makes `ModelFacts(**facts._asdict())`.
    """

    name: str
    upstream_id: str
    context_tokens: int | None = None
    context_train_tokens: int | None = None
    slots: int | None = None
    size_bytes: int | None = None
    parameters: int | None = None
    quantisation: str | None = None
    embedding_length: int | None = None
    capabilities: frozenset[str] = frozenset()
    created_s: float | None = None
    chat_template: str | None = None
    supports_tools: bool | None = None
    supports_thinking: bool | None = None
    supports_vision: bool | None = None
    digest: str = ""


class LoadFailed(Exception):
    """The backend could not load a model. `status` and `message` are its own, for the caller."""

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class Owner(NamedTuple):
    """The process that listens on a port and its children's command lines, as far as this user may see."""

    pid: int
    name: str
    children: tuple[tuple[str, ...], ...]


async def _at_once(_backend: str, _model: str) -> None:
    return


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What a backend is built with; made once by the agent.

    `slots` is FLEET_NODE_SLOTS; `num_parallel` and `max_loaded` are OLLAMA_NUM_PARALLEL and
    OLLAMA_MAX_LOADED_MODELS of the agent's own environment. `owner_of` (`processes.PortOwners().owner_of`)
    blocks, so it is run in a thread. `on_change` is called when a load begins or ends, or a child comes or
    goes, between two polls: the agent then polls and beats at once. `downloads` fill the agent's folder of
    GGUF files; `until_unused` returns when no call runs on a model (backend id, weights or canonical name).
    """

    http: httpx.AsyncClient
    clock: Clock
    tasks: Tasks
    slots: int | None = None
    num_parallel: int | None = None
    max_loaded: int | None = None
    gpu_count: int = 0
    owner_of: Callable[[Origin], Owner | None] = lambda _origin: None
    warm: WarmMemory = field(default_factory=WarmMemory)
    on_change: Callable[[], None] = lambda: None
    downloads: Downloads | None = None
    until_unused: Callable[[str, str], Awaitable[None]] = _at_once


class Backend(Protocol):
    """One local server. All methods are called on the event loop; `poll` is never called twice at once."""

    @property
    def id(self) -> str:
        """`ollama-11434`: kind and port (and host, when it is not this machine)."""

    @property
    def url(self) -> str: ...

    @property
    def origin(self) -> Origin: ...

    @property
    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """To be added to each request sent there (the embedded server's key)."""

    @property
    def kind(self) -> BackendKind | None:
        """None while nothing has answered yet."""

    @property
    def native(self) -> frozenset[str]:
        """Dialects that it speaks itself; the others are translated."""

    @property
    def reading(self) -> Reading:
        """What the last poll saw."""

    async def poll(self, now_s: float) -> Reading:
        """Ask the server. Never raises: not ready, with a reason, instead."""

    def model(self, name: str) -> Model | None:
        """The model of a canonical name (or alias), None when it is not served here."""

    def upstream_model(self, name: str) -> str | None:
        """The backend's own id for a canonical name that it serves."""

    def facts(self, name: str) -> Facts | None: ...

    async def ensure_loaded(self, name: str, load_options: Mapping[str, object]) -> None:
        """The agent's own load; returns once the model is loaded so. Raises LoadFailed.

        Cancelling the caller does not cancel the load.
        """

    async def unload(self, name: str) -> None:
        """Unload a model; returns once it is, at once where it is not loaded. Raises LoadFailed.

        Only where `manager.offers` has `unload`.
        """

    @property
    def manager(self) -> Manager:
        """What it can be told to do with its models."""

    async def slots_taken(self) -> int | None:
        """Slots that are busy by the server's own word, if it gives one. Ask only while something runs."""


def origin_of(url: str) -> Origin:
    """Host and port of `http://host[:port][/]`. Raises ValueError with a sentence."""
    parts = urlsplit(url if "//" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/") or parts.query:
        raise ValueError(f"a backend is given as http://HOST:PORT, not as {url!r}")
    try:
        port = parts.port
    except ValueError as wrong:
        raise ValueError(f"a backend is given as http://HOST:PORT, not as {url!r}") from wrong
    return Origin(parts.hostname, 80 if port is None else port)


def base_url(origin: Origin) -> str:
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    return f"http://{host}:{origin.port}"


def backend_id(kind: str, origin: Origin) -> str:
    if origin.host in ("127.0.0.1", "localhost", "::1"):
        return f"{kind}-{origin.port}"
    return f"{kind}-{origin.host}-{origin.port}"
