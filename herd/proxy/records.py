"""What an attempt leaves behind: its trace row and what the registry learns from it. Pure."""

from __future__ import annotations

from typing import NamedTuple

from herd.dialects import Ending
from herd.errors import ApiError, BackendRefused
from herd.fleet.registry import AttemptResult, AttemptToken
from herd.proxy.calls import Peer
from herd.request import InferenceRequest
from herd.scheduling.plan import Attempt, Reject
from herd.trace import Card, Status, Trace


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
    return AttemptResult(  # by place, at half the cost
        True,
        ending.prompt_tokens,
        ending.cached_tokens,
        ending.completion_tokens,
        ttft_s,
        total_s,
        ending.prefill_ms,
        ending.decode_ms,
        load_s,
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
    number: int,
    router_id: str,
    now_s: float,
    ttft_s: float | None,
    ending: Ending | None,
    error: ApiError | None,
    reject: Reject | None,
) -> Trace:
    """One row. Without `sent` it is a request that never reached a node: refused, or its client left."""
    candidates: tuple[Card, ...] = ()
    if sent is None:
        step, card, model, instead = None, None, request.chain[0], False
        excluded = reject.excluded if reject is not None else ()
        since_s, sent_s, timestamp = request.arrival_s, now_s, request.arrival_wall_s
    else:
        step = sent.step
        card, candidates, excluded = step.card, step.candidates, step.excluded
        model, instead = step.model, step.model_index > 0 or step.stand_in is not None
        since_s = sent_s = sent.started_s
        timestamp = sent.started_wall_s
        if not card.by_signal:
            card = None
    message = _message(error) if error is not None else (ending.message if ending is not None else None)
    principal, route, end = request.principal, request.route, ending if ending is not None else _NOTHING
    # by place and past the generated constructor, which more than halves its cost: a test reads each field
    return tuple.__new__(
        Trace,
        (
            request.request_id,
            number,
            status,
            timestamp,
            model,
            request.asked[0],
            route.dialect,
            route.kind,
            router_id,
            request.client_request_id,
            step.node_id if step is not None else None,
            card.total if card is not None else None,
            (now_s - since_s) * 1000 if status != "started" else None,
            None if ttft_s is None else ttft_s * 1000,
            (sent_s - request.arrival_s) * 1000,
            end.prompt_tokens,
            end.cached_tokens,
            end.completion_tokens,
            sent.retries if sent is not None else 0,
            principal.address if principal is not None else None,
            principal.kind if principal is not None else None,
            request.user,
            message[:1000] if message else None,
            end.finish_reason,
            round(request.est_tokens, 1),
            sent.agent_version if sent is not None else None,
            instead,
            card,
            candidates,
            excluded,
            request.tags,
        ),
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
