"""The candidates of one request, ranked; and why the best one may still not be sent to.

Ranking is by T, the expected total time; the scores say the same in points (docs/scheduling.md §2). What
does not depend on the request is kept in a `CostTable`, row by row, while the views stay the same objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from heapq import nsmallest
from types import MappingProxyType
from typing import NamedTuple

from herd.fleet.snapshot import FleetSnapshot, InstanceView, NodeView
from herd.scheduling import signals
from herd.scheduling.context import is_resident
from herd.scheduling.eligibility import Needs, Reason, why_not
from herd.scheduling.estimate import (
    Ask,
    Cost,
    Standing,
    cached_prefix_tokens,
    cost_of,
    is_waited_for,
    seconds,
    standing,
    time_to_idle_s,
)
from herd.scheduling.policy import Policy
from herd.trace import Exclusion, ScoreCard

MAX_CANDIDATES = 8


class Blocked(StrEnum):
    """Why an eligible instance is not sent to now (docs/scheduling.md §3 and §4)."""

    NO_FREE_SLOT = "no_free_slot"
    CLAIMED = "claimed"
    NODE_LOADS_OTHER = "node_loads_other"
    NEEDS_BUSY_EVICTED = "needs_busy_evicted"
    HYSTERESIS = "hysteresis"
    DRAINED = "drained"


class Drain(NamedTuple):
    """Nothing more is sent to the instances `keys` of a node, and nothing but `key` is loaded there."""

    model: str
    """Who waits for it."""
    key: str
    keys: frozenset[str]
    since_s: float
    load_s: float
    """How long the newcomer takes to load: what the drained ones must wait for besides."""


DrainState = Mapping[str, Drain]
"""Node id -> its drain; at most one a node."""

NO_DRAINS: DrainState = MappingProxyType({})


class Claims(NamedTuple):
    """What those who wait already count on. Whoever comes later sees it."""

    waiting: Mapping[tuple[str, str], int] = MappingProxyType({})
    """(node id, instance key) -> earlier waiting requests that claimed it."""
    drains: DrainState = NO_DRAINS


NO_CLAIMS = Claims()


def drain_rest_s(node: NodeView, instance: InstanceView, drains: DrainState, now_s: float) -> float | None:
    """How long a drain of the node keeps the instance from being sent to; None when it does not."""
    drain = drains.get(node.node_id)
    if drain is None or instance.key == drain.key:
        return None
    if instance.key not in drain.keys and is_resident(instance):
        return None
    rests = (time_to_idle_s(x, now_s) for x in node.instances if x.key in drain.keys)
    return max(rests, default=0.0) + drain.load_s


class Row(NamedTuple):
    """What is kept of one (node, instance): a reason against it, or how it stands."""

    node: NodeView
    instance: InstanceView
    reason: Reason | None
    where: Standing | None
    victims_waited: tuple[bool, ...]
    made_s: float
    expires_s: float


def make_row(
    node: NodeView,
    instance: InstanceView,
    needs: Needs,
    snapshot: FleetSnapshot,
    policy: Policy,
    now_s: float,
) -> Row:
    found = why_not(node, instance, needs, policy, now_s)
    if found is not None:
        # Whether an offline node still beats is a matter of time too.
        expires_s = min(found[1], now_s + policy.row_age_s)
        return Row(node, instance, found[0], None, (), now_s, expires_s)
    where = standing(node, instance, needs.wanted_context_tokens, snapshot.waiting, policy, now_s)
    waited = tuple([is_waited_for(x, snapshot.waiting) for x in where.victims.idle])
    expires_s = now_s + policy.row_age_s if where.steady else now_s
    return Row(node, instance, None, where, waited, now_s, expires_s)


def is_fresh(row: Row, snapshot: FleetSnapshot, now_s: float) -> bool:
    """Whether a row of the same two views still says how things stand."""
    if not (row.made_s <= now_s < row.expires_s or now_s == row.made_s):
        return False
    if not row.victims_waited or row.where is None:
        return True
    waiting = snapshot.waiting
    return row.victims_waited == tuple([is_waited_for(x, waiting) for x in row.where.victims.idle])


class CostTable:
    """Rows by needs. Owned by the shell and handed in; a decision without one is the same, only slower.

    The one mutable thing here: a memory of what pure functions returned for the very same views. It serves
    one policy.
    """

    def __init__(self, max_needs: int = 256) -> None:
        self._max_needs = max_needs
        self._rows: dict[Needs, list[Row]] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, needs: Needs, snapshot: FleetSnapshot, policy: Policy, now_s: float) -> list[Row]:
        """One row a holder of the model, in the order of the snapshot."""
        old = self._rows.get(needs, [])
        holders = snapshot.holders.get(needs.model, ())
        if len(old) != len(holders):
            known = {id(row.instance): row for row in old}
            old = [known.get(id(x)) or make_row(n, x, needs, snapshot, policy, now_s) for n, x in holders]
        rows = [
            row
            if row[0] is holder[0] and row[1] is holder[1] and is_fresh(row, snapshot, now_s)
            else make_row(holder[0], holder[1], needs, snapshot, policy, now_s)
            for row, holder in zip(old, holders, strict=True)
        ]
        if needs not in self._rows and len(self._rows) >= self._max_needs:
            # What a caller may choose freely (num_ctx) is part of the key, so the oldest goes.
            del self._rows[next(iter(self._rows))]
        self._rows[needs] = rows
        return rows


class Candidate(NamedTuple):
    """One eligible instance. Compared as a tuple: smaller T, then least recently chosen, then id."""

    total_s: float
    last_chosen_s: float
    node_id: str
    instance_key: str
    where: Standing
    cached: float


_Found = tuple[float, float, str, str, Standing, float]
"""A candidate while there may be a hundred of them: a plain tuple costs a fifth of a named one."""


class Ranking(NamedTuple):
    """Best first, eight at most; `unit` and `fastest_decode_s` are over all eligible ones."""

    best: tuple[Candidate, ...]
    excluded: tuple[Exclusion, ...]
    """Holders that were left out, by node id."""
    unit: float
    fastest_decode_s: float


NOBODY = Ranking((), (), signals.MIN_UNIT_S, 0.0)


class Moment(NamedTuple):
    """What is the same for every request of one plan."""

    snapshot: FleetSnapshot
    policy: Policy
    now_s: float
    claims: Claims
    table: CostTable


def rank(needs: Needs, ask: Ask, tried: frozenset[str], moment: Moment) -> Ranking:
    """Every holder of the model is either a candidate or excluded with a reason."""
    now_s, claims = moment.now_s, moment.claims
    has_claims = bool(claims.waiting or claims.drains)
    found: list[_Found] = []
    excluded: list[Exclusion] = []
    fastest_step_s = float("inf")
    for row in moment.table.rows(needs, moment.snapshot, moment.policy, now_s):
        node, instance, reason, where = row[:4]
        if tried and node.node_id in tried:
            reason, where = Reason.TRIED, None
        elif where is not None and ask.tokens > where.longest_prompt:
            reason, where = Reason.CONTEXT_TOO_SMALL, None
        if where is None:
            excluded.append(Exclusion(node.node_id, str(reason)))
            continue
        if has_claims:
            where = _claimed(row, where, needs, moment)
        cached = cached_prefix_tokens(ask.prefixes, instance)
        total_s = seconds(where, ask, cached, now_s)
        found.append((total_s, node.last_chosen_s, node.node_id, instance.key, where, cached))
        if instance.rates.step_s < fastest_step_s:
            fastest_step_s = instance.rates.step_s
    excluded.sort()
    if not found:
        return NOBODY._replace(excluded=tuple(excluded))
    unit = signals.unit_s(min([candidate[0] for candidate in found]))
    nearest = nsmallest(MAX_CANDIDATES, _with_lateness(found, unit, moment.policy))
    best = tuple([Candidate(*candidate) for candidate in nearest])
    return Ranking(best, tuple(excluded), unit, ask.out_tokens * fastest_step_s)


def _claimed(row: Row, where: Standing, needs: Needs, moment: Moment) -> Standing:
    """How it stands for somebody who comes after those who wait."""
    claims = moment.claims.waiting.get((row.node.node_id, row.instance.key), 0)
    rest_s = drain_rest_s(row.node, row.instance, moment.claims.drains, moment.now_s)
    if not claims and rest_s is None:
        return where
    wanted, waiting = needs.wanted_context_tokens, moment.snapshot.waiting
    return standing(row.node, row.instance, wanted, waiting, moment.policy, moment.now_s, claims, rest_s)


def _with_lateness(found: list[_Found], unit: float, policy: Policy) -> list[_Found]:
    """A node whose beat is late costs `degraded_points` more."""
    late_s = signals.degraded_s(unit, policy)
    return [(x[0] + late_s, *x[1:]) if x[4].node.status == "degraded" else x for x in found]


def cost_and_card(
    candidate: Candidate, ask: Ask, ranking: Ranking, policy: Policy, now_s: float
) -> tuple[Cost, ScoreCard]:
    """The parts of a candidate's T, and the same as seven signals."""
    is_late = candidate.where.node.status == "degraded"
    late_s = signals.degraded_s(ranking.unit, policy) if is_late else 0.0
    cost = cost_of(candidate.where, ask, candidate.cached, now_s, late_s)
    values = signals.by_signal(cost, ranking.unit, ranking.fastest_decode_s, policy)
    return cost, ScoreCard(candidate.node_id, values, signals.total(values, is_late, policy))


def blocked(candidate: Candidate, snapshot: FleetSnapshot, policy: Policy, waited_s: float) -> Blocked | None:
    """Why the best candidate is not sent to now. The order is that of the rules in docs/scheduling.md.

    1 a drain keeps the node for somebody else; 2 somebody earlier claimed it; 3 no slot is free (one that is
    not loaded has a single slot); 4 guard: no load while the node loads another, none that evicts a busy one;
    5 hysteresis: none that evicts what others wait for, before the newcomer has waited itself.
    """
    where = candidate.where
    if where.drained:
        return Blocked.DRAINED
    if where.claims > 0:
        return Blocked.CLAIMED
    is_hot = where.instance.state == "hot"
    if where.own >= (where.slots if is_hot else 1):
        return Blocked.NO_FREE_SLOT
    if where.needs_idle_self or where.victims.busy:
        return Blocked.NEEDS_BUSY_EVICTED
    if is_hot:
        return None
    if where.node_loads_other:
        return Blocked.NODE_LOADS_OTHER
    waited_for = any(is_waited_for(x, snapshot.waiting) for x in where.victims.idle)
    if waited_for and waited_s < policy.hysteresis_s:
        return Blocked.HYSTERESIS
    return None
