"""One request, one decision: send it, let it wait, hold it, or end it (docs/scheduling.md §3)."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple

from herd.fleet.snapshot import FleetSnapshot, InstanceView, NodeView
from herd.request import InferenceRequest
from herd.scheduling.bounds import holders_of, may_be_replaced, needs_of
from herd.scheduling.context import AS_ASKED
from herd.scheduling.eligibility import (
    REASONS,
    Hope,
    Needs,
    Reason,
    has_capabilities,
    most_hopeful,
    name_of,
)
from herd.scheduling.estimate import Ask, ask_of
from herd.scheduling.score import Candidate, Moment, Ranking, blocked, cards, rank
from herd.scheduling.signals import degraded_s
from herd.scheduling.standing import cost_of
from herd.scheduling.standins import is_cold, standins
from herd.scheduling.steps import Attempt, History, Hold, Reject, Step, Wait
from herd.trace import Exclusion, ScoreCard
from herd_node.protocol.routes import OFFERED_BY

MAX_EXCLUSIONS = 64
MIN_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 1, 60


class Look(NamedTuple):
    """One model of the chain, seen."""

    place: int
    """In the chain."""
    needs: Needs
    ask: Ask
    ranking: Ranking


class Decision(NamedTuple):
    """A step, and the candidate that is waited for, if any."""

    step: Step
    best: Candidate | None = None


def decide(request: InferenceRequest, history: History, moment: Moment) -> Decision:
    """The whole of docs/scheduling.md §3 for one request.

    1 attempts are counted over the whole chain;
    2 the first model with an eligible node is the one: 2.1 its best node can be sent to, 2.2 it is waited
      for, 2.3 it was waited for long enough, and each later model is tried once;
    3 no model has an eligible node: the most hopeful reason over the chain decides.
    """
    if history.attempts >= moment.policy.max_attempts:  # 1
        return Decision(_used_up(request, ()))
    looks: list[Look] = []
    for index in range(history.model_index, len(request.chain)):
        look = _look(request, request.chain[index], index, history, moment)
        if look.ranking.found:
            return _serve(request, look, history, moment)  # 2
        looks.append(look)
    return Decision(_nobody(request, looks, history, moment))  # 3


def _look(request: InferenceRequest, model: str, index: int, history: History, moment: Moment) -> Look:
    needs = needs_of(request, model, history, moment.snapshot)
    ask = ask_of(request, model, moment.snapshot, moment.policy)
    return tuple.__new__(Look, (index, needs, ask, rank(needs, ask, history.tried, moment)))


def _serve(request: InferenceRequest, look: Look, history: History, moment: Moment) -> Decision:
    policy = moment.policy
    if policy.vram_fallback or request.fallback == "loaded":
        loaded = _loaded_instead(request, look, history, moment)
        if loaded is not None:
            return Decision(loaded)
    block = blocked(look.ranking.where, moment.snapshot, policy, history.waited_s)
    if block is None:  # 2.1
        return tuple.__new__(Decision, (_attempt(look, moment), None))
    if history.waited_s < policy.wait_timeout_s:  # 2.2
        best, excluded = look.ranking.best, _excluded(look, moment)
        budget_s = policy.wait_timeout_s - history.waited_s
        where = (best.node_id, best.instance_key)
        wait = Wait(look.needs.model, look.place, *where, excluded, budget_s, block.value)
        return Decision(wait, best)
    for index in range(look.place + 1, len(request.chain)):  # 2.3
        later = _look(request, request.chain[index], index, history, moment)
        found, waited_s = later.ranking.found, history.waited_s
        if found and blocked(later.ranking.where, moment.snapshot, policy, waited_s) is None:
            return Decision(_attempt(later, moment))
    if history.attempts:
        return Decision(_used_up(request, _excluded(look, moment)))
    message = f"every node that could serve {_names(request)} stayed busy for {history.waited_s:.0f} s"
    retry_after_s = _shortest_queue_s(look, moment)
    return Decision(Reject(503, message, retry_after_s, _excluded(look, moment)))


def _loaded_instead(
    request: InferenceRequest, look: Look, history: History, moment: Moment
) -> Attempt | None:
    """What serves it at once where its model would have to be loaded: a later one of its chain, a stand-in.

    Never one that would be loaded anew for it, with more context.
    """
    snapshot, policy, ranking = moment.snapshot, moment.policy, look.ranking
    if not may_be_replaced(request, policy):
        return None
    rows = moment.table.look(look.needs, snapshot, policy, moment.now_s).rows
    if not is_cold(rows, {x.node_id for x in ranking.excluded}):
        return None
    for index in range(look.place + 1, len(request.chain)):
        later = _look(request, request.chain[index], index, history, moment)
        if _is_ready(later, moment):
            return _attempt(later, moment)
    for one in standins(look.needs, snapshot):
        other = _look(request, one.model, look.place, history, moment)
        if one.model not in request.chain and _is_ready(other, moment):
            name = name_of(other.ranking.where.instance, one.model)
            return _attempt(other, moment)._replace(stand_in=one.model if name is None else name.shown)
    return None


def _is_ready(look: Look, moment: Moment) -> bool:
    """Its best node has it loaded, with enough context, and can be sent to now."""
    if not look.ranking.found:
        return False
    where = look.ranking.where
    if where.instance.state != "hot" or look.ask.context_tokens > where.context_limit:
        return False
    return blocked(where, moment.snapshot, moment.policy, 0.0) is None


def _attempt(look: Look, moment: Moment) -> Attempt:
    place, needs, ask, ranking = look
    _, policy, now_s, _, _ = moment
    _, _, node_id, instance_key, where, cached = ranking.found[0]
    late_s = degraded_s(ranking.unit, policy) if where.late else 0.0
    cost = cost_of(where, ask, cached, now_s, late_s)
    made = cards(ranking, ask, policy, now_s)
    idle = where.victims.idle
    attempt = (
        node_id,
        instance_key,
        needs.model,
        place,
        tuple.__new__(ScoreCard, made[0]),
        made,
        _excluded(look, moment),
        cost,
        ask.tokens,
        cost.prefill,
        ask.out_tokens,
        tuple([x.key for x in idle]) if idle else (),
        AS_ASKED,
        None,
    )
    return tuple.__new__(Attempt, attempt)  # past the generated constructor; a test reads each field


def _excluded(look: Look, moment: Moment) -> tuple[Exclusion, ...]:
    """Holders that were left out, then nodes that do not have the model; by id, 64 at most."""
    found, absent = look.ranking.excluded, moment.table.absent(look.needs.model, moment.snapshot)
    return (found + absent)[:MAX_EXCLUSIONS]


def _nobody(request: InferenceRequest, looks: list[Look], history: History, moment: Moment) -> Step:
    """No model of the chain has an eligible node: hold, 400, 404, or the last failure.

    1 spent: it failed on all that could be tried, and nobody else may come;
    2 the one node that may serve it has no model of the chain, or is not known: 404;
    3 not now, or no node is online at all: hold while the budget lasts, then 503;
    4 never: 400;
    5 nowhere: 404.
    """
    snapshot = moment.snapshot
    look = _most_hopeful_look(looks, snapshot)
    reason = None if look is None else _reason(look, snapshot)
    hope = Hope.NOWHERE if reason is None else REASONS[reason].hope
    excluded = () if look is None else _excluded(look, moment)
    if hope is Hope.SPENT or (history.attempts and hope is not Hope.NOT_NOW):  # 1
        return _used_up(request, excluded)
    if request.only is not None and hope is Hope.NOWHERE:  # 2
        return Reject(404, _not_there(request, request.only, snapshot), None, excluded)
    if hope is Hope.NOT_NOW or not snapshot.any_online:  # 3
        reason = reason if hope is Hope.NOT_NOW and reason is not None else Reason.OFFLINE
        return _hold(request, reason, history, excluded, moment)
    if reason is not None and hope is Hope.NEVER and look is not None:  # 4
        name = request.asked[look.place]
        if reason is Reason.CAPABILITY_MISSING and (endpoint := _missing_endpoint(look, snapshot)):
            where = (
                "is on no node that offers" if request.only is None else "is on a node that does not offer"
            )
            message = f"model '{name}' {where} {endpoint}; {OFFERED_BY[endpoint]} would"
            return Reject(501, message, None, excluded)
        message = f"model '{name}' can not serve this request: {_never_sentence(reason, look, snapshot)}"
        return Reject(400, message, None, excluded)
    some = "it" if len(request.chain) == 1 else "any of them"
    message = f"{_names(request)} not found: no node of the fleet has {some}"  # 5
    return Reject(404, message, None, excluded)


def _not_there(request: InferenceRequest, node_id: str, snapshot: FleetSnapshot) -> str:
    if node_id in snapshot.nodes or any(node_id in known for known in snapshot.remembered.values()):
        return f"node '{node_id}' does not have {_names(request)}"
    return f"node '{node_id}' is not known"


def _hold(
    request: InferenceRequest,
    reason: Reason,
    history: History,
    excluded: tuple[Exclusion, ...],
    moment: Moment,
) -> Step:
    budget_s = moment.policy.hold_timeout_s - history.held_s
    why = REASONS[reason].sentence if moment.snapshot.any_online else "no node is online"
    if budget_s > 0:
        return Hold(reason.value, f"{_names(request)} can not be served now: {why}", budget_s, excluded)
    if history.attempts:
        return _used_up(request, excluded)
    message = f"nobody could take {_names(request)} within {history.held_s:.0f} s: {why}"
    return Reject(503, message, _shortest_mark_s(request, moment), excluded)


def _most_hopeful_look(looks: list[Look], snapshot: FleetSnapshot) -> Look | None:
    def hope(look: Look) -> Hope:
        reason = _reason(look, snapshot)
        return Hope.NOWHERE if reason is None else REASONS[reason].hope

    return max(looks, key=hope, default=None)


def _reason(look: Look, snapshot: FleetSnapshot) -> Reason | None:
    """The most hopeful reason of a model that nobody can take; None when nobody has it."""
    reasons = [Reason(excluded.reason) for excluded in look.ranking.excluded]
    gone = snapshot.remembered.get(look.needs.model, frozenset()) - snapshot.nodes.keys()
    if gone and look.needs.only in (None, *gone):
        reasons.append(Reason.OFFLINE)
    return most_hopeful(reasons)


def _never_sentence(reason: Reason, look: Look, snapshot: FleetSnapshot) -> str:
    sentence = REASONS[reason].sentence
    if reason is Reason.CONTEXT_TOO_SMALL:
        return f"{sentence}: {_too_long(look, snapshot)}"
    if reason is not Reason.CAPABILITY_MISSING:
        return sentence
    # in the words by which clients know it, and ask again without
    return f"it does not support {', '.join(_missing_everywhere(look, snapshot) or sorted(look.needs.words))}"


def _too_long(look: Look, snapshot: FleetSnapshot) -> str:
    """What is asked for, and the most that there is."""
    small = {x.node_id for x in look.ranking.excluded if x.reason == Reason.CONTEXT_TOO_SMALL.value}
    holders = snapshot.holders.get(look.needs.model, ())
    offers = [(-(x.context_tokens or 0), node.node_id) for node, x in holders if node.node_id in small]
    least, node_id = min(offers)
    wanted, asks = look.ask.wanted_context_tokens, f"its prompt is estimated at {look.ask.tokens:.0f} tokens"
    if wanted is not None and wanted > -least:
        asks = f"it asks for num_ctx {wanted} ({asks})"
    return f"{asks}, and the largest context is {-least} tokens, on node '{node_id}'"


def _missing_endpoint(look: Look, snapshot: FleetSnapshot) -> str | None:
    """The endpoint that no backend offers, if that is all that is missing."""
    missing = _missing_everywhere(look, snapshot)
    return missing[0] if missing and all(word in OFFERED_BY for word in missing) else None


def _missing_everywhere(look: Look, snapshot: FleetSnapshot) -> list[str]:
    """The words that no holder of the model has."""
    holders = list(holders_of(look.needs.model, look.needs.only, snapshot))
    return [w for w in sorted(look.needs.words) if not _somebody_has(w, look.needs, holders)]


def _somebody_has(word: str, needs: Needs, holders: Iterable[tuple[NodeView, InstanceView]]) -> bool:
    return any(has_capabilities(x, needs._replace(words=frozenset({word}))) for _, x in holders)


def _used_up(request: InferenceRequest, excluded: tuple[Exclusion, ...]) -> Reject:
    message = f"{_names(request)} could not be served: every attempt failed"
    return Reject(None, message, None, excluded)


def _names(request: InferenceRequest) -> str:
    """The models as the caller wrote them: `model 'a'`, `models 'a', 'b'`."""
    quoted = ", ".join(f"'{name}'" for name in request.asked)
    return f"model {quoted}" if len(request.asked) == 1 else f"models {quoted}"


def _retry_after_s(seconds: float) -> int:
    return min(MAX_RETRY_AFTER_S, max(MIN_RETRY_AFTER_S, ceil(seconds)))


def _shortest_queue_s(look: Look, moment: Moment) -> int:
    waits = (cost_of(x.where, look.ask, x.cached, moment.now_s).wait for x in look.ranking.candidates)
    return _retry_after_s(min(waits, default=moment.policy.retry_after_s))


def _shortest_mark_s(request: InferenceRequest, moment: Moment) -> int:
    """Until the first mark on a holder ends: its own `busy`, a failed load, an open breaker."""
    marks = [
        until_s - moment.now_s
        for model in request.chain
        for node, instance in holders_of(model, request.only, moment.snapshot)
        for until_s in (instance.busy_until_s, instance.bad_until_s, node.breaker_open_until_s)
        if until_s > moment.now_s
    ]
    return _retry_after_s(min(marks, default=moment.policy.retry_after_s))
