"""What a client asked, as one frozen value. Pure: nothing here does I/O or reads a clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from herd_node.protocol import forms, jsonedit
from herd_node.protocol.routes import Route

Fallback = Literal["default", "loaded", "chain", "none"]
"""Which other models may serve a request: as the router is set; one that is loaded, too; those of its own
chain; none."""


LoadOptions = tuple[tuple[str, int | bool], ...]
"""Name and value of options that belong to a loaded model and not to one request."""


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


class InferenceRequest(NamedTuple):
    """One admitted request. `body` is kept as it came: only `model` and load-time options are ever edited.

    It is a tuple because that is the cheapest frozen value. Read by field name only; its middle, from `asked`
    to `fallback`, is what a dialect has read (`herd.dialects.Parsed`), field by field.
    """

    request_id: str
    route: Route
    chain: tuple[str, ...]
    """Model names in canonical form, the requested one first, then `fallback_models`. Never empty."""
    body: forms.Body
    asked: tuple[str, ...]
    """The same names as the caller wrote them."""
    stream: bool
    est_tokens: float
    """Estimated prompt tokens (scheduling.md §1), before the per-model correction."""
    max_tokens: int | None = None
    """The caller's own limit (max_tokens, max_completion_tokens, num_predict > 0); None when absent."""
    wanted_context_tokens: int | None = None
    """`options.num_ctx` of the request, as Ollama takes it; None when absent."""
    needs: frozenset[str] = frozenset()
    """Words that the model's capabilities must contain: completion, embedding, tools, vision, ..."""
    prefixes: tuple[PrefixMark, ...] = ()
    buffered: bool = False
    """Tools or structured output: backends hold their records back, so silence may last longer."""
    user: str | None = None
    tags: tuple[str, ...] = ()
    model_key: str = "model"
    """The field of `body` that names the model (`name` in an old show request); it stands there once."""
    load_options: LoadOptions = ()
    """Its other options that decide how Ollama loads a model, by name; empty in every other dialect."""
    fallback: Fallback = "default"
    headers: Sequence[tuple[bytes, bytes]] = ()
    """End-to-end headers that go on to the node (Content-Type, Accept)."""
    client_request_id: str | None = None
    principal: Principal | None = None
    resolved: tuple[str, ...] = ()
    """The names under which it is sent, where an alias stands for one of them; else empty."""
    form_span: tuple[int, int] | None = None
    """Where the model's name lies in a multipart form."""
    only: str | None = None
    """The node that alone may serve it (`X-Fleet-Node`)."""
    progress: bool = False
    """The caller wants to be told what it waits for (`X-Fleet-Progress`)."""
    arrival_s: float = 0.0
    arrival_wall_s: float = 0.0

    @property
    def model_span(self) -> tuple[int, int] | None:
        """Where the JSON string of the model lies in `body`: [start, end), quotes included.

        Looked for when it is asked for: only a fallback model or an alias needs it.
        """
        if self.form_span is not None:
            return self.form_span
        return jsonedit.find_top_level(self.body[:], self.model_key)
