"""What is done with which client at which backend, and what is left out, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple


class NotThere(NamedTuple):
    """How a client says that there is no such model: the exception that it raises, and the word in it."""

    raised: str
    word: str


_IN_OPENAI = NotThere("NotFoundError", "model_not_found")
_IN_ANTHROPIC = NotThere("NotFoundError", "not_found_error")
_IN_OLLAMA = NotThere("ResponseError", "model 'nowhere:1' not found")

CLIENTS = {
    "openai": _IN_OPENAI,
    "anthropic": _IN_ANTHROPIC,
    "ollama": _IN_OLLAMA,
    "langchain-openai": _IN_OPENAI,
    "langchain-ollama": _IN_OLLAMA,
    "llm": _IN_OLLAMA,
    "npm-openai": _IN_OPENAI,
    "npm-ollama": _IN_OLLAMA,
}

DEEDS = ("chat", "stream", "tools", "embeddings", "structured", "models", "unknown", "cancel")

#: What a client or its dialect does not have, at either backend.
LEFT_OUT = {
    ("anthropic", "embeddings"): "Anthropic's dialect has no embeddings",
    ("anthropic", "structured"): "neither backend holds an answer in Anthropic's dialect to a schema",
    ("langchain-openai", "models"): "langchain-openai has no list of models",
}


@dataclass(frozen=True)
class Backend:
    """Which model does what. `text`: what every answer is; None: whatever a real model says."""

    name: str
    chat: str
    tools: str
    embeddings: str
    watched: str
    """Of a backend whose slots can be looked at."""
    vector_length: int
    text: str | None = None


BACKENDS = {
    one.name: one
    for one in (
        Backend(
            name="llama.cpp",
            chat="smollm2:135m",
            tools="tools:135m",
            embeddings="smollm2:135m",
            watched="tools:135m",
            vector_length=576,
        ),
        Backend(
            name="ollama",
            chat="talk:1",
            tools="tools:1",
            embeddings="embed:1",
            watched="talk:1",
            vector_length=16,
            text="".join(f"t{n:04d} " for n in range(8)),
        ),
    )
}


class Cell(NamedTuple):
    client: str
    backend: str
    deed: str


def cells_of(deed: str) -> list[Cell]:
    return [Cell(*pair, deed) for pair in product(CLIENTS, BACKENDS) if (pair[0], deed) not in LEFT_OUT]


@dataclass
class Tally:
    """What ran in this session."""

    done: set[Cell] = field(default_factory=set)
    absent: dict[str, str] = field(default_factory=dict)
    """Clients that could not be run, and why."""
    freed_after_s: list[float] = field(default_factory=list)
    """How long after a client left its slot was free."""

    def lines(self) -> list[str]:
        every = len(CLIENTS) * len(BACKENDS) * len(DEEDS)
        freed = [self.freed_after_s] if self.freed_after_s else []
        by_client = {name: sum(cell.client == name for cell in self.done) for name in CLIENTS}
        return [
            f"{len(self.done)} cells ran of {every}: "
            f"{len(CLIENTS)} clients x {len(BACKENDS)} backends x {len(DEEDS)} deeds",
            "  ".join(f"{name} {count}" for name, count in by_client.items()),
            *(f"slots were free {max(times):.2f} s after their clients left, or sooner" for times in freed),
            *(
                f"left out at both backends: {deed} with {name}: {why}"
                for (name, deed), why in LEFT_OUT.items()
            ),
            *(f"NOT RUN: {name}: {why}" for name, why in self.absent.items()),
        ]
