"""What a failed attempt means: one table, from what happened to who is told and what is tried next.

Pure. Source: docs/behaviour.md, "Retry". The dispatcher asks this table and acts; nothing else decides.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from herd.errors import (
    ApiError,
    BackendRefused,
    ModelNotFound,
    NotOffered,
    Said,
    Saturated,
    UpstreamFailed,
    UpstreamTimeout,
)


class Effect(Enum):
    """What the failure does to the router's belief about the node."""

    NONE = "none"
    UNREACHABLE = "unreachable"
    """Offline until a probe succeeds; nothing was sent, so the node does not count as tried."""
    BUSY = "busy"
    """Sendable again when the mark ends; not an attempt."""
    DELIST = "delist"
    """The model is off that node's list until the next beat."""
    STALE = "stale"
    """Boots or sequence out of step: nothing more is sent until the next beat; not an attempt."""
    BAD_MODEL = "bad_model"
    """The model cannot be loaded there for now."""


class Failure(NamedTuple):
    """One failed attempt. `elsewhere`: another node may try; `counts`: it is one of the three attempts."""

    error: ApiError
    elsewhere: bool
    effect: Effect = Effect.NONE
    counts: bool = True
    backoff: bool = True
    cancelled: bool = False
    """We ended it: the backend may still be at work."""
    why: str | None = None
    """In a few words, where the node's own reason is made of it."""


def unreachable(node: str, why: str) -> Failure:
    """Refused, no route, no name, connect time-out."""
    error = Saturated(f"node '{node}' cannot be reached ({why}); it is tried again when it answers")
    return Failure(error, True, Effect.UNREACHABLE, backoff=False, why=why)


def broken(node: str, why: str) -> Failure:
    """Reset or end before content, not HTTP, bad framing."""
    return Failure(UpstreamFailed(f"node '{node}': {why}"), True)


def too_late(node: str, seconds: float) -> Failure:
    """No first record in time."""
    error = UpstreamTimeout(f"node '{node}' sent nothing for {seconds:g} s")
    return Failure(error, True, cancelled=True)


def in_band(node: str, text: str) -> Failure:
    """The first record was an error."""
    effect = Effect.BAD_MODEL if _cannot_load(text) else Effect.NONE
    return Failure(UpstreamFailed(f"node '{node}': {text}"), True, effect)


#: X-Herd-Error word -> failure of the agent's own (docs/protocol.md §4); the rest goes by status.
def by_agent(word: str, node: str, model: str, text: str, retry_after_s: int | None) -> Failure | None:
    """What the agent says of itself; None for a word that is not known."""
    match word:
        case "busy":
            error = Saturated(f"node '{node}' is busy", retry_after_s=retry_after_s)
            return Failure(error, True, Effect.BUSY, counts=False)
        case "refused" | "not-ready":
            error = Saturated(f"the backend of node '{node}' is down: {text}", retry_after_s=retry_after_s)
            return Failure(error, True, Effect.BUSY, counts=False)
        case "auth" | "boot" | "stale":
            error = Saturated(f"node '{node}' and this router are not in step; the next heartbeat mends it")
            return Failure(error, True, Effect.STALE, counts=False, backoff=False)
        case "no-model":
            return Failure(ModelNotFound(f"model '{model}' not found", model=model), True, Effect.DELIST)
        case "timeout":
            return Failure(UpstreamTimeout(f"the backend of node '{node}' did not answer in time"), True)
        case "reset" | "framing":
            return broken(node, f"its backend broke off: {text}")
        case _:
            return None


def by_status(
    status: int, node: str, model: str, text: str, retry_after_s: int | None, said: Said | None = None
) -> Failure:
    """A backend's own status, without content. `said`: all of its answer, for what is passed on."""
    if status == 404:
        return Failure(ModelNotFound(f"model '{model}' not found", model=model), True, Effect.DELIST)
    if status == 429:
        error: ApiError = BackendRefused(429, text, retry_after_s=retry_after_s or 2, said=said)
        return Failure(error, True, Effect.BUSY, counts=False)
    if status == 503:
        error = Saturated(f"node '{node}': {text}", retry_after_s=retry_after_s)
        return Failure(error, True, Effect.BUSY, counts=False)
    if status in (401, 403):
        # Never leak a refusal that is not the caller's: the node's own backend wants credentials.
        error = UpstreamFailed(f"the backend of node '{node}' refuses the agent ({status})")
        return Failure(error, True, Effect.BAD_MODEL)
    if 300 <= status < 400:
        return Failure(
            UpstreamFailed(f"node '{node}' answered with a redirect, which is never followed"), False
        )
    if 400 <= status < 500:
        return Failure(BackendRefused(status, text, said=said), False)
    if status == 501:
        return Failure(NotOffered(f"node '{node}': {text}"), True)
    if status == 504:
        return Failure(UpstreamTimeout(f"node '{node}': {text}"), True)
    effect = Effect.BAD_MODEL if _cannot_load(text) else Effect.NONE
    return Failure(UpstreamFailed(f"node '{node}': {text}"), True, effect)


_LOAD_FAILURES = (
    "llama-server process has terminated",
    "error starting llama-server",
    "timed out waiting for llama-server",
    "out of memory",
    "unable to load",
    "failed to load",
)


def _cannot_load(text: str) -> bool:
    return any(mark in text for mark in _LOAD_FAILURES)
