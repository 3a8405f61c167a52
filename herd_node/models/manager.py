"""What every backend can be asked to do with its models: one protocol, one word for each thing.

A manager answers in Ollama's words, because the calls are Ollama's (docs/protocol.md §4): a status with an
`{"error": …}`, or a stream of progress lines. It knows nothing of routers and signatures.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import orjson

from herd_node.net.spool import Spool
from herd_node.protocol.names import canonical
from herd_node.protocol.routes import Verb

JSON = b"application/json; charset=utf-8"
NDJSON = b"application/x-ndjson"

Offer = Literal["pull", "pull-gguf", "push", "create", "copy", "delete", "blobs", "load", "unload"]
#: As the verbs, but for pulls: `pull` takes names of a registry, `pull-gguf` URLs; Hugging Face is for both.
OFFERS: tuple[Offer, ...] = (
    "pull", "pull-gguf", "push", "create", "copy", "delete", "blobs", "load", "unload",
)  # fmt: skip

_GGUF_NODES = "nodes with --embedded, or with a llama-server in router mode on the agent's models folder"
_WHO_CAN: Mapping[Verb, str] = {
    "pull": f"Ollama nodes, and, for GGUF files from Hugging Face or a URL, {_GGUF_NODES}",
    "push": "Ollama nodes",
    "create": "Ollama nodes",
    "copy": "Ollama nodes",
    "blobs": "Ollama nodes",
    "delete": f"Ollama nodes and {_GGUF_NODES}",
    "load": "Ollama nodes, nodes with --embedded and with a llama-server in router mode",
    "unload": "Ollama nodes, nodes with --embedded and with a llama-server in router mode",
}
_WHAT: Mapping[Verb, str] = {
    "pull": "pull this model",
    "push": "push models",
    "create": "create models",
    "copy": "copy models",
    "blobs": "keep blobs",
    "delete": "delete this model",
    "load": "load models on request",
    "unload": "unload models",
}


class Call(NamedTuple):
    """One management call. `fields` is its JSON body, empty where there is none; `path` is the caller's."""

    verb: Verb
    method: str
    path: str
    fields: Mapping[str, object]
    body: Spool

    def text(self, *names: str) -> str:
        """The first of these fields that is a string; "" when none is."""
        return next((found for name in names if isinstance(found := self.fields.get(name), str)), "")

    @property
    def model(self) -> str:
        """`name` is Ollama's older word for it."""
        return self.text("source") if self.verb == "copy" else self.text("model", "name")

    @property
    def known_model(self) -> str:
        """As lists compare it. Raises Refused where none is named."""
        if not self.model:
            raise Refused(400, "model is required")
        return canonical(self.model)

    @property
    def options(self) -> Mapping[str, object]:
        options = self.fields.get("options")
        return options if isinstance(options, dict) else {}

    @property
    def streams(self) -> bool:
        return self.fields.get("stream") is not False


@dataclass(slots=True, kw_only=True)
class Answer:
    """`lines`, when there are any, instead of `body`: each is sent as it comes, and closed in any case."""

    status: int = 200
    content_type: bytes | None = JSON
    body: bytes = b""
    lines: AsyncGenerator[bytes, None] | None = field(default=None)


class Refused(Exception):
    """Not done. `message` is for the caller."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Broken(Exception):
    """The backend gave no usable answer. `refused`: nothing listens there."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.refused = refused


class Manager(Protocol):
    """What a backend can do with its models."""

    @property
    def offers(self) -> frozenset[Offer]: ...

    @property
    def free_bytes(self) -> int | None:
        """Free disk of the folder that its pulls go to; None where that is the node's own."""

    async def manage(self, call: Call) -> Answer:
        """Do it. Raises Refused, Broken; OSError only from the call's own body."""


class NoManager:
    """Of a backend that serves what it was started with."""

    offers: frozenset[Offer] = frozenset()
    free_bytes: int | None = None

    async def manage(self, call: Call) -> Answer:
        raise cannot(call.verb)


def cannot(verb: Verb) -> Refused:
    """501, with who can."""
    return Refused(501, f"this node cannot {_WHAT[verb]}; {_WHO_CAN[verb]} can")


def in_order(offers: Iterable[Offer]) -> tuple[str, ...]:
    """As a heartbeat lists them."""
    offers = frozenset(offers)
    return tuple(offer for offer in OFFERS if offer in offers)


def status_line(status: str, **more: object) -> bytes:
    return orjson.dumps({"status": status, **more}, option=orjson.OPT_APPEND_NEWLINE)


def error_line(message: str) -> bytes:
    return orjson.dumps({"error": message}, option=orjson.OPT_APPEND_NEWLINE)


def success() -> Answer:
    return Answer(body=orjson.dumps({"status": "success"}))
