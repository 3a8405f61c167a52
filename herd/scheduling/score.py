"""The candidates of one request, ranked; and why the best one may still not be sent to.

Ranking is by T, the expected total time; the scores say the same in points (docs/scheduling.md §2). What
does not depend on the request is kept in a `CostTable`, row by row, while the views stay the same objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from herd.fleet.snapshot import FleetSnapshot, InstanceView, NodeView
from herd.scheduling import signals
from herd.scheduling.context import is_resident
from herd.scheduling.eligibility import Needs, Reason
from herd.scheduling.estimate import PREFILL_OVERHEAD_S, Ask, is_waited_for, prefill_decode_s, time_to_idle_s
from herd.scheduling.policy import Policy
from herd.scheduling.rows import CostTable, Kept
from herd.scheduling.standing import (
    NODE_ID_OF_LINE,
    Line,
    Standing,
    line_of,
    parts_of,
    standing,
    wait_for_slot_s,
)
from herd.trace import Card, Exclusion

MAX_CANDIDATES = 8
#: When so many may be among the best, all but the best are let go of.
MANY_CANDIDATES = 64
_NEVER_S = float("inf")


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


class Candidate(NamedTuple):
    """One eligible instance. Compared as a tuple: smaller T, then least recently chosen, then id."""

    total_s: float
    last_chosen_s: float
    node_id: str
    instance_key: str
    where: Standing
    cached: float


Found = tuple[float, float, str, str, Standing, float]
"""A candidate while there may be a hundred of them: a plain tuple costs a fifth of a named one."""


class Ranking(NamedTuple):
    """`unit` and `fastest_decode_s` are over all eligible ones."""

    found: list[Found]
    """Best first, eight at most."""
    excluded: tuple[Exclusion, ...]
    """Holders that were left out, by node id."""
    unit: float
    fastest_decode_s: float

    @property
    def where(self) -> Standing:
        """How the best one stands."""
        return self.found[0][4]

    @property
    def best(self) -> Candidate:
        return Candidate(*self.found[0])

    @property
    def candidates(self) -> list[Candidate]:
        return [Candidate(*found) for found in self.found]


class Moment(NamedTuple):
    """What is the same for every request of one plan."""

    snapshot: FleetSnapshot
    policy: Policy
    now_s: float
    claims: Claims
    table: CostTable


def rank(needs: Needs, ask: Ask, tried: frozenset[str], moment: Moment) -> Ranking:
    """Every holder of the model is either a candidate or excluded with a reason."""
    snapshot, policy, now_s, claims, table = moment
    kept = table.look(needs, snapshot, policy, now_s)
    lines, excluded, fastest_step_s = kept.lines, kept.excluded, kept.fastest_step_s
    if claims.waiting or claims.drains:
        lines = _claimed(kept, needs, moment)
    if tried:
        lines = [line for line in lines if line[NODE_ID_OF_LINE] not in tried]
        here = [Exclusion(node_id, Reason.TRIED.value) for node_id in kept.ids if node_id in tried]
        excluded = tuple(sorted([*[x for x in excluded if x.node_id not in tried], *here]))
    found, too_small = _weigh(lines, ask, now_s, kept.some_late)
    if too_small:
        excluded = tuple(sorted([*excluded, *too_small]))
    if tried or too_small:
        out = {x.node_id for x in excluded}
        steps_s = [x.instance.rates.step_s for x in kept.rows if x.node.node_id not in out]
        fastest_step_s = min(steps_s, default=0.0)
    if not found:
        return Ranking(found, excluded, signals.MIN_UNIT_S, 0.0)
    found.sort()
    unit = signals.unit_s(found[0][0])
    if kept.some_late:
        found = sorted(_with_lateness(found, unit, policy))
    del found[MAX_CANDIDATES:]
    return tuple.__new__(Ranking, (found, excluded, unit, ask.out_tokens * fastest_step_s))


def _weigh(lines: list[Line], ask: Ask, now_s: float, keep_all: bool) -> tuple[list[Found], list[Exclusion]]:
    """T of each, and whose context is too small. Unless all are kept, those that may be among the eight best.

    The one thing that is done for every node for every request, hence in longhand.
    """
    tokens, correction, out_tokens, context_tokens, _, prefixes = ask
    # most prompts share their first message with others, and nothing after it
    first, first_tokens = prefixes[0] if prefixes else (None, 0.0)
    second = prefixes[1][0] if len(prefixes) > 1 else None
    after_first = max(0.0, tokens - first_tokens * correction)
    bound_s, most = _NEVER_S, _NEVER_S if keep_all else MANY_CANDIDATES
    found: list[Found] = []
    too_small: list[Exclusion] = []
    for limit, free, digests, base_s, per_token_s, per_out_s, last_s, node_id, key, where in lines:
        cached, uncached = 0.0, tokens
        if first in digests:
            cached, uncached = first_tokens, after_first
            if second in digests:
                cached = where.instance.held.prefix_tokens(prefixes)
                uncached = max(0.0, tokens - cached * correction)
        total_s = base_s + per_token_s * uncached + per_out_s * out_tokens
        if context_tokens > limit:
            if where.longest_prompt < tokens:
                too_small.append(Exclusion(node_id, Reason.CONTEXT_TOO_SMALL.value))
                continue
            total_s += _beyond_limit_s(where, ask, cached, now_s)
        if total_s > bound_s:
            continue
        if free is not None:
            total_s += free.rest_s(now_s)
        found.append((total_s, last_s, node_id, key, where, cached))
        if len(found) >= most:
            found.sort()
            del found[MAX_CANDIDATES:]
            bound_s = found[-1][0]
    return found, too_small


def _beyond_limit_s(where: Standing, ask: Ask, cached: float, now_s: float) -> float:
    """What the coefficients do not say: a reload or a cut, and a slot that somebody claimed before."""
    more_s = where.rates.load_warm_s if ask.context_tokens > where.context_limit else 0.0
    if where.full and where.first_free is None:
        more_s += wait_for_slot_s(where, sum(prefill_decode_s(where.rates, ask, cached)), now_s)
    return more_s


def _claimed(kept: Kept, needs: Needs, moment: Moment) -> list[Line]:
    """How they stand for somebody who comes after those who wait."""
    (claims, drains), now_s = moment.claims, moment.now_s
    lines, line_at, at_key = kept.lines.copy(), kept.line_at, kept.places_by_key
    for claim, count in claims.items():
        at = at_key.get(claim)
        if at is not None and (line := kept.rows[at].line) is not None:
            lines[line_at[at]] = kept.line_after(at, line, count, now_s)
    wanted, waiting = needs.wanted_context_tokens, moment.snapshot.waiting
    for key, at in at_key.items() if drains else ():
        node, instance, where = kept.rows[at][:3]
        rest_s = drain_rest_s(node, instance, drains, now_s)
        if where is not None and rest_s is not None:
            args = (node, instance, wanted, waiting, moment.policy, now_s)
            lines[line_at[at]] = line_of(standing(*args, claims.get(key, 0), rest_s))
    return lines


def _with_lateness(found: list[Found], unit: float, policy: Policy) -> list[Found]:
    """A node whose beat is late costs `degraded_points` more."""
    late_s = signals.degraded_s(unit, policy)
    return [(x[0] + late_s, *x[1:]) if x[4].late else x for x in found]


def cards(ranking: Ranking, ask: Ask, policy: Policy, now_s: float) -> tuple[Card, ...]:
    """The candidates' T as seven signals each, best first.

    Eight a request, so the calm ones are done in longhand: nothing is loaded or evicted, and context is lost
    nowhere. `by_signal` says the same for all; a test holds the two equal.
    """
    found, _, unit, fastest_s = ranking
    tokens, correction, out_tokens, context_tokens, _, _ = ask
    scale, late_points = policy.points / unit, policy.degraded_points
    made: list[Card] = []
    for _, _, node_id, _, where, cached in found:
        calm = where.calm
        if calm is None or context_tokens > calm[6]:
            values = signals.by_signal(parts_of(where, ask, cached, now_s), unit, fastest_s, policy)
            made.append((node_id, signals.total(values, where.late, policy), values))
            continue
        per_token_s, step_s, queue_p, queue_d, price, free, _, late = calm
        uncached = tokens - cached * correction
        uncached = uncached if uncached > 0.0 else 0.0
        p, d = PREFILL_OVERHEAD_S + uncached * per_token_s, out_tokens * step_s
        queue = scale * (queue_p * p + queue_d * d)
        wait = scale * (p if free is None else p + free.rest_s(now_s))
        role = scale * (d - fastest_s)
        trend = scale * (price * (p + d))
        queue = 0.0 - queue if queue < 30.0 else -30.0
        wait = 0.0 - wait if wait < 25.0 else -25.0
        role = 15.0 - role if role < 15.0 else 0.0
        trend = 10.0 - trend if trend < 10.0 else 0.0
        total = 85.0 + queue + wait + role + trend
        if late:
            total -= late_points
        made.append((node_id, total, (50.0, 20.0, queue, wait, role, trend, 15.0)))
    return tuple(made)


def blocked(where: Standing, snapshot: FleetSnapshot, policy: Policy, waited_s: float) -> Blocked | None:
    """Why the best candidate is not sent to now. The order is that of the rules in docs/scheduling.md.

    1 a drain keeps the node for somebody else; 2 somebody earlier claimed it; 3 no slot is free (one that is
    not loaded has a single slot); 4 guard: no load while the node loads another, none that evicts a busy one;
    5 hysteresis: none that evicts what others wait for, before the newcomer has waited itself.
    """
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
