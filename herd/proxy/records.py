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
    scored = step is not None and bool(step.card.by_signal)
    ended = status not in ("started",)
    since_s = sent.started_s if sent is not None else request.arrival_s
    message = _message(error) if error is not None else (ending.message if ending is not None else None)
    principal = request.principal
    return Trace(
        request_id=request.request_id,
        attempt=number,
        status=status,
        timestamp=sent.started_wall_s if sent is not None else request.arrival_wall_s,
        model=request.chain[step.model_index if step is not None else 0],
        original_model=request.asked[0],
        original_format=request.route.dialect,
        kind=request.route.kind,
        router_id=router_id,
        client_request_id=request.client_request_id,
        node_id=step.node_id if step is not None else None,
        score=step.card.total if step is not None and scored else None,
        card=step.card if step is not None and scored else None,
        candidates=step.candidates if step is not None else (),
        excluded=step.excluded if step is not None else (reject.excluded if reject is not None else ()),
        latency_ms=(now_s - since_s) * 1000 if ended else None,
        time_to_first_token_ms=None if ttft_s is None else ttft_s * 1000,
        queue_ms=((sent.started_s if sent is not None else now_s) - request.arrival_s) * 1000,
        prompt_tokens=ending.prompt_tokens if ending is not None else None,
        cached_tokens=ending.cached_tokens if ending is not None else None,
        completion_tokens=ending.completion_tokens if ending is not None else None,
        retry_count=sent.retries if sent is not None else 0,
        fallback_used=bool(step is not None and step.model_index),
        client_ip=principal.address if principal is not None else None,
        principal=principal.kind if principal is not None else None,
        user=request.user,
        error_message=message[:1000] if message else None,
        finish_reason=ending.finish_reason if ending is not None else None,
        estimated_tokens=round(request.est_tokens, 1),
        tags=request.tags,
        agent_version=sent.agent_version if sent is not None else None,
    )
