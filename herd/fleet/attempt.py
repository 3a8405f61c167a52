"""Attempts: the token that stands for a taken slot, how an attempt ended, and what its speed teaches."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from herd.fleet.instance import Instance
from herd.fleet.rates import Sample
from herd.fleet.snapshot import InstanceState, Running
from herd.request import PrefixMark

if TYPE_CHECKING:
    from herd.fleet.record import Node


class AttemptResult(NamedTuple):
    """How an attempt ended. None where it is not known."""

    ok: bool
    prompt_tokens: int | None = None
    """Cached ones included."""
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_s: float | None = None
    total_s: float | None = None
    prefill_ms: float | None = None
    """The backend's own figure, for the tokens that were not cached."""
    decode_ms: float | None = None
    load_s: float | None = None
    cancelled: bool = False
    """We hung up on it: the backend may still finish the batch in work."""
    settle_s: float = 0.0
    """How long its slot may stay taken after that."""
    est_tokens: float | None = None
    """Estimated prompt tokens before the model's correction; None: the last prefix mark says it."""

    @property
    def timed(self) -> bool:
        """Whether it says anything about speed: `sample` is empty of seconds otherwise."""
        return not (self.ttft_s is self.prefill_ms is self.decode_ms is self.load_s is None)


class AttemptToken:
    """A slot that is taken. Opaque: it is made, handed back, and compared by identity."""

    __slots__ = (
        "cache_possible",
        "company",
        "ended",
        "instance",
        "node",
        "prefixes",
        "running",
        "was",
    )

    def __init__(
        self, node: Node, instance: Instance, running: Running, prefixes: tuple[PrefixMark, ...]
    ) -> None:
        self.node = node
        self.instance = instance
        self.running = running
        self.prefixes = prefixes
        self.was: InstanceState = instance.state
        self.company = node.company
        self.ended = False
        self.cache_possible = instance.prompts.starts_like(prefixes)

    @property
    def alone(self) -> bool:
        """Whether nothing else ran on the node since it started."""
        return self.company == self.node.company


def sample(token: AttemptToken, result: AttemptResult) -> Sample:
    """What one lone request says about speed. The backend's own figures come before ours."""
    hot = token.was == "hot"
    prefill_s = result.prefill_ms / 1000 if result.prefill_ms is not None else None
    if prefill_s is None and hot:
        prefill_s = result.ttft_s
    # 1. tokens computed: without the cached ones; unknown where the cache may have helped unseen
    uncached: float | None = None
    if result.prompt_tokens is not None:
        if result.cached_tokens is not None:
            uncached = result.prompt_tokens - result.cached_tokens
        elif not token.cache_possible:
            uncached = result.prompt_tokens
    # 2. decoding
    decode_s = result.decode_ms / 1000 if result.decode_ms is not None else None
    if decode_s is None and result.ttft_s is not None and result.total_s is not None:
        decode_s = result.total_s - result.ttft_s
    # 3. loading: what the first token waited for beside the prefill
    load_s = result.load_s
    if load_s is None and result.ttft_s is not None and not hot:
        load_s = result.ttft_s - (prefill_s if prefill_s is not None else token.running.prefill_s)
    loaded_from = token.was if token.was == "cold" or token.was == "warm" else None
    return Sample(uncached, prefill_s, result.completion_tokens, decode_s, load_s, loaded_from)
