"""What a fake backend serves: its models, and one generation as a list of tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import orjson

JSON_UTF8 = "application/json; charset=utf-8"


@dataclass(slots=True)
class FakeModel:
    name: str
    capabilities: tuple[str, ...] = ("completion",)
    size_bytes: int = 270_886_264
    context_train_tokens: int = 8192
    context_tokens: int = 2048
    """Ollama: what a load without num_ctx gives. llama-server: of one slot."""
    embedding_length: int = 16
    loaded: bool = False
    loaded_context: int = 0
    loaded_with: dict[str, Any] = field(default_factory=dict)
    """Ollama: the load-time options of its runner that are not the default ones, without num_ctx."""
    weights: str = ""
    """Hex digest of the weights file; models with the same one share a runner."""

    def __post_init__(self) -> None:
        self.capabilities = tuple(self.capabilities)
        self.weights = self.weights or hashlib.sha256(f"weights {self.name}".encode()).hexdigest()
        self.loaded_context = self.loaded_context or self.context_tokens

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"manifest {self.name}".encode()).hexdigest()


class Token(NamedTuple):
    text: str
    thought: bool = False


@dataclass(slots=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish: str = "stop"
    prompt_s: float = 0.001
    decode_s: float = 0.001
    load_s: float = 0.0
    total_s: float = 0.0
    hidden: bool = False
    """Fault `no_usage`: counters and timings are left out."""


class Voice(Protocol):
    """Writes one generation in the words of one dialect and path."""

    stream_headers: Sequence[tuple[str, str]]
    whole_type: str

    def opening(self) -> bytes: ...
    def token(self, token: Token) -> bytes: ...
    def last(self, usage: Usage) -> list[bytes]: ...
    def whole(self, tokens: list[Token], usage: Usage) -> bytes: ...
    def error(self, message: str) -> bytes: ...
    def malformed(self) -> bytes: ...


@dataclass(slots=True)
class Generation:
    """One request for tokens, understood."""

    model: FakeModel
    voice: Voice
    stream: bool
    tokens: list[Token]
    usage: Usage
    num_ctx: int | None = None
    load_options: dict[str, Any] = field(default_factory=dict)
    on_done: Callable[[], None] = field(default=lambda: None)


class Reply(NamedTuple):
    """An answer at once."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


class Refused(Exception):
    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.body)
        self.reply = reply


def dumps(value: object, *, newline: bool = False) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE if newline else 0)


def sse(value: object) -> bytes:
    return b"data: " + dumps(value) + b"\n\n"


def make_tokens(wanted: int, limit: int | None, prefix: str = "t") -> tuple[list[Token], str]:
    """`t0000 t0001 …`, and why it ends: callers can check that what they got is a prefix."""
    count = wanted if limit is None or limit < 0 else min(wanted, limit)
    return [Token(f"{prefix}{n:04d} ") for n in range(count)], "length" if count < wanted else "stop"


def structured_tokens(schema: object, limit: int | None) -> tuple[list[Token], str]:
    """The least value that a schema allows, a few characters a token; without a schema what was recorded."""
    text = dumps(_least(schema) if isinstance(schema, dict) else {"blue": 1}).decode()
    pieces = [Token(text[at : at + 4]) for at in range(0, len(text), 4)]
    kept = pieces if limit is None or limit < 0 else pieces[:limit]
    return kept, "length" if len(kept) < len(pieces) else "stop"


def _least(schema: dict[str, Any]) -> object:
    if "enum" in schema:
        return schema["enum"][0]
    match schema.get("type"):
        case "object":
            return {name: _least(inner) for name, inner in schema.get("properties", {}).items()}
        case "array":
            return [_least(schema.get("items", {}))] * schema.get("minItems", 0)
        case "integer" | "number":
            return 0
        case "boolean":
            return False
    return "t0000"


def answers_a_tool(messages: object) -> bool:
    """Whether the last message brings what a tool said, in any dialect: then the model talks."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    if not isinstance(last, dict):
        return False
    content = last.get("content")
    blocks = content if isinstance(content, list) else []
    results = [block for block in blocks if isinstance(block, dict) and block.get("type") == "tool_result"]
    return last.get("role") == "tool" or bool(results)


def vector(text: str, length: int) -> list[float]:
    """A normalised vector that depends on the text alone."""
    raw = hashlib.sha512(text.encode("utf-8", "surrogatepass")).digest()
    values = [raw[n % len(raw)] - 127.5 for n in range(length)]
    norm = sum(value * value for value in values) ** 0.5
    return [value / norm for value in values]


def count_words(value: object) -> int:
    """The words of every text in a JSON value: the fake's tokenizer."""
    if isinstance(value, str):
        return len(value.split())
    if isinstance(value, dict):
        return sum(count_words(inner) for inner in value.values())
    return sum(count_words(inner) for inner in value) if isinstance(value, list) else 0
