"""What serving a request on a node would cost, in two halves (docs/scheduling.md §1).

`Standing` is all that does not depend on the request: made from a node's views, kept by `rows.CostTable`
while they stay the same. `Ask` is all that does not depend on the node. `score.rank` puts the two together
in one multiply-add (`Line`), `cost_of` does the same in parts; a test holds them equal.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from typing import NamedTuple

from herd.fleet.snapshot import FleetSnapshot, InstanceView, NodeView, Rates
from herd.request import InferenceRequest
from herd.scheduling.context import is_reload, is_resident, longest_prompt_tokens
from herd.scheduling.estimate import (
    NO_VICTIMS,
    PREFILL_OVERHEAD_S,
    Ask,
    Ending,
    FirstFree,
    Victims,
    ask_of,
    cached_tokens,
    endings,
    first_free,
    load_s,
    prefill_decode_s,
    price_per_second,
    taken,
    time_to_idle_s,
    victims,
    want,
)
from herd.scheduling.policy import Policy

BATCH_SLOWDOWN = 0.25
_NO_LIMIT = float("inf")


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
"""Those of a `Cost`, without lateness and total: what the seven signals are made of."""


Calm = tuple[float, float, float, float, float, FirstFree | None, float, bool]
"""1 ÷ pf, step, queue_p, queue_d, price, when a slot is free if all are taken, context limit, late."""


class Standing(NamedTuple):
    """How an instance stands now, for any request that would claim it after `claims` others."""

    node: NodeView
    instance: InstanceView
    rates: Rates
    claims: int
    slots: int
    own: int
    load_s: float
    evict_s: float
    blocked_s: float
    """Before the load or the reload can begin: another load, a busy victim, a drain."""
    rounds: int
    """Not hot: batches that go before."""
    queue_p: float
    """`queue` of docs/scheduling.md §1 is `queue_p` · p + `queue_d` · d."""
    queue_d: float
    price_per_s: float
    full: bool
    """Hot, and no slot is free after the claims."""
    first_free: FirstFree | None
    """Full, nobody claimed it before, and each slot is taken once: the case that needs no heap."""
    context_limit: float
    """Context beyond which it must be loaded anew, or cuts; infinity: none that is known, or not loaded."""
    longest_prompt: float
    """Prompt tokens that a fixed context takes; infinity when it is not fixed."""
    late: bool
    """Its node's beat is."""
    endings: tuple[Ending, ...]
    """What occupies the slots of a full one."""
    victims: Victims
    node_loads_other: bool
    needs_idle_self: bool
    """It would have to load itself anew, while it runs something."""
    drained: bool
    steady: bool
    """Nothing in it but the price changes by the clock alone."""
    calm: Calm | None
    """Set where nothing must be loaded, evicted or ended first: all that a card is made of."""
    rests_s: tuple[float, ...] = ()
    """Of one that is full after claims: how long its slots are taken still, ascending, when this was made."""


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
    hot, resident = instance.state == "hot", is_resident(instance)
    slots = max(1, instance.slots)
    own = taken(instance, now_s)
    neighbours = [x for x in node.instances if x.key != instance.key]
    out = NO_VICTIMS if resident else victims(node, instance, wanted_tokens, policy, now_s)
    other_loads = [x for x in neighbours if x.state == "loading"]
    reload = is_reload(instance, wanted_tokens, policy)
    reload_busy = own > 0 and reload
    blocked = max([load_s(x, now_s) for x in other_loads]) if other_loads and not hot else 0.0
    in_the_way = (*out.busy, instance) if reload_busy else out.busy
    busy_rest = max([time_to_idle_s(x, now_s) for x in in_the_way]) if in_the_way else 0.0
    blocked += busy_rest + (drain_rest_s or 0.0)
    before = 0 if reload_busy else own
    full = hot and before + claims >= slots
    ends = tuple(endings(instance, now_s)) if full and before else ()
    free = first_free(ends) if full and not claims and len(ends) == slots else None
    limit = context_limit(instance, wanted_tokens, reload=reload)
    others, batch = len([x for x in neighbours if x.running]), min(slots, own + claims + 1)
    queue_p, queue_d = _queue(others, batch)
    rates, price, late = instance.rates, price_per_second(node, policy, now_s), node.status == "degraded"
    calm = hot and not blocked and full == (free is not None)
    return Standing(
        node=node,
        instance=instance,
        rates=rates,
        claims=claims,
        slots=slots,
        own=own,
        load_s=0.0 if hot else load_s(instance, now_s),
        evict_s=sum([x.rates.load_warm_s * want(x, waiting, policy, now_s) for x in out.idle], 0.0),
        blocked_s=blocked,
        rounds=0 if hot else (own + claims) // slots,
        queue_p=queue_p,
        queue_d=queue_d,
        price_per_s=price,
        full=full,
        first_free=free,
        context_limit=limit,
        longest_prompt=longest_prompt_tokens(instance, policy),
        late=late,
        endings=ends,
        victims=out,
        node_loads_other=bool(other_loads),
        needs_idle_self=reload_busy,
        drained=drain_rest_s is not None,
        steady=instance.state != "loading" and not instance.settling_until_s and blocked == 0.0,
        calm=(1.0 / rates[0], rates[1], queue_p, queue_d, price, free, limit, late) if calm else None,
        rests_s=_rests_s(ends, now_s) if claims else (),
    )


def context_limit(instance: InstanceView, wanted_tokens: int | None, *, reload: bool) -> float:
    """Context beyond which it is loaded anew, or cuts; less than 0: it is loaded anew whatever the prompt."""
    context = instance.context_tokens
    if not context or not is_resident(instance):
        return _NO_LIMIT
    if reload:
        return -1.0
    if wanted_tokens is not None and wanted_tokens > context and not instance.context_fixed:
        return _NO_LIMIT  # as much as the model was trained for: nobody has more
    return float(context)


def _queue(others: int, batch: int) -> tuple[float, float]:
    """2·E·others + d·0.25·(b−1) + (p if b > 1), as factors of p and of d."""
    if batch > 1:
        return 2.0 * others + 1.0, 2.0 * others + BATCH_SLOWDOWN * (batch - 1)
    return 2.0 * others, 2.0 * others


def is_plain(where: Standing, wanted_tokens: int | None, policy: Policy) -> bool:
    """Work that comes or goes changes only what `after_work` makes anew."""
    instance = where.instance
    return (
        instance.state == "hot"
        and not instance.settling_until_s
        and not where.claims
        and not where.drained
        and not is_reload(instance, wanted_tokens, policy)
    )


Line = tuple[
    float,  # context beyond which the request needs a closer look; less than 0: every one does
    FirstFree | None,  # when a slot is free, where all are taken
    Mapping[bytes, int],  # what a request may find in the prompt cache
    float,  # base_s
    float,  # per_token_s
    float,  # per_out_s
    float,  # when its node was last chosen
    str,  # node id
    str,  # instance key
    Standing,
]
"""T = base_s + per_token_s · uncached + per_out_s · out, + the wait for a slot, + a reload beyond the limit.

All that a decision reads of every candidate. A plain tuple, which the ranking takes apart for every node.
"""
NODE_ID_OF_LINE = 7

_NOTHING: Mapping[bytes, int] = {}
_NO_ENDINGS: tuple[Ending, ...] = ()


def line_of(where: Standing) -> Line:
    """The same as coefficients."""
    node, instance, (prefill_tokens_per_s, step_s, _, _) = where[:3]
    free, limit = where.first_free, where.context_limit
    if where.longest_prompt < limit:
        limit = where.longest_prompt
    if where.full and free is None:
        limit = -1.0
    # what p and d are multiplied by, apart from the queue
    shared = 1.0 + where.price_per_s + where.rounds
    for_p = shared + where.queue_p
    return (
        limit,
        free,
        instance.held.digests if is_resident(instance) else _NOTHING,
        where.load_s + where.evict_s + where.blocked_s + PREFILL_OVERHEAD_S * for_p,
        for_p / prefill_tokens_per_s,
        (shared + where.queue_d) * step_s,
        node.last_chosen_s,
        node.node_id,
        instance.key,
        where,
    )


def after_work(
    before: Standing, node: NodeView, instance: InstanceView, policy: Policy, now_s: float
) -> tuple[Standing, Line]:
    """`standing` and `line_of` of a plain one after nothing but work came or went; a test holds them equal.

    In longhand and by place, since it is done a few times a request.
    """
    slots, limit, longest, late = before.slots, before.context_limit, before.longest_prompt, before.late
    own, rates, neighbours = len(instance.running), instance.rates, node.instances
    others, loads_other = 0.0, False
    if len(neighbours) > 1:
        for x in neighbours:
            if x is not instance:
                if x.running:
                    others += 2.0
                if x.state == "loading":
                    loads_other = True
    full, ends, free, queue_p, queue_d = False, _NO_ENDINGS, None, others, others
    if own >= slots:
        full, ends = True, tuple(endings(instance, now_s))
        free = first_free(ends) if own == slots else None
    batch = slots if full else own + 1
    if batch > 1:
        queue_p, queue_d = others + 1.0, others + BATCH_SLOWDOWN * (batch - 1)
    prefill_tokens_per_s, step_s, _, _ = rates
    price = price_per_second(node, policy, now_s)
    calm = (1.0 / prefill_tokens_per_s, step_s, queue_p, queue_d, price, free, limit, late)
    where = Standing(
        node, instance, rates, 0, slots, own, 0.0, 0.0, 0.0, 0, queue_p, queue_d, price, full, free,
        limit, longest, late, ends, NO_VICTIMS, loads_other, False, False, True,
        calm if own <= slots else None,
    )  # fmt: skip
    shared = 1.0 + price
    for_p = shared + queue_p
    return where, (
        (limit if limit < longest else longest) if own <= slots else -1.0,
        free,
        instance.held.digests,
        PREFILL_OVERHEAD_S * for_p,
        for_p / prefill_tokens_per_s,
        (shared + queue_d) * step_s,
        node.last_chosen_s,
        node.node_id,
        instance.key,
        where,
    )


def after_claims(line: Line, claims: int, now_s: float) -> Line:
    """The line of somebody who comes after `claims` others, from that after fewer, or none. No drain.

    A test holds them equal. The price is that of the row; the rest is true at this instant only.
    """
    before = line[-1]
    if before.claims and before.full:  # as full as before: only later in the queue
        return *line[:-1], before._replace(claims=claims)
    node, instance, slots, own = before.node, before.instance, before.slots, before.own
    hot, running = instance.state == "hot", 0 if before.needs_idle_self else own
    full = hot and running + claims >= slots
    ends = before.endings
    if full and running and not ends:
        ends = tuple(endings(instance, now_s))
    others = len([x for x in node.instances if x.running and x is not instance])
    queue_p, queue_d = _queue(others, min(slots, own + claims + 1))
    calm = before.calm
    if calm is not None:
        per_token_s, step_s, _, _, price, _, limit, late = calm
        calm = None if full else (per_token_s, step_s, queue_p, queue_d, price, None, limit, late)
    where = before._replace(
        claims=claims,
        rounds=0 if hot else (own + claims) // slots,
        queue_p=queue_p,
        queue_d=queue_d,
        full=full,
        first_free=None,
        endings=ends,
        calm=calm,
        rests_s=_rests_s(ends, now_s),
    )
    return line_of(where)


def wait_for_slot_s(where: Standing, e: float, now_s: float) -> float:
    """Hot: until a slot is free after everybody who claimed before. 0 if one is free."""
    free = where.first_free
    if free is not None:
        return free.rest_s(now_s)
    if not where.full:
        return 0.0
    rests_s = where.rests_s or _rests_s(where.endings, now_s)
    return _after_claims(rests_s, where.slots, where.claims, e)


def _rests_s(ends: tuple[Ending, ...], now_s: float) -> tuple[float, ...]:
    """`Ending.rest_s` of each, ascending; in longhand, since there are as many as slots."""
    rests_s = [end_s - now_s if end_s - now_s > floor_s else floor_s for end_s, floor_s in ends]
    rests_s.sort()
    return tuple(rests_s)


def _after_claims(rests_s: tuple[float, ...], slots: int, claims: int, e: float) -> float:
    """Earliest free slot after `claims` requests of `e` seconds each took theirs. `rests_s` ascending."""
    free_s = [*[0.0] * (slots - len(rests_s)), *rests_s[-slots:]]
    rounds, place = divmod(claims, slots)
    last = free_s[-1] if rounds else free_s[place]
    if last <= free_s[0] + e:  # none takes a slot twice in a round: they are free in turn
        return free_s[place] + rounds * e
    for _ in range(claims):
        heapq.heapreplace(free_s, free_s[0] + e)
    return free_s[0]


def parts_of(where: Standing, ask: Ask, cached: float, now_s: float) -> Parts:
    """load, evict, queue, wait, p, d, price and context, as docs/scheduling.md §1 names them."""
    _, _, rates, _, _, _, load, evict, blocked, rounds, queue_p, queue_d, price, full, _, limit = where[:16]
    p, d = prefill_decode_s(rates, ask, cached)
    e = p + d
    queue = queue_p * p + queue_d * d
    wait = blocked + rounds * e
    if full:
        wait += wait_for_slot_s(where, e, now_s)
    context = rates.load_warm_s if ask.context_tokens > limit else 0.0
    return load, evict, queue, wait, p, d, e * price, context


def cost_of(where: Standing, ask: Ask, cached: float, now_s: float, degraded_s: float = 0.0) -> Cost:
    """The parts of T, and their sum."""
    parts = parts_of(where, ask, cached, now_s)
    return tuple.__new__(Cost, (*parts, degraded_s, sum(parts) + degraded_s))


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
