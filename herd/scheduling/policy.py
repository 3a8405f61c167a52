"""The planner's settings, as one frozen value. Built in `herd.app` from `FLEET_*`; nothing here reads any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ContextProtection = Literal["strip", "warn", "passthrough"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """docs/scheduling.md §5. The defaults are what the simulations found; few of them are worth touching."""

    points: float = 15.0
    """Points that the total time of the best choice is worth (`FLEET_SCORE_POINTS`, at most 15)."""
    price: float = 0.5
    order: float = 5.0
    """Virtual deadline = arrival + order · E_best."""
    window: int = 24
    """Waiting requests a model that one plan looks at."""
    hysteresis_s: float = 10.0
    drain_after_s: float = 120.0
    busy_tau_s: float = 180.0
    rate_tau_s: float = 300.0
    want_horizon_s: float = 60.0
    out_first_guess_tokens: float = 150.0
    """Completion tokens of a model of which nothing is known."""
    wait_timeout_s: float = 300.0
    hold_timeout_s: float = 30.0
    max_attempts: int = 3
    vram_fallback: bool = False
    """A loaded model of the same category serves instead of a cold load (`FLEET_VRAM_FALLBACK`)."""
    memory_ceiling_ratio: float = 0.9
    """Share of RAM that models may take on a machine without GPU."""
    default_context_tokens: int = 4096
    """Context that a cold model is assumed to be loaded with when nobody says."""
    kv_bytes_per_token: float = 0.15e6
    degraded_points: float = 10.0
    """What a node whose beat is late loses, beside the seven signals."""
    offline_after_s: float = 30.0
    estimate_doubt: float = 1.25
    """An estimated prompt must exceed a fixed context by this factor before the request is refused for it."""
    unknown_service_s: float = 10.0
    """E of a request for which no node is known, for its place in the queue."""
    retry_after_s: float = 5.0
    """Retry-After where no estimate exists."""
    context_protection: ContextProtection = "strip"
    """What becomes of options that would make Ollama load a model anew (`FLEET_CONTEXT_PROTECTION`)."""
    row_age_s: float = 1.0
    """Kept rows are made anew after this time at the latest: the congestion price in them decays."""

    def __post_init__(self) -> None:
        # Beyond 15 a clipped signal could let a slower node look better (docs/scheduling.md §2).
        if not 0 < self.points <= 15:
            raise ValueError(f"points must be more than 0 and at most 15, not {self.points}")


DEFAULT_POLICY = Policy()
