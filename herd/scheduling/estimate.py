"""The formulas of docs/scheduling.md §1, each by itself: loads, residuals, victims, price, tokens.

Pure functions over views. `standing` puts those together that do not depend on the request.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import exp
from typing import NamedTuple

from herd.fleet.snapshot import FleetSnapshot, InstanceView, NodeView, Rates
from herd.request import InferenceRequest, PrefixMark
from herd.scheduling.context import (
    freed_bytes,
    is_resident,
    others_resident,
    room_for,
)
from herd.scheduling.policy import Policy

PREFILL_OVERHEAD_S = 0.02
BATCH_SLOWDOWN = 0.25
PRICE_POLE = 1.15
SERIOUS_HEAT_SHARE = 0.5
MIN_FREE_SHARE = 0.01
PREFILL_REST = 0.3
"""A prefill that takes longer than expected is expected to need this share of it still."""
DECODE_REST = 0.35
_NEVER_S = float("inf")


class Ending(NamedTuple):
    """When something is expected to end, and the least that remains however late it is."""

    end_s: float
    floor_s: float

    def rest_s(self, now_s: float) -> float:
        return max(self.end_s - now_s, self.floor_s)


class FirstFree(NamedTuple):
    """Of slots that are all taken: when the first is free. Exact at any instant after it was made.

    A rest falls with time until it meets its floor. So at `now` the least rest is the earliest end of those
    that still fall, or the least floor of the others. In the order in which they meet, a bisection tells them
    apart.
    """

    meet_s: tuple[float, ...]
    end_s: tuple[float, ...]
    """At place i: the earliest end of the i-th and all later ones."""
    floor_s: tuple[float, ...]
    """At place i: the least floor of all before the i-th."""

    def rest_s(self, now_s: float) -> float:
        meet_s, end_s, floors_s = self
        falling = bisect_right(meet_s, now_s)
        rest_s, floor_s = end_s[falling] - now_s, floors_s[falling]
        return rest_s if rest_s < floor_s else floor_s


def first_free(ends: Sequence[Ending]) -> FirstFree:
    in_order = sorted([(end_s - floor_s, end_s, floor_s) for end_s, floor_s in ends])
    later = accumulate([end_s for _, end_s, _ in reversed(in_order)], min, initial=_NEVER_S)
    before = accumulate([floor_s for _, _, floor_s in in_order], min, initial=_NEVER_S)
    return FirstFree(tuple([row[0] for row in in_order]), tuple(later)[::-1], tuple(before))


def endings(instance: InstanceView, now_s: float) -> list[Ending]:
    """One for each slot that is taken: requests that run, and cancelled ones that still occupy it.

    The residuals of docs/scheduling.md §1, last two lines of `wait`, as instants.
    """
    new = tuple.__new__  # half of what the class's own constructor takes, and there are as many as slots
    step_s, ends = instance.rates.step_s, []
    for _, _, started_s, first_s, p, out_tokens in instance.running:
        d = out_tokens * step_s
        if first_s is None:
            ends.append(new(Ending, (started_s + p + d, PREFILL_REST * p + d)))
        else:
            ends.append(new(Ending, (first_s + d, DECODE_REST * d)))
    if instance.settling_until_s:
        ends.extend([Ending(until_s, 0.0) for until_s in instance.settling_until_s if until_s > now_s])
    return ends


def taken(instance: InstanceView, now_s: float) -> int:
    """`own` of docs/scheduling.md §1: as many as there are `endings`."""
    settling = instance.settling_until_s
    return len(instance.running) + (len([s for s in settling if s > now_s]) if settling else 0)


def is_idle(instance: InstanceView, now_s: float) -> bool:
    if instance.running or instance.state == "loading":
        return False
    return not any(until_s > now_s for until_s in instance.settling_until_s)


def load_s(instance: InstanceView, now_s: float) -> float:
    """Seconds until the weights are in memory, once the load may begin."""
    match instance.state:
        case "hot":
            return 0.0
        case "loading":
            expected_s = instance.loading_expected_s or instance.rates.load_cold_s
            if instance.loading_since_s is None:
                return expected_s
            return max(0.0, instance.loading_since_s + expected_s - now_s)
        case "warm":
            return instance.rates.load_warm_s
        case "cold":
            return instance.rates.load_cold_s


def time_to_idle_s(instance: InstanceView, now_s: float) -> float:
    rest = max((end.rest_s(now_s) for end in endings(instance, now_s)), default=0.0)
    return rest + load_s(instance, now_s) if instance.state == "loading" else rest


def price_per_second(node: NodeView, policy: Policy, now_s: float) -> float:
    """`price` of docs/scheduling.md §1 for E = 1 s."""
    # 1. the EWMA of busy time, brought up to now
    value, at_s, busy_now = node.busy_share
    target = 1.0 if busy_now else 0.0
    share = value if now_s <= at_s else target + (value - target) * exp((at_s - now_s) / policy.busy_tau_s)
    share = 0.0 if share < 0.0 else 1.0 if share > 1.0 else share
    price = policy.price * share / (PRICE_POLE - share)
    # 2. what else needs the machine
    free = node.free_share
    if node.heat == "serious":
        free *= SERIOUS_HEAT_SHARE
    if free >= 1.0:
        return price
    return price + (1.0 / max(MIN_FREE_SHARE, free) - 1.0)


def is_waited_for(instance: InstanceView, waiting: Mapping[str, int]) -> bool:
    return bool(waiting) and any(waiting.get(name.canonical, 0) > 0 for name in instance.names)


def want(instance: InstanceView, waiting: Mapping[str, int], policy: Policy, now_s: float) -> float:
    """How likely it is that an evicted model is asked for again within a minute."""
    if is_waited_for(instance, waiting):
        return 1.0
    age_s = max(0.0, now_s - instance.arrival_rate.at_s)
    per_s = instance.arrival_rate.per_s * exp(-age_s / policy.rate_tau_s)
    return 1.0 - exp(-policy.want_horizon_s * per_s)


class Victims(NamedTuple):
    """Who must go for a load. `busy` is empty when idle ones are enough."""

    idle: tuple[InstanceView, ...] = ()
    busy: tuple[InstanceView, ...] = ()


NO_VICTIMS = Victims()


def victims(
    node: NodeView, instance: InstanceView, wanted_tokens: int | None, policy: Policy, now_s: float
) -> Victims:
    """The set that makes room: idle ones, least recently used first; then busy ones, soonest empty."""
    room = room_for(node, instance, wanted_tokens, policy)
    if room.is_enough:
        return NO_VICTIMS
    resident = others_resident(node, instance)
    idle = sorted((x for x in resident if is_idle(x, now_s)), key=lambda x: (x.last_used_s, x.key))
    busy = [x for x in resident if not is_idle(x, now_s)]
    busy.sort(key=lambda x: (time_to_idle_s(x, now_s), x.key))
    missing_bytes, missing_places = room
    chosen: tuple[list[InstanceView], list[InstanceView]] = ([], [])
    for group, found in zip((idle, busy), chosen, strict=True):
        for x in group:
            if missing_bytes <= 0 and missing_places <= 0:
                break
            found.append(x)
            missing_bytes -= freed_bytes(x, policy)
            missing_places -= 1
    return Victims(tuple(chosen[0]), tuple(chosen[1]))


class Ask(NamedTuple):
    """What a request asks of whichever node serves it, for one model of its chain."""

    tokens: float
    """Prompt tokens after the model's correction."""
    correction: float
    out_tokens: float
    context_tokens: float
    """Context in which nothing would have to be cut."""
    wanted_context_tokens: int | None
    prefixes: tuple[PrefixMark, ...]


def ask_of(request: InferenceRequest, model: str, snapshot: FleetSnapshot, policy: Policy) -> Ask:
    stats = snapshot.stats.get(model)
    if stats is None:
        out_tokens, correction = policy.out_first_guess_tokens, 1.0
    else:
        out_tokens, correction = stats
    most, wanted = request.max_tokens, request.wanted_context_tokens
    if most is not None and most < out_tokens:
        out_tokens = float(most)
    if request.route.kind == "embedding":
        out_tokens = 1.0
    tokens = request.est_tokens * correction
    context = tokens + out_tokens
    if wanted is not None and wanted > context:
        context = float(wanted)
    return tuple.__new__(Ask, (tokens, correction, out_tokens, context, wanted, request.prefixes))


def cached_prefix_tokens(asked: Sequence[PrefixMark], instance: InstanceView) -> float:
    """Longest known prefix among the sequences held there, uncorrected."""
    return instance.held.prefix_tokens(asked) if is_resident(instance) else 0.0


def cached_tokens(request: InferenceRequest, instance: InstanceView) -> float:
    """`cached` of docs/scheduling.md §1, uncorrected: the estimate that the request's own marks carry."""
    return min(request.est_tokens, cached_prefix_tokens(request.prefixes, instance))


def prefill_decode_s(rates: Rates, ask: Ask, cached: float) -> tuple[float, float]:
    """p and d. `cached` is uncorrected."""
    uncached = ask.tokens - cached * ask.correction
    p = PREFILL_OVERHEAD_S + (uncached if uncached > 0.0 else 0.0) / rates.prefill_tokens_per_s
    return p, ask.out_tokens * rates.step_s


def service_s(ask: Ask, instances: Iterable[InstanceView]) -> float | None:
    """E_best: the least p + d, each with its cached tokens; None when there is nobody."""
    best_s = None
    for x in sorted(instances, key=lambda x: x.rates.step_s):
        if best_s is not None and PREFILL_OVERHEAD_S + ask.out_tokens * x.rates.step_s >= best_s:
            break  # not even if all of the prompt lay there, nor on any slower one
        e_s = sum(prefill_decode_s(x.rates, ask, cached_prefix_tokens(ask.prefixes, x)))
        best_s = e_s if best_s is None else min(best_s, e_s)
    return best_s
