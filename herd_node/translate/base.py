"""The values that the gateway and the translator exchange. Pure: no I/O, no clock, no chance.

A request becomes a `Call` (send this upstream, let this `Reader` turn what comes back into the caller's
words) or an `Answer` (nothing to send), sometimes after a `Question` (ask the backend this first); or it is a
`Refusal`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

Flavour = Literal["llama.cpp", "openai"]
"""What the backend understands: llama-server's own paths and fields, or the plain OpenAI dialect only."""

T = TypeVar("T")


class Refusal(Exception):
    """The request cannot be served as it is: an HTTP status and one sentence in Ollama's words."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Truncated(Exception):
    """The upstream body ended without a finish: what was sent so far is not a complete answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the translator must know of the model that a backend serves. None: not known."""

    flavour: Flavour = "llama.cpp"
    unloads: bool = False
    """Whether the backend can be told to unload a model (llama-server in router mode)."""

    name: str
    """The name that lists show."""
    upstream_id: str
    """The backend's own id, put into the request as `model`."""
    context_tokens: int | None = None
    """Context of one slot, not of the whole server."""
    context_train_tokens: int | None = None
    slots: int | None = None
    size_bytes: int | None = None
    parameters: int | None = None
    quantisation: str | None = None
    embedding_length: int | None = None
    capabilities: frozenset[str] = frozenset({"completion"})
    created_s: float | None = None
    """Unix seconds."""
    chat_template: str | None = None
    supports_tools: bool | None = None
    supports_thinking: bool | None = None
    supports_vision: bool | None = None
    digest: str = ""

    def can(self, word: str) -> bool:
        """Whether the model has that capability; a flag that is known outranks the list of words."""
        known = {
            "tools": self.supports_tools,
            "thinking": self.supports_thinking,
            "vision": self.supports_vision,
        }.get(word)
        return word in self.capabilities if known is None else known


def model_digest(upstream_id: str, size_bytes: int | None) -> str:
    """A made-up but stable digest: clients cache by digest, so two models must never share one."""
    return hashlib.sha256(f"{upstream_id}\n{size_bytes}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """Ask the backend this small thing; `then` makes of its status and body what was wanted, or asks on."""

    path: str
    body: bytes
    then: Callable[[int, bytes], T | Question[T]]


class Reader(ABC):
    """Turns one upstream answer into the caller's words. One a call; `elapsed_s` counts from its start.

    Whatever `feed` and `end` return is sent in order; a head not sent before the first of those bytes takes
    `status` (and JSON as its type when that is not 200). An upstream answer that is not 200, or not `sse`,
    goes through `whole` instead.
    """

    def __init__(self) -> None:
        self.content_started = False
        """Whether a token, a thought or a tool call has come."""
        self.status = 200
        """For an answer whose head is not sent yet: the status that belongs to the bytes just returned."""
        self.load_s = 0.0
        """Seconds that the gateway waited for the model to be loaded; it sets this before the first word."""

    @abstractmethod
    def feed(self, payload: bytes, *, wall_s: float, elapsed_s: float) -> bytes:
        """One SSE data payload in, the NDJSON to send out (often nothing)."""

    def question(self) -> Question[None] | None:
        """What must be asked between the end of the upstream body and `end`; mostly nothing."""
        return None

    @abstractmethod
    def end(self, *, elapsed_s: float, wall_s: float) -> bytes:
        """The upstream body ended properly: the last bytes to send. Raises Truncated without a finish."""

    @abstractmethod
    def whole(self, status: int, body: bytes, *, elapsed_s: float) -> tuple[int, bytes]:
        """An upstream answer that is one JSON body: the status and body to send instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Ask the backend this."""

    path: str
    body: bytes
    stream: bool
    """What the caller wants: NDJSON lines, or one object."""
    sse: bool
    """What the backend answers when all is well: events for `reader.feed`, or one body for `reader.whole`."""
    reader: Reader
    unload: bool = False
    """The caller wants the model unloaded when this is over (`keep_alive: 0`)."""

    @property
    def content_type(self) -> bytes:
        """Of the answer to the caller, when its status is 200."""
        return NDJSON if self.stream else JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Nothing to ask: this is the answer."""

    status: int
    body: bytes
    content_type: bytes
    unload: bool = False
    """The caller wants the model unloaded first."""


JSON = b"application/json; charset=utf-8"
NDJSON = b"application/x-ndjson"
