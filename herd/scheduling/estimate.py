"""What serving a request on a node would cost, in seconds (docs/scheduling.md §1).

In two halves. `Standing` is all that does not depend on the request: made from a node's views, kept by
`score.CostTable` while they stay the same. `Ask` is all that does not depend on the node. `score.rank` puts
the two together in one multiply-add, `cost_of` does the same in parts; a test holds them equal.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import exp
from typing import NamedTuple

from herd.fleet.held import NOTHING_HELD, Held
from herd.fleet.snapshot import FleetSnapshot, InstanceView, NodeView, Rates, Running
from herd.request import InferenceRequest, PrefixMark
from herd.scheduling.context import (
    freed_bytes,
    is_reload,
    is_resident,
    longest_prompt_tokens,
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


class Cost(NamedTuple):
    """Seconds, all ≥ 0; `total` is their sum, T of docs/scheduling.md §1."""

    load: float
    evict: float
    queue: float
    wait: float
    prefill: float
    decode: float
    price: float
    context: float
    degraded: float
    total: float


Parts = tuple[float, float, float, float, float, float, float, float]
"""Those of a `Cost`, without lateness and total: what is made for eight nodes a request."""


class Ending(NamedTuple):
    """When something is expected to end, and the least that remains however late it is."""

    end_s: float
    floor_s: float

    def rest_s(self, now_s: float) -> float:
        return max(self.end_s - now_s, self.floor_s)


def ending(running: Running, rates: Rates) -> Ending:
    """Residual of a running request, as an instant: docs/scheduling.md §1, last two lines of `wait`."""
    decode_s = running.out_tokens * rates.step_s
    if running.first_record_s is None:
        p = running.prefill_s
        return Ending(running.started_s + p + decode_s, PREFILL_REST * p + decode_s)
    return Ending(running.first_record_s + decode_s, DECODE_REST * decode_s)


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
        falling = bisect_right(self.meet_s, now_s)
        rest_s, floor_s = self.end_s[falling] - now_s, self.floor_s[falling]
        return rest_s if rest_s < floor_s else floor_s


def first_free(ends: Sequence[Ending]) -> FirstFree:
    in_order = sorted([(end_s - floor_s, end_s, floor_s) for end_s, floor_s in ends])
    later = accumulate([end_s for _, end_s, _ in reversed(in_order)], min, initial=_NEVER_S)
    before = accumulate([floor_s for _, _, floor_s in in_order], min, initial=_NEVER_S)
    return FirstFree(tuple([row[0] for row in in_order]), tuple(later)[::-1], tuple(before))


def endings(instance: InstanceView, now_s: float) -> list[Ending]:
    """One for each slot that is taken: requests that run, and cancelled ones that still occupy it."""
    ends = [ending(running, instance.rates) for running in instance.running]
    ends.extend(Ending(until_s, 0.0) for until_s in instance.settling_until_s if until_s > now_s)
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


def busy_share(node: NodeView, policy: Policy, now_s: float) -> float:
    """The node's EWMA of busy time, brought up to now."""
    value, at_s, busy_now = node.busy_share
    target = 1.0 if busy_now else 0.0
    return target + (value - target) * exp(-max(0.0, now_s - at_s) / policy.busy_tau_s)


def price_per_second(node: NodeView, policy: Policy, now_s: float) -> float:
    """`price` of docs/scheduling.md §1 for E = 1 s."""
    share = min(1.0, max(0.0, busy_share(node, policy, now_s)))
    free = node.free_share * (SERIOUS_HEAT_SHARE if node.heat == "serious" else 1.0)
    free = min(1.0, max(MIN_FREE_SHARE, free))
    return policy.price * share / (PRICE_POLE - share) + (1.0 / free - 1.0)


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
    correction = 1.0 if stats is None else stats.token_correction
    out_tokens = policy.out_first_guess_tokens if stats is None else stats.out_tokens
    if request.max_tokens is not None:
        out_tokens = min(out_tokens, float(request.max_tokens))
    if request.route.kind == "embedding":
        out_tokens = 1.0
    tokens = request.est_tokens * correction
    return Ask(
        tokens=tokens,
        correction=correction,
        out_tokens=out_tokens,
        context_tokens=max(tokens + out_tokens, float(request.wanted_context_tokens or 0)),
        wanted_context_tokens=request.wanted_context_tokens,
        prefixes=request.prefixes,
    )


def cached_prefix_tokens(asked: Sequence[PrefixMark], instance: InstanceView) -> float:
    """Longest known prefix among the sequences held there, uncorrected."""
    return instance.held.prefix_tokens(asked) if is_resident(instance) else 0.0


def cached_tokens(request: InferenceRequest, instance: InstanceView) -> float:
    """`cached` of docs/scheduling.md §1, uncorrected: the estimate that the request's own marks carry."""
    return min(request.est_tokens, cached_prefix_tokens(request.prefixes, instance))


class Line(NamedTuple):
    """T = base_s + per_token_s · uncached + per_out_s · out + reload_s beyond a limit + wait for a slot.

    All that a decision reads of a candidate, in one place: the ranking takes it apart for every node.
    """

    base_s: float
    per_token_s: float
    per_out_s: float
    context_limit: float
    reload_s: float
    full: bool
    longest_prompt: float
    """Prompt tokens that a fixed context takes; infinity when it is not fixed."""
    held: Held
    """What a request may find in the prompt cache: nothing where the model is not loaded."""
    step_s: float
    late: bool
    last_chosen_s: float
    node_id: str
    key: str


class Standing(NamedTuple):
    """How an instance stands now, for any request that would claim it after `claims` others."""

    node: NodeView
    instance: InstanceView
    claims: int
    slots: int
    own: int
    load_s: float
    evict_s: float
    blocked_s: float
    """Before the load or the reload can begin: another load, a busy victim, a drain."""
    others: int
    batch: int
    full: bool
    """Hot, and no slot is free after the claims."""
    endings: tuple[Ending, ...]
    """What occupies the slots of a full one."""
    first_free: FirstFree | None
    """Full, nobody claimed it before, and each slot is taken once: the case that needs no heap."""
    rounds: int
    """Not hot: batches that go before."""
    price_per_s: float
    victims: Victims
    node_loads_other: bool
    needs_idle_self: bool
    """It would have to load itself anew, while it runs something."""
    drained: bool
    steady: bool
    """Nothing in it but the price changes by the clock alone."""
    line: Line
    """The same as coefficients."""


def standing(
    node: NodeView,
    instance: InstanceView,
    wanted_tokens: int | None,
    waiting: Mapping[str, int],
    policy: Policy,
    now_s: float,
    claims: int = 0,
    drain_rest_s: float | None = None,
) -> Standing:
    """Everything of docs/scheduling.md §1 that does not depend on the request's length.

    `drain_rest_s`: nothing may be sent there until a drain of the node is over, in so many seconds.
    """
    hot = instance.state == "hot"
    slots = max(1, instance.slots)
    own = taken(instance, now_s)
    neighbours = [x for x in node.instances if x.key != instance.key]
    others = len([x for x in neighbours if x.running])
    batch = min(slots, own + claims + 1)
    load = 0.0 if hot else load_s(instance, now_s)
    out = NO_VICTIMS
    if not is_resident(instance):
        out = victims(node, instance, wanted_tokens, policy, now_s)
    evict = sum([x.rates.load_warm_s * want(x, waiting, policy, now_s) for x in out.idle])
    other_loads = [x for x in neighbours if x.state == "loading"]
    reload_busy = own > 0 and is_reload(instance, wanted_tokens)
    blocked = max([load_s(x, now_s) for x in other_loads]) if other_loads and not hot else 0.0
    in_the_way = (*out.busy, instance) if reload_busy else out.busy
    busy_rest = max([time_to_idle_s(x, now_s) for x in in_the_way]) if in_the_way else 0.0
    blocked += busy_rest + (drain_rest_s or 0.0)
    before = 0 if reload_busy else own
    full = hot and before + claims >= slots
    ends = tuple(endings(instance, now_s)) if full and before else ()
    rounds = 0 if hot else (own + claims) // slots
    price = price_per_second(node, policy, now_s)
    shared = 1.0 + 2.0 * others + price + rounds
    return Standing(
        node=node,
        instance=instance,
        claims=claims,
        slots=slots,
        own=own,
        load_s=load,
        evict_s=evict,
        blocked_s=blocked,
        others=others,
        batch=batch,
        full=full,
        endings=ends,
        first_free=first_free(ends) if full and not claims and len(ends) == slots else None,
        rounds=rounds,
        price_per_s=price,
        victims=out,
        node_loads_other=bool(other_loads),
        needs_idle_self=reload_busy,
        drained=drain_rest_s is not None,
        steady=instance.state != "loading" and not instance.settling_until_s and blocked == 0.0,
        line=_line(node, instance, load + evict + blocked, shared, batch, full, policy),
    )


def _line(
    node: NodeView,
    instance: InstanceView,
    before_s: float,
    shared: float,
    batch: int,
    full: bool,
    policy: Policy,
) -> Line:
    """`before_s`: until it can begin. `shared`: what p and d are multiplied by, apart from the batch."""
    rates = instance.rates
    prefill_factor = shared + (1.0 if batch > 1 else 0.0)
    return Line(
        base_s=before_s + PREFILL_OVERHEAD_S * prefill_factor,
        per_token_s=prefill_factor / rates.prefill_tokens_per_s,
        per_out_s=(shared + BATCH_SLOWDOWN * (batch - 1)) * rates.step_s,
        context_limit=_context_limit(instance),
        reload_s=rates.load_warm_s,
        full=full,
        longest_prompt=longest_prompt_tokens(instance, policy),
        held=instance.held if is_resident(instance) else NOTHING_HELD,
        step_s=rates.step_s,
        late=node.status == "degraded",
        last_chosen_s=node.last_chosen_s,
        node_id=node.node_id,
        key=instance.key,
    )


def _context_limit(instance: InstanceView) -> float:
    """Context beyond which it must be loaded anew, or cuts; unknown or not loaded: no limit."""
    if instance.context_tokens and is_resident(instance):
        return float(instance.context_tokens)
    return float("inf")


def prefill_decode_s(rates: Rates, ask: Ask, cached: float) -> tuple[float, float]:
    """p and d. `cached` is uncorrected."""
    uncached = max(0.0, ask.tokens - cached * ask.correction)
    return PREFILL_OVERHEAD_S + uncached / rates.prefill_tokens_per_s, ask.out_tokens * rates.step_s


def wait_for_slot_s(where: Standing, e: float, now_s: float) -> float:
    """Hot: until a slot is free after everybody who claimed before. 0 if one is free."""
    if where.first_free is not None:
        return where.first_free.rest_s(now_s)
    if not where.full:
        return 0.0
    rests = sorted(end.rest_s(now_s) for end in where.endings)
    return _after_claims(rests, where.slots, where.claims, e)


def _after_claims(rests: list[float], slots: int, claims: int, e: float) -> float:
    """Earliest free slot after `claims` requests of `e` seconds each took theirs. `rests` ascending."""
    heap = rests[-slots:] if len(rests) > slots else [0.0] * (slots - len(rests)) + rests
    for _ in range(claims):
        heapq.heapreplace(heap, heap[0] + e)
    return heap[0]


def parts_of(where: Standing, ask: Ask, cached: float, now_s: float) -> Parts:
    """load, evict, queue, wait, p, d, price and context, as docs/scheduling.md §1 names them."""
    line, batch, rates = where.line, where.batch, where.instance.rates
    uncached = max(0.0, ask.tokens - cached * ask.correction) if cached else ask.tokens
    p = PREFILL_OVERHEAD_S + uncached / rates.prefill_tokens_per_s
    d = ask.out_tokens * rates.step_s
    e = p + d
    queue = 2.0 * e * where.others
    if batch > 1:
        queue = queue + d * BATCH_SLOWDOWN * (batch - 1) + p
    wait = where.blocked_s + where.rounds * e
    if line.full:
        wait += wait_for_slot_s(where, e, now_s)
    context = line.reload_s if ask.context_tokens > line.context_limit else 0.0
    return where.load_s, where.evict_s, queue, wait, p, d, e * where.price_per_s, context


def cost_of(where: Standing, ask: Ask, cached: float, now_s: float, degraded_s: float = 0.0) -> Cost:
    """The parts of T, and their sum."""
    parts = parts_of(where, ask, cached, now_s)
    return Cost(*parts, degraded_s, sum(parts) + degraded_s)


def cost(
    request: InferenceRequest,
    model: str,
    node: NodeView,
    instance: InstanceView,
    snapshot: FleetSnapshot,
    policy: Policy,
    now_s: float,
    claims: int = 0,
) -> Cost:
    """One request on one node, from nothing: for tests and for people; plans use `Standing` and `Ask`."""
    wanted = request.wanted_context_tokens
    where = standing(node, instance, wanted, snapshot.waiting, policy, now_s, claims)
    ask = ask_of(request, model, snapshot, policy)
    return cost_of(where, ask, cached_tokens(request, instance), now_s)


def service_s(ask: Ask, instances: Iterable[tuple[InstanceView, float]]) -> float | None:
    """E_best: the least p + d, each with its cached tokens; None when there is nobody."""
    return min((sum(prefill_decode_s(x.rates, ask, cached)) for x, cached in instances), default=None)
