"""One request, one decision: send it, let it wait, hold it, or end it (docs/scheduling.md §3)."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import NamedTuple

from herd.fleet.snapshot import FleetSnapshot, InstanceView, NodeView
from herd.request import InferenceRequest
from herd.scheduling.eligibility import REASONS, Hope, Needs, Reason, has_capabilities, most_hopeful
from herd.scheduling.estimate import Ask, ask_of, cost_of
from herd.scheduling.score import Candidate, Moment, Ranking, blocked, cards, cost_of_candidate, rank
from herd.scheduling.steps import Attempt, History, Hold, Reject, Step, Wait
from herd.trace import Exclusion

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
    """A step, and the candidate that it is about, if any."""

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
        look = _look(request, index, history, moment)
        if look.ranking.best:
            return _serve(request, look, history, moment)  # 2
        looks.append(look)
    return Decision(_nobody(request, looks, history, moment))  # 3


def _look(request: InferenceRequest, index: int, history: History, moment: Moment) -> Look:
    model = request.chain[index]
    needs = Needs(model, request.needs, request.wanted_context_tokens)
    ask = ask_of(request, model, moment.snapshot, moment.policy)
    return Look(index, needs, ask, rank(needs, ask, history.tried, moment))


def _serve(request: InferenceRequest, look: Look, history: History, moment: Moment) -> Decision:
    policy = moment.policy
    best = look.ranking.best[0]
    block = blocked(best, moment.snapshot, policy, history.waited_s)
    if block is None:  # 2.1
        return Decision(_attempt(look, moment), best)
    if history.waited_s < policy.wait_timeout_s:  # 2.2
        excluded = _excluded(look, moment.snapshot)
        budget_s = policy.wait_timeout_s - history.waited_s
        where = (best.node_id, best.instance_key)
        wait = Wait(look.needs.model, look.place, *where, excluded, budget_s, block.value)
        return Decision(wait, best)
    for index in range(look.place + 1, len(request.chain)):  # 2.3
        later = _look(request, index, history, moment)
        if later.ranking.best:
            candidate = later.ranking.best[0]
            if blocked(candidate, moment.snapshot, policy, history.waited_s) is None:
                return Decision(_attempt(later, moment), candidate)
    if history.attempts:
        return Decision(_used_up(request, _excluded(look, moment.snapshot)))
    message = f"every node that could serve {_names(request)} stayed busy for {history.waited_s:.0f} s"
    retry_after_s = _shortest_queue_s(look, moment)
    return Decision(Reject(503, message, retry_after_s, _excluded(look, moment.snapshot)))


def _attempt(look: Look, moment: Moment) -> Attempt:
    ranking, policy = look.ranking, moment.policy
    best = ranking.best[0]
    cost = cost_of_candidate(best, look.ask, ranking, policy, moment.now_s)
    made = cards(ranking, look.ask, policy, moment.now_s)
    return Attempt(
        node_id=best.node_id,
        instance_key=best.instance_key,
        model=look.needs.model,
        model_index=look.place,
        card=made[0],
        candidates=made,
        excluded=_excluded(look, moment.snapshot),
        cost=cost,
        est_tokens=look.ask.tokens,
        prefill_s=cost.prefill,
        out_tokens=look.ask.out_tokens,
        evicts=tuple([x.key for x in best.where.victims.idle]),
    )


def _excluded(look: Look, snapshot: FleetSnapshot) -> tuple[Exclusion, ...]:
    """Holders that were left out, then nodes that do not have the model; by id, 64 at most."""
    found = list(look.ranking.excluded[:MAX_EXCLUSIONS])
    model, nodes = look.needs.model, snapshot.nodes
    if len(found) < MAX_EXCLUSIONS and (remembered := snapshot.remembered.get(model)):
        found.extend(Exclusion(x, Reason.OFFLINE.value) for x in sorted(remembered - nodes.keys()))
    holders = snapshot.holders.get(model, ())
    if len(found) < MAX_EXCLUSIONS and len(holders) < len(nodes):
        absent = sorted(nodes.keys() - {node.node_id for node, _ in holders})
        found.extend(Exclusion(x, Reason.MODEL_ABSENT.value) for x in absent)
    return tuple(found[:MAX_EXCLUSIONS])


def _nobody(request: InferenceRequest, looks: list[Look], history: History, moment: Moment) -> Step:
    """No model of the chain has an eligible node: hold, 400, 404, or the last failure.

    1 spent: it failed on all that could be tried, and nobody else may come;
    2 not now, or no node is online at all: hold while the budget lasts, then 503;
    3 never: 400;
    4 nowhere: 404.
    """
    snapshot = moment.snapshot
    look = _most_hopeful_look(looks, snapshot)
    reason = None if look is None else _reason(look, snapshot)
    hope = Hope.NOWHERE if reason is None else REASONS[reason].hope
    excluded = () if look is None else _excluded(look, snapshot)
    if hope is Hope.SPENT or (history.attempts and hope is not Hope.NOT_NOW):  # 1
        return _used_up(request, excluded)
    if hope is Hope.NOT_NOW or not snapshot.any_online:  # 2
        reason = reason if hope is Hope.NOT_NOW and reason is not None else Reason.OFFLINE
        return _hold(request, reason, history, excluded, moment)
    if reason is not None and hope is Hope.NEVER and look is not None:  # 3
        name = request.asked[look.place]
        message = f"model '{name}' can not serve this request: {_never_sentence(reason, look, snapshot)}"
        return Reject(400, message, None, excluded)
    some = "it" if len(request.chain) == 1 else "any of them"
    message = f"{_names(request)} not found: no node of the fleet has {some}"  # 4
    return Reject(404, message, None, excluded)


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
    if snapshot.remembered.get(look.needs.model, frozenset()) - snapshot.nodes.keys():
        reasons.append(Reason.OFFLINE)
    return most_hopeful(reasons)


def _never_sentence(reason: Reason, look: Look, snapshot: FleetSnapshot) -> str:
    sentence = REASONS[reason].sentence
    if reason is not Reason.CAPABILITY_MISSING:
        return sentence
    holders = snapshot.holders.get(look.needs.model, ())
    one = [w for w in sorted(look.needs.words) if not _somebody_has(w, look.needs, holders)]
    return f"{sentence} ({', '.join(one or sorted(look.needs.words))})"


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
    waits = (cost_of(x.where, look.ask, x.cached, moment.now_s).wait for x in look.ranking.best)
    return _retry_after_s(min(waits, default=moment.policy.retry_after_s))


def _shortest_mark_s(request: InferenceRequest, moment: Moment) -> int:
    """Until the first mark on a holder ends: its own `busy`, a failed load, an open breaker."""
    marks = [
        until_s - moment.now_s
        for model in request.chain
        for node, instance in moment.snapshot.holders.get(model, ())
        for until_s in (instance.busy_until_s, instance.bad_until_s, node.breaker_open_until_s)
        if until_s > moment.now_s
    ]
    return _retry_after_s(min(marks, default=moment.policy.retry_after_s))
