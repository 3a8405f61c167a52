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
    cost_of,
    is_waited_for,
    parts_of,
    prefill_decode_s,
    standing,
    time_to_idle_s,
    wait_for_slot_s,
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


class _Kept(NamedTuple):
    """The rows of one `Needs`, and for how long none of them has to be looked at."""

    holders: tuple[tuple[NodeView, InstanceView], ...]
    rows: list[Row]
    from_s: float
    until_s: float
    """Equal to `from_s` if some row is fresh for other reasons than time alone."""


def _keep(holders: tuple[tuple[NodeView, InstanceView], ...], rows: list[Row]) -> _Kept:
    from_s = max([row.made_s for row in rows], default=0.0)
    if any([row.victims_waited for row in rows]):
        return _Kept(holders, rows, from_s, from_s)
    return _Kept(holders, rows, from_s, min([row.expires_s for row in rows], default=from_s))


class CostTable:
    """Rows by needs. Owned by the shell and handed in; a decision without one is the same, only slower.

    The one mutable thing here: a memory of what pure functions returned for the very same views. It serves
    one policy.
    """

    def __init__(self, max_needs: int = 256) -> None:
        self._max_needs = max_needs
        self._kept: dict[Needs, _Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def rows(self, needs: Needs, snapshot: FleetSnapshot, policy: Policy, now_s: float) -> list[Row]:
        """One row a holder of the model, in the order of the snapshot.

        1 nothing changed and nothing ended by time; 2 some holders changed; 3 each row is looked at.
        """
        kept = self._kept.get(needs)
        holders = snapshot.holders.get(needs.model, ())
        if kept is None or len(kept.holders) != len(holders) or not kept.from_s <= now_s < kept.until_s:
            new = self._look_at_each(kept, needs, snapshot, policy, now_s)  # 3
        elif kept.holders is holders:
            return kept.rows  # 1
        else:
            new = _with_changed(kept, needs, snapshot, policy, now_s)  # 2
        if kept is None and len(self._kept) >= self._max_needs:
            # What a caller may choose freely (num_ctx) is part of the key, so the oldest goes.
            del self._kept[next(iter(self._kept))]
        self._kept[needs] = new
        return new.rows

    def _look_at_each(
        self, kept: _Kept | None, needs: Needs, snapshot: FleetSnapshot, policy: Policy, now_s: float
    ) -> _Kept:
        holders = snapshot.holders.get(needs.model, ())
        known = {id(row.instance): row for row in kept.rows} if kept is not None else {}
        rows = []
        for node, instance in holders:
            row = known.get(id(instance))
            if row is None or row.node is not node or not is_fresh(row, snapshot, now_s):
                row = make_row(node, instance, needs, snapshot, policy, now_s)
            rows.append(row)
        return _keep(holders, rows)


def _with_changed(kept: _Kept, needs: Needs, snapshot: FleetSnapshot, policy: Policy, now_s: float) -> _Kept:
    """New rows for the holders that are other views than they were."""
    holders = snapshot.holders[needs.model]
    rows, until_s, has_victims = kept.rows.copy(), kept.until_s, False
    for place, (old, holder) in enumerate(zip(kept.holders, holders, strict=True)):
        if old is not holder:
            row = rows[place] = make_row(*holder, needs, snapshot, policy, now_s)
            has_victims = has_victims or bool(row.victims_waited)
            until_s = min(until_s, row.expires_s)
    return _Kept(holders, rows, now_s, now_s if has_victims else until_s)


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
    found, excluded, fastest_step_s, some_late = _weigh(needs, ask, tried, moment)
    excluded.sort()
    if not found:
        return NOBODY._replace(excluded=tuple(excluded))
    unit = signals.unit_s(min([candidate[0] for candidate in found]))
    if some_late:
        found = _with_lateness(found, unit, moment.policy)
    best = tuple([Candidate(*candidate) for candidate in nsmallest(MAX_CANDIDATES, found)])
    return Ranking(best, tuple(excluded), unit, ask.out_tokens * fastest_step_s)


def _weigh(
    needs: Needs, ask: Ask, tried: frozenset[str], moment: Moment
) -> tuple[list[_Found], list[Exclusion], float, bool]:
    """Candidates with their T, who is left out, the least seconds a token, and whether some beat is late.

    The one thing that is done for every node for every request, hence in longhand.
    """
    tokens, correction, out_tokens, context_tokens, _, prefixes = ask
    now_s, has_claims = moment.now_s, bool(moment.claims.waiting or moment.claims.drains)
    found: list[_Found] = []
    excluded: list[Exclusion] = []
    fastest_step_s, some_late = float("inf"), False
    for row in moment.table.rows(needs, moment.snapshot, moment.policy, now_s):
        where = row.where
        if tried and row.node.node_id in tried:
            excluded.append(Exclusion(row.node.node_id, Reason.TRIED.value))
            continue
        if where is None:
            excluded.append(Exclusion(row.node.node_id, str(row.reason)))
            continue
        if has_claims:
            where = _claimed(row, where, needs, moment)
        base, per_token, per_out, limit, reload, full, longest, held, step_s, late, last_s, node_id, key = (
            where.line
        )
        if tokens > longest:
            excluded.append(Exclusion(node_id, Reason.CONTEXT_TOO_SMALL.value))
            continue
        cached, uncached = 0.0, tokens
        if prefixes and held.digests and (cached := held.prefix_tokens(prefixes)):
            uncached = max(0.0, tokens - cached * correction)
        total_s = base + per_token * uncached + per_out * out_tokens
        if context_tokens > limit:
            total_s += reload
        if full:
            free = where.first_free
            if free is not None:
                total_s += free.rest_s(now_s)
            else:
                e = sum(prefill_decode_s(where.instance.rates, ask, cached))
                total_s += wait_for_slot_s(where, e, now_s)
        found.append((total_s, last_s, node_id, key, where, cached))
        if step_s < fastest_step_s:
            fastest_step_s = step_s
        if late:
            some_late = True
    return found, excluded, fastest_step_s, some_late


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
    return [(x[0] + late_s, *x[1:]) if x[4].line.late else x for x in found]


def cost_of_candidate(candidate: Candidate, ask: Ask, ranking: Ranking, policy: Policy, now_s: float) -> Cost:
    """The parts of a candidate's T."""
    late_s = signals.degraded_s(ranking.unit, policy) if candidate.where.line.late else 0.0
    return cost_of(candidate.where, ask, candidate.cached, now_s, late_s)


def cards(ranking: Ranking, ask: Ask, policy: Policy, now_s: float) -> tuple[ScoreCard, ...]:
    """The candidates' T as seven signals each, best first."""
    unit, fastest_s = ranking.unit, ranking.fastest_decode_s
    made = []
    for _, _, node_id, _, where, cached in ranking.best:
        values = signals.by_signal(parts_of(where, ask, cached, now_s), unit, fastest_s, policy)
        made.append(ScoreCard(node_id, values, signals.total(values, where.line.late, policy)))
    return tuple(made)


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
