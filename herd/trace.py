"""What happened to a request: one value an attempt. Pure; `store` turns it into a row, `proxy` makes it.

The values are made on the hot path, so nothing is serialised here: the trace writer does that.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Status = Literal[
    "started", "completed", "retried", "failed", "client_gone", "rejected", "interrupted", "no_output"
]

#: Exactly one row of a request has one of these once it has ended.
ENDED: frozenset[Status] = frozenset(
    {"completed", "failed", "client_gone", "rejected", "interrupted", "no_output"}
)

#: The seven signals, in the order in which a card's values stand (docs/scheduling.md §2).
SIGNALS: tuple[str, ...] = (
    "thermal",
    "memory_fit",
    "queue_depth",
    "wait_time",
    "role_affinity",
    "availability_trend",
    "context_fit",
)


class ScoreCard(NamedTuple):
    """One candidate's score. `by_signal` has the seven values in the order of SIGNALS."""

    node_id: str
    total: float
    by_signal: tuple[float, ...]


Card = tuple[str, float, tuple[float, ...]]
"""The same as a plain tuple, which is written to its column as it is: eight a request."""


class Exclusion(NamedTuple):
    """Why a node was not a candidate. `reason` is one of `herd.scheduling.eligibility.Reason`'s words."""

    node_id: str
    reason: str


class Trace(NamedTuple):
    """One attempt, started or ended (docs/traces.md). `_ms` are durations, `timestamp` is wall time."""

    request_id: str
    attempt: int
    status: Status
    timestamp: float
    model: str
    original_model: str
    original_format: str
    kind: str
    router_id: str
    client_request_id: str | None = None
    node_id: str | None = None
    score: float | None = None
    latency_ms: float | None = None
    time_to_first_token_ms: float | None = None
    queue_ms: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    retry_count: int = 0
    client_ip: str | None = None
    principal: str | None = None
    user: str | None = None
    error_message: str | None = None
    finish_reason: str | None = None
    estimated_tokens: float | None = None
    agent_version: str | None = None
    fallback_used: bool = False
    card: ScoreCard | None = None
    candidates: tuple[Card, ...] = ()
    excluded: tuple[Exclusion, ...] = ()
    tags: tuple[str, ...] = ()
