"""What an attempt leaves behind: its trace row and what the registry learns from it. Pure."""

from __future__ import annotations

from typing import NamedTuple

from herd.dialects import Ending
from herd.errors import ApiError, BackendRefused
from herd.fleet.registry import AttemptResult, AttemptToken
from herd.proxy.calls import Peer
from herd.request import InferenceRequest
from herd.scheduling.plan import Attempt, Reject
from herd.trace import Status, Trace


class Sent(NamedTuple):
    """One attempt in work."""

    step: Attempt
    token: AttemptToken | None
    peer: Peer
    backend_kind: str
    cold: bool
    agent_version: str | None
    started_s: float
    started_wall_s: float
    retries: int
    shown: str = ""
    """The model's name as the node spells it."""


#: An answer that said nothing about itself.
_NOTHING = Ending("truncated")


def result(
    sent: Sent, ending: Ending, ttft_s: float | None, total_s: float, est_tokens: float
) -> AttemptResult:
    """What a complete answer says about the node's speed."""
    load_s = None
    if sent.cold and ttft_s is not None and ending.prefill_ms is not None:
        load_s = max(0.0, ttft_s - ending.prefill_ms / 1000)
    return AttemptResult(
        ok=True,
        prompt_tokens=ending.prompt_tokens,
        cached_tokens=ending.cached_tokens,
        completion_tokens=ending.completion_tokens,
        ttft_s=ttft_s,
        total_s=total_s,
        prefill_ms=ending.prefill_ms,
        decode_ms=ending.decode_ms,
        load_s=load_s,
        est_tokens=est_tokens or None,
    )


def _message(error: ApiError) -> str:
    """What may be kept of an error. A backend's 4xx quotes what the caller sent, so only its status stays."""
    if isinstance(error, BackendRefused):
        return f"the backend refused the request with status {error.status}"
    return error.message


def trace(
    request: InferenceRequest,
    sent: Sent | None,
    status: Status,
    *,
    number: int,
    router_id: str,
    now_s: float,
    ttft_s: float | None,
    ending: Ending | None,
    error: ApiError | None,
    reject: Reject | None,
) -> Trace:
    """One row. Without `sent` it is a request that never reached a node: refused, or its client left."""
    step = sent.step if sent is not None else None
    card = step.card if step is not None and step.card.by_signal else None
    since_s = sent.started_s if sent is not None else request.arrival_s
    message = _message(error) if error is not None else (ending.message if ending is not None else None)
    principal, end = request.principal, ending if ending is not None else _NOTHING
    # by place, which halves the cost of the value: a test reads each field back
    return Trace(
        request.request_id,
        number,
        status,
        sent.started_wall_s if sent is not None else request.arrival_wall_s,
        request.chain[step.model_index if step is not None else 0],
        request.asked[0],
        request.route.dialect,
        request.route.kind,
        router_id,
        request.client_request_id,
        step.node_id if step is not None else None,
        card.total if card is not None else None,
        card,
        step.candidates if step is not None else (),
        step.excluded if step is not None else (reject.excluded if reject is not None else ()),
        (now_s - since_s) * 1000 if status != "started" else None,
        None if ttft_s is None else ttft_s * 1000,
        ((sent.started_s if sent is not None else now_s) - request.arrival_s) * 1000,
        end.prompt_tokens,
        end.cached_tokens,
        end.completion_tokens,
        sent.retries if sent is not None else 0,
        bool(step is not None and step.model_index),
        principal.address if principal is not None else None,
        principal.kind if principal is not None else None,
        request.user,
        message[:1000] if message else None,
        end.finish_reason,
        round(request.est_tokens, 1),
        request.tags,
        sent.agent_version if sent is not None else None,
    )


def started(request: InferenceRequest, sent: Sent, number: int, router_id: str) -> Trace:
    """The row of an attempt in work. Needs no clock, so it can be made when the row is wanted."""
    return trace(
        request,
        sent,
        "started",
        number=number,
        router_id=router_id,
        now_s=sent.started_s,
        ttft_s=None,
        ending=None,
        error=None,
        reject=None,
    )
