"""What a client asked, as one frozen value. Pure: nothing here does I/O or reads a clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from herd_node.protocol import jsonedit
from herd_node.protocol.routes import Route


class PrefixMark(NamedTuple):
    """One step of a prompt's chain of message digests: equal digests mean an equal prompt up to there."""

    digest: bytes
    tokens: float
    """Estimated tokens of the whole prompt up to and including this message."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. `kind`: loopback | lan | key | admin (the last two come with keys)."""

    kind: str
    id: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRequest:
    """One admitted request. `body` is kept as it came: only the bytes of `model` are ever replaced."""

    request_id: str
    route: Route
    chain: tuple[str, ...]
    """Model names in canonical form, the requested one first, then `fallback_models`. Never empty."""
    asked: tuple[str, ...]
    """The same names as the caller wrote them."""
    body: bytes
    stream: bool
    est_tokens: float
    """Estimated prompt tokens (scheduling.md §1), before the per-model correction."""
    max_tokens: int | None = None
    """The caller's own limit (max_tokens, max_completion_tokens, num_predict > 0); None when absent."""
    wanted_context_tokens: int | None = None
    """`options.num_ctx` of the request; None when absent."""
    needs: frozenset[str] = frozenset()
    """Words that the model's capabilities must contain: completion, embedding, tools, vision, ..."""
    prefixes: tuple[PrefixMark, ...] = ()
    headers: tuple[tuple[bytes, bytes], ...] = ()
    """End-to-end headers that go on to the node (Content-Type, Accept)."""
    client_request_id: str | None = None
    principal: Principal | None = None
    user: str | None = None
    tags: tuple[str, ...] = ()
    model_key: str = "model"
    """The field of `body` that names the model (`name` in an old show request)."""
    buffered: bool = False
    """Tools or structured output: backends hold their records back, so silence may last longer."""
    arrival_s: float = 0.0
    arrival_wall_s: float = 0.0

    @property
    def model_span(self) -> tuple[int, int] | None:
        """Where the JSON string of the model lies in `body`: [start, end), quotes included.

        Looked for when it is asked for: only a fallback model needs it.
        """
        return jsonedit.find_top_level(self.body, self.model_key)
