"""What must hold for every fleet (docs/scheduling.md §7)."""

from __future__ import annotations

import heapq
from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from herd.fleet.held import NOTHING_HELD
from herd.fleet.snapshot import FleetSnapshot, NodeView, Running
from herd.request import InferenceRequest
from herd.scheduling import signals
from herd.scheduling.bounds import needs_of
from herd.scheduling.decide import decide
from herd.scheduling.eligibility import Needs, why_not
from herd.scheduling.estimate import Ask, Ending, ask_of, endings, first_free
from herd.scheduling.plan import (
    NEW,
    Attempt,
    Claims,
    CostTable,
    History,
    Hold,
    Reject,
    Step,
    Wait,
    Waiting,
    next_step,
    plan_queue,
)
from herd.scheduling.policy import DEFAULT_POLICY
from herd.scheduling.rows import make_row, next_row, row_after_work
from herd.scheduling.score import NO_CLAIMS, Candidate, Moment, Ranking, cards, rank
from herd.scheduling.standing import (
    Cost,
    after_claims,
    after_work,
    cost,
    line_of,
    parts_of,
    standing,
    wait_for_slot_s,
)
from tests.scheduling.build import NOW, RATES, ask, candidate_cost, fleet, instance, node, run
from tests.scheduling.strategies import fleets, nodes, queues, requests, runnings, with_node, worked

pytestmark = pytest.mark.slow

FEW = settings(max_examples=60)
MANY = settings(max_examples=200)

times = st.floats(0.0, 1e4)


@st.composite
def costs(draw: st.DrawFn) -> Cost:
    parts = [draw(times) for _ in range(8)]
    return Cost(*parts, 0.0, sum(parts))


def look(
    request: InferenceRequest, snapshot: FleetSnapshot, claims: Claims = NO_CLAIMS
) -> tuple[Ask, Ranking]:
    model = request.chain[0]
    moment = Moment(snapshot, DEFAULT_POLICY, NOW, claims, CostTable())
    asked = ask_of(request, model, snapshot, DEFAULT_POLICY)
    needs = Needs(model, request.needs, request.wanted_context_tokens)
    return asked, rank(needs, asked, frozenset(), moment)


def is_clipped(values: tuple[float, ...]) -> bool:
    return any(
        value <= signal.best - signal.span for value, signal in zip(values, signals.RANGES, strict=True)
    )


@FEW
@given(requests(), fleets())
def test_the_order_of_totals_is_that_of_total_times_when_no_signal_clips(
    request: InferenceRequest, snapshot: FleetSnapshot
) -> None:
    asked, ranking = look(request, snapshot)
    costs = [candidate_cost(x, asked, ranking) for x in ranking.candidates]
    made = zip(costs, cards(ranking, asked, DEFAULT_POLICY, NOW), strict=True)
    unclipped = [(cost.total, card[1]) for cost, card in made if not is_clipped(card[2])]
    for (sooner_s, better), (later_s, worse) in pairwise(unclipped):
        assert sooner_s <= later_s + 1e-9
        assert better >= worse - 1e-6


@FEW
@given(st.lists(costs(), min_size=1, max_size=6), st.floats(0.1, 10.0))
def test_points_do_not_change_when_all_seconds_are_scaled(found: list[Cost], factor: float) -> None:
    assume(min(cost.total for cost in found) * min(1.0, factor) > signals.MIN_UNIT_S)

    def points(scale: float) -> list[tuple[float, ...]]:
        scaled = [Cost(*[part * scale for part in cost]) for cost in found]
        unit = signals.unit_s(min(cost.total for cost in scaled))
        fastest_s = min(cost.decode for cost in scaled)
        return [signals.by_signal(cost[:8], unit, fastest_s, DEFAULT_POLICY) for cost in scaled]

    for values, again in zip(points(1.0), points(factor), strict=True):
        assert values == pytest.approx(again, abs=1e-6)


@FEW
@given(costs(), st.floats(0.05, 1e4), times)
def test_every_signal_stays_in_its_range(cost: Cost, unit: float, fastest_s: float) -> None:
    values = signals.by_signal(cost[:8], unit, fastest_s, DEFAULT_POLICY)
    for value, signal in zip(values, signals.RANGES, strict=True):
        assert signal.best - signal.span <= value <= signal.best


def place(ranking: Ranking, node_id: str) -> int:
    return [x.node_id for x in ranking.candidates].index(node_id)


@FEW
@given(requests(), fleets(), st.integers(0, 3), st.data())
def test_a_waiting_claim_never_raises_the_rank_of_its_node(
    request: InferenceRequest, snapshot: FleetSnapshot, before: int, data: st.DataObject
) -> None:
    _, ranking = look(request, snapshot)
    assume(ranking.candidates)
    chosen = data.draw(st.sampled_from(ranking.candidates))
    key = (chosen.node_id, chosen.instance_key)
    _, fewer = look(request, snapshot, Claims({key: before}))
    _, more = look(request, snapshot, Claims({key: before + 1}))
    assert place(more, chosen.node_id) >= place(fewer, chosen.node_id)


@FEW
@given(requests(), nodes("busy"), st.integers(1, 4), st.lists(runnings(), min_size=1, max_size=4))
def test_a_free_node_never_loses_to_an_equal_busy_one(
    request: InferenceRequest, drawn: NodeView, slots: int, running: list[Running]
) -> None:
    held = instance(request.chain[0], slots=max(slots, len(running)), running=tuple(running))
    others = tuple(x for x in drawn.instances if x.key != held.key)
    equal = {"status": "online", "paused": False, "heat": None}
    busy = drawn._replace(instances=(held._replace(node_id="busy"), *others), **equal)
    idle = drawn._replace(
        node_id="free", instances=(held._replace(node_id="free", running=()), *others), **equal
    )
    _, ranking = look(request, fleet(busy, idle))
    assert [x.node_id for x in ranking.candidates] == ["free", "busy"]


@FEW
@given(requests(), fleets(), st.randoms(use_true_random=False))
def test_the_order_of_nodes_in_the_input_is_irrelevant(
    request: InferenceRequest, snapshot: FleetSnapshot, chance
) -> None:
    views = list(snapshot.nodes.values())
    chance.shuffle(views)
    again = fleet(*views, stats=snapshot.stats, waiting=snapshot.waiting)
    assert next_step(request, snapshot, NEW, DEFAULT_POLICY, NOW) == next_step(
        request, again, NEW, DEFAULT_POLICY, NOW
    )


@FEW
@given(requests(), fleets(), st.sets(st.sampled_from(["n0", "n1", "n2"])))
def test_excluded_nodes_never_appear(
    request: InferenceRequest, snapshot: FleetSnapshot, tried: set[str]
) -> None:
    step = next_step(request, snapshot, History(tried=frozenset(tried)), DEFAULT_POLICY, NOW)
    if not isinstance(step, Attempt):
        return
    shown = {node_id for node_id, _, _ in step.candidates}
    assert not shown & ({exclusion.node_id for exclusion in step.excluded} | tried)
    needs = Needs(step.model, request.needs, request.wanted_context_tokens)
    for view, held in snapshot.holders[step.model]:
        if view.node_id in shown:
            assert why_not(view, held, needs, DEFAULT_POLICY, NOW) is None


@FEW
@given(requests(), fleets())
def test_every_known_node_is_a_candidate_or_excluded_with_a_reason(
    request: InferenceRequest, snapshot: FleetSnapshot
) -> None:
    step = next_step(request, snapshot, NEW, DEFAULT_POLICY, NOW)
    if isinstance(step, Attempt):
        shown = [node_id for node_id, _, _ in step.candidates] + [x.node_id for x in step.excluded]
        assert sorted(shown) == sorted(snapshot.nodes)


@FEW
@given(requests(), fleets(), st.integers(0, 3))
def test_the_multiply_add_is_the_sum_of_the_parts(
    request: InferenceRequest, snapshot: FleetSnapshot, claims: int
) -> None:
    keys = {(view.node_id, held.key): claims for view in snapshot.nodes.values() for held in view.instances}
    asked, ranking = look(request, snapshot, Claims(keys))
    for candidate in ranking.candidates:
        cost = candidate_cost(candidate, asked, ranking)
        assert cost.total == pytest.approx(candidate.total_s)
        assert cost.total == pytest.approx(sum(cost[:-1]))
        assert min(cost) >= 0


@FEW
@given(st.lists(st.tuples(times, times), min_size=1, max_size=8), times)
def test_the_first_free_slot_is_the_least_of_all_rests(ends: list[tuple[float, float]], now_s: float) -> None:
    taken = [Ending(end_s, floor_s) for end_s, floor_s in ends]
    least_s = min(x.rest_s(now_s) for x in taken)
    assert first_free(taken).rest_s(now_s) == pytest.approx(least_s, abs=1e-9)


# -- kept rows -----------------------------------------------------------------------------------------------


@FEW
@given(fleets(), st.lists(requests(), min_size=2, max_size=4), st.data())
def test_a_decision_is_the_same_with_kept_rows_and_without(
    snapshot: FleetSnapshot, asked: list[InferenceRequest], data: st.DataObject
) -> None:
    table = CostTable()
    for request in asked:
        kept = next_step(request, snapshot, NEW, DEFAULT_POLICY, NOW, table=table)
        assert kept == next_step(request, snapshot, NEW, DEFAULT_POLICY, NOW)
        changed = data.draw(st.sampled_from(sorted(snapshot.nodes)))
        snapshot = with_node(snapshot, data.draw(nodes(changed)))
        waiting = data.draw(st.dictionaries(st.sampled_from(["m", "n"]), st.integers(0, 1)))
        snapshot = snapshot._replace(waiting=waiting)


@FEW
@given(fleets(), st.lists(requests(), min_size=2, max_size=6), st.data())
def test_a_decision_is_the_same_with_kept_rows_after_work_came_and_went(
    snapshot: FleetSnapshot, asked: list[InferenceRequest], data: st.DataObject
) -> None:
    """What happens between most decisions: views differ in what work changes, and in nothing else.

    Some snapshots say so, some do not, and some say so of nodes that nobody has seen.
    """
    table = CostTable()
    for request in asked:
        kept = next_step(request, snapshot, NEW, DEFAULT_POLICY, NOW, table=table)
        assert kept == next_step(request, snapshot, NEW, DEFAULT_POLICY, NOW)
        before, changed = snapshot.nodes, data.draw(st.sets(st.sampled_from(sorted(snapshot.nodes))))
        for node_id in changed:
            snapshot = with_node(snapshot, data.draw(worked(snapshot.nodes[node_id])))
        told = data.draw(st.sampled_from((before, {}, None)))
        said = None if told is None else (told, snapshot.nodes, tuple(changed))
        snapshot = snapshot._replace(worked=said)


@FEW
@given(nodes("a"), requests(), st.data(), st.dictionaries(st.sampled_from(["m", "n"]), st.integers(0, 1)))
def test_a_row_after_work_is_the_row_made_from_nothing(
    view: NodeView, request: InferenceRequest, data: st.DataObject, waiting: dict[str, int]
) -> None:
    snapshot, after = fleet(view, waiting=waiting), data.draw(worked(view))
    later_s = NOW + data.draw(st.floats(0.0, 0.9))
    for name, place in [(name.canonical, at) for at, x in enumerate(view.instances) for name in x.names]:
        needs = Needs(name, request.needs, request.wanted_context_tokens)
        row = make_row(view, view.instances[place], needs, snapshot, DEFAULT_POLICY, NOW)
        plain = make_row(after, after.instances[place], needs, snapshot, DEFAULT_POLICY, later_s)
        for known in (False, True):
            args = (after, after.instances[place], needs, snapshot, DEFAULT_POLICY, later_s, known)
            assert next_row(row, *args) == plain
        if row.plain and row.where is not None and not after.instances[place].settling_until_s:
            quick = after_work(row.where, after, after.instances[place], DEFAULT_POLICY, later_s)
            assert quick == (plain.where, plain.line)


@FEW
@given(nodes("a"), requests(), st.dictionaries(st.sampled_from(["m", "n"]), st.integers(0, 1)), st.data())
def test_a_row_after_claims_is_the_row_made_from_nothing(
    view: NodeView, request: InferenceRequest, waiting: dict[str, int], data: st.DataObject
) -> None:
    """Each from that after fewer, at any place of the queue."""
    snapshot = fleet(view, waiting=waiting)
    for name, place in [(name.canonical, at) for at, x in enumerate(view.instances) for name in x.names]:
        held, needs = view.instances[place], Needs(name, request.needs, request.wanted_context_tokens)
        line = make_row(view, held, needs, snapshot, DEFAULT_POLICY, NOW).line
        if line is None:
            continue
        for claims in sorted(data.draw(st.sets(st.integers(1, 12), min_size=1, max_size=4))):
            line = after_claims(line, claims, NOW)
            args = (needs.wanted_context_tokens, waiting, DEFAULT_POLICY, NOW, claims)
            assert line == line_of(standing(view, held, *args))


@FEW
@given(st.lists(runnings(), max_size=6), st.integers(1, 5), st.integers(0, 20), st.floats(0.01, 100.0))
def test_the_wait_after_claims_is_that_of_a_heap_to_which_each_adds_its_time(
    running: list[Running], slots: int, claims: int, each_s: float
) -> None:
    assume(len(running) + claims >= slots)
    view = node("a", instance(slots=slots, running=tuple(running)))
    where = standing(view, view.instances[0], None, {}, DEFAULT_POLICY, NOW, claims)
    ends = sorted([end.rest_s(NOW) for end in endings(view.instances[0], NOW)])[-slots:]
    heap = [0.0] * (slots - len(ends)) + ends
    for _ in range(claims):
        heapq.heapreplace(heap, heap[0] + each_s)
    assert wait_for_slot_s(where, each_s, NOW) == pytest.approx(heap[0])


@FEW
@given(requests(), fleets(), st.integers(0, 3))
def test_cards_are_the_signals_of_the_parts(
    request: InferenceRequest, snapshot: FleetSnapshot, claims: int
) -> None:
    keys = {(view.node_id, held.key): claims for view in snapshot.nodes.values() for held in view.instances}
    asked, ranking = look(request, snapshot, Claims(keys))
    made = cards(ranking, asked, DEFAULT_POLICY, NOW)
    for x, (node_id, total, by_signal) in zip(ranking.candidates, made, strict=True):
        parts = parts_of(x.where, asked, x.cached, NOW)
        values = signals.by_signal(parts, ranking.unit, ranking.fastest_decode_s, DEFAULT_POLICY)
        assert node_id == x.node_id
        assert by_signal == pytest.approx(values, abs=1e-9)
        assert total == pytest.approx(signals.total(values, x.where.late, DEFAULT_POLICY), abs=1e-9)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("count", [63, 64, 65, 300])
def test_the_eight_best_of_many_are_those_of_all_in_order(count: int, late: bool) -> None:
    chance = Random(count)
    views = []
    for n in range(count):
        rates = RATES._replace(step_s=chance.choice((0.01, 0.02, chance.uniform(0.01, 0.05))))
        held = instance(rates=rates, running=chance.choice((0, 0, 1, 2)), slots=2)
        status = "degraded" if late and chance.random() < 0.3 else "online"
        views.append(node(f"n{n:03}", held, status=status, last_chosen_s=chance.choice((0.0, 5.0))))
    snapshot = fleet(*views)
    _, ranking = look(ask(), snapshot)

    def seconds_of(view: NodeView) -> Cost:
        return cost(ask(), "m", view, view.instances[0], snapshot, DEFAULT_POLICY, NOW)

    found = [(view, seconds_of(view)) for view in views]
    unit = min(seconds.total for _, seconds in found)
    late_s = signals.degraded_s(unit, DEFAULT_POLICY)
    totals = [
        (seconds.total + (late_s if view.status == "degraded" else 0.0), view.last_chosen_s, view.node_id)
        for view, seconds in found
    ]
    assert ranking.unit == pytest.approx(unit)
    assert ranking.fastest_decode_s == pytest.approx(min(seconds.decode for _, seconds in found))
    best = sorted((round(total_s, 9), last_s, node_id) for total_s, last_s, node_id in totals)[:8]
    assert [(round(x.total_s, 9), x.last_chosen_s, x.node_id) for x in ranking.candidates] == best


def test_claims_find_another_weights_file_under_the_same_name() -> None:
    table = CostTable()
    before = node("a", instance("m", key="old", slots=2))
    after = before._replace(instances=(instance("m", key="new", slots=2)._replace(node_id="a"),))
    snapshot = fleet(before)
    next_step(ask(), snapshot, NEW, DEFAULT_POLICY, NOW, table=table)
    snapshot, claims = with_node(snapshot, after), Claims({("a", "new"): 1})
    kept = next_step(ask(), snapshot, NEW, DEFAULT_POLICY, NOW, claims, table)
    assert isinstance(kept, Wait)
    assert kept == next_step(ask(), snapshot, NEW, DEFAULT_POLICY, NOW, claims)


def test_who_does_not_list_a_model_is_told_again_when_somebody_comes_or_goes() -> None:
    table = CostTable()
    a, b = node("a", instance("m")), node("b", instance("n"))
    one = fleet(a, b)

    def absent(snapshot: FleetSnapshot, model: str) -> list[tuple[str, str]]:
        return [tuple(x) for x in table.absent(model, snapshot)]

    assert absent(one, "m") == [("b", "model_absent")]
    assert absent(one, "n") == [("a", "model_absent")]
    assert absent(fleet(a, b, node("c", instance("n"))), "m") == [
        ("b", "model_absent"),
        ("c", "model_absent"),
    ]
    assert absent(fleet(a, node("b", instance("m"))), "m") == []
    back = one._replace(remembered={"m": frozenset({"z", "a"})})
    assert absent(back, "m") == [("z", "offline"), ("b", "model_absent")]


@FEW
@given(fleets(), requests(), st.floats(0.0, 0.999))
def test_kept_rows_lose_at_most_one_per_cent_before_they_are_made_anew(
    snapshot: FleetSnapshot, request: InferenceRequest, later_s: float
) -> None:
    table = CostTable()
    next_step(request, snapshot, NEW, DEFAULT_POLICY, NOW, table=table)
    kept = next_step(request, snapshot, NEW, DEFAULT_POLICY, NOW + later_s, table=table)
    fresh = next_step(request, snapshot, NEW, DEFAULT_POLICY, NOW + later_s)
    if isinstance(kept, Attempt) and isinstance(fresh, Attempt) and kept.model == fresh.model:
        assert kept.cost.total <= fresh.cost.total * 1.02 + 1e-9


@FEW
@given(fleets(), requests(), st.floats(1.0, 1000.0))
def test_rows_older_than_a_second_are_made_anew(
    snapshot: FleetSnapshot, request: InferenceRequest, later_s: float
) -> None:
    table = CostTable()
    next_step(request, snapshot, NEW, DEFAULT_POLICY, NOW, table=table)
    kept = next_step(request, snapshot, NEW, DEFAULT_POLICY, NOW + later_s, table=table)
    assert kept == next_step(request, snapshot, NEW, DEFAULT_POLICY, NOW + later_s)


def test_a_row_is_made_anew_when_only_its_node_changed() -> None:
    table = CostTable()
    view = node("a", instance())
    assert isinstance(next_step(ask(), fleet(view), NEW, DEFAULT_POLICY, NOW, table=table), Attempt)
    paused = fleet(view._replace(paused=True))
    assert isinstance(next_step(ask(), paused, NEW, DEFAULT_POLICY, NOW, table=table), Hold)


@pytest.mark.parametrize(
    "view",
    [
        node("a", instance(state="loading", loading_since_s=NOW)),
        node("a", instance(running=1)),
        node("a", instance(state="cold"), instance("x", "loading", loading_since_s=NOW)),
        node("a", instance(settling_until_s=(NOW + 0.4,))),
    ],
)
def test_what_runs_by_the_clock_is_exact_in_kept_rows(view: NodeView) -> None:
    table = CostTable()
    snapshot = fleet(view, node("b", instance(rates=RATES._replace(step_s=9.0))))
    for later_s in (0.0, 0.3, 0.6, 0.9):
        moment = Moment(snapshot, DEFAULT_POLICY, NOW + later_s, NO_CLAIMS, table)
        fresh = moment._replace(table=CostTable())
        asked = ask_of(ask(), "m", snapshot, DEFAULT_POLICY)
        needs = Needs("m", frozenset(), None)
        kept_s, exact_s = (rank(needs, asked, frozenset(), x).candidates[0].total_s for x in (moment, fresh))
        assert kept_s == exact_s


def test_a_slot_that_settles_is_seen_to_be_free_by_kept_rows() -> None:
    table = CostTable()
    snapshot = fleet(node("a", instance(settling_until_s=(NOW + 0.4,))))
    kinds = [
        type(next_step(ask(), snapshot, NEW, DEFAULT_POLICY, NOW + later_s, table=table)).__name__
        for later_s in (0.0, 0.3, 0.5)
    ]
    assert kinds == ["Wait", "Wait", "Attempt"]


def test_a_victim_that_is_suddenly_waited_for_costs_more_in_kept_rows() -> None:
    table = CostTable()
    view = node("a", instance(state="cold"), instance("x"), max_loaded=1)
    free = next_step(ask(), fleet(view), NEW, DEFAULT_POLICY, NOW, table=table)
    long_ago = NEW._replace(waited_s=11.0)
    wanted = next_step(ask(), fleet(view, waiting={"x": 1}), long_ago, DEFAULT_POLICY, NOW, table=table)
    assert isinstance(free, Attempt)
    assert isinstance(wanted, Attempt)
    assert (free.cost.evict, wanted.cost.evict) == (0.0, 2.0)


def test_a_table_does_not_grow_without_bound() -> None:
    table = CostTable(max_needs=3)
    snapshot = fleet(node("a", instance()))
    for tokens in range(1, 50):
        next_step(ask(wanted_context_tokens=tokens), snapshot, NEW, DEFAULT_POLICY, NOW, table=table)
    assert len(table) == 3


# -- everybody who waits -------------------------------------------------------------------------------------


def planned(waiting: list[Waiting], snapshot: FleetSnapshot) -> list[tuple[str, Step]]:
    return plan_queue(waiting, snapshot, DEFAULT_POLICY, NOW)[0]


def sent(steps: list[tuple[str, Step]]) -> list[Attempt]:
    return [step for _, step in steps if isinstance(step, Attempt)]


@FEW
@given(queues(), fleets(3))
def test_at_most_one_attempt_a_free_slot(waiting: list[Waiting], snapshot: FleetSnapshot) -> None:
    steps = planned(waiting, snapshot)
    assert len({request_id for request_id, _ in steps}) == len(steps)
    for view in snapshot.nodes.values():
        for held in view.instances:
            mine = [x for x in sent(steps) if (x.node_id, x.instance_key) == (view.node_id, held.key)]
            slots = held.slots if held.state == "hot" else 1
            assert len(mine) <= max(0, slots - held.taken)


@FEW
@given(queues(), fleets(3))
def test_no_plan_evicts_a_busy_model(waiting: list[Waiting], snapshot: FleetSnapshot) -> None:
    attempts = sent(planned(waiting, snapshot))
    for view in snapshot.nodes.values():
        here = [x for x in attempts if x.node_id == view.node_id]
        used = {x.key for x in view.instances if x.taken} | {x.instance_key for x in here}
        evicted = {key for x in here for key in x.evicts}
        by_key = {x.key: x for x in view.instances}
        loads = [x for x in here if by_key[x.instance_key].state in ("warm", "cold")]
        assert len(loads) <= 1
        if not loads:
            continue
        # What was sent before the load made a model busy; what is sent after it goes to no evicted one.
        assert not evicted & used
        resident = {x.key for x in view.instances if x.state in ("hot", "loading")}
        if view.max_loaded is not None:
            assert len(resident - evicted) + 1 <= view.max_loaded
        assert not any(x.state == "loading" for x in view.instances)


@FEW
@given(queues(), fleets(3), st.randoms(use_true_random=False))
def test_a_plan_does_not_depend_on_the_order_of_its_input(
    waiting: list[Waiting], snapshot: FleetSnapshot, chance
) -> None:
    shuffled = list(waiting)
    chance.shuffle(shuffled)
    assert planned(waiting, snapshot) == planned(shuffled, snapshot)


def plain_plan(waiting: list[Waiting], snapshot: FleetSnapshot) -> list[tuple[str, Step]]:
    """docs/scheduling.md §3 by the letter: each who waits is decided from nothing. No drains."""
    snapshot = snapshot._replace(waiting=Counter(entry.request.chain[0] for entry in waiting))
    by_age = sorted(waiting, key=lambda x: x.arrival_s)
    oldest = {x.request.chain[0]: x for x in reversed(by_age)}
    claims: Counter[tuple[str, str]] = Counter()
    changes: list[tuple[str, Step]] = []
    for entry in sorted(waiting, key=lambda x: (x.deadline_s, x.arrival_s, x.request.request_id)):
        may_wait_s = DEFAULT_POLICY.wait_timeout_s
        if oldest[entry.request.chain[0]] is entry:
            may_wait_s = (
                DEFAULT_POLICY.drain_after_s
            )  # the oldest is decided anew, since it may start a drain
        if entry.claim is not None and entry.history.waited_s < may_wait_s and is_skipped(entry, snapshot):
            claims[entry.claim] += 1
            continue
        step = next_step(entry.request, snapshot, entry.history, DEFAULT_POLICY, NOW, Claims(claims))
        same = entry.held and isinstance(step, Hold)
        if isinstance(step, Wait):
            claims[step.node_id, step.instance_key] += 1
            same = not entry.held and entry.claim == (step.node_id, step.instance_key)
        if isinstance(step, Attempt):
            snapshot = started(snapshot, step, entry.request.chain[0])
        if not same:
            changes.append((entry.request.request_id, step))
    return changes


def is_skipped(entry: Waiting, snapshot: FleetSnapshot) -> bool:
    """No node can be sent its model, and the one that it claimed still could be, once it is free."""
    request, model = entry.request, entry.request.chain[0]
    able = []
    needs = Needs(model, request.needs, request.wanted_context_tokens)
    for view, held in snapshot.holders.get(model, ()):
        if why_not(view, held, needs, DEFAULT_POLICY, NOW) is not None:
            continue
        where = standing(view, held, needs.wanted_context_tokens, {}, DEFAULT_POLICY, NOW)
        able.append((view.node_id, held.key))
        is_free = where.own < (where.slots if held.state == "hot" else 1)
        if is_free and (held.state == "hot" or not (where.node_loads_other or where.victims.busy)):
            return False
    return entry.claim in able


def started(snapshot: FleetSnapshot, step: Attempt, waited_for: str) -> FleetSnapshot:
    view = snapshot.nodes[step.node_id]
    running = Running("r", step.model, NOW, None, step.prefill_s, step.out_tokens)
    after = []
    for held in view.instances:
        if held.key in step.evicts:
            after.append(held._replace(state="warm", held=NOTHING_HELD))
        elif held.key != step.instance_key:
            after.append(held)
        elif held.state in ("hot", "loading"):
            after.append(held._replace(running=(*held.running, running)))
        else:
            loads = {"state": "loading", "loading_since_s": NOW, "loading_expected_s": step.cost.load}
            after.append(held._replace(running=(running,), **loads))
    snapshot = with_node(snapshot, view._replace(instances=tuple(after), last_chosen_s=NOW))
    return snapshot._replace(waiting={**snapshot.waiting, waited_for: snapshot.waiting[waited_for] - 1})


@MANY
@given(fleets(4), st.lists(queues(), min_size=1, max_size=3), st.data())
def test_a_plan_is_the_same_with_kept_rows_as_with_everybody_decided_from_nothing(
    snapshot: FleetSnapshot, asked: list[list[Waiting]], data: st.DataObject
) -> None:
    """One table for all plans; between them work comes and goes, and a node changes in other ways."""
    table = CostTable()
    places = [(view.node_id, held.key) for view in snapshot.nodes.values() for held in view.instances]
    for drawn in asked:
        claims = st.sampled_from([None, ("gone", "m"), *places, *places])
        waiting = [entry._replace(claim=data.draw(claims)) for entry in drawn]
        waiting = [entry._replace(held=entry.claim is None and data.draw(st.booleans())) for entry in waiting]
        steps, _ = plan_queue(waiting, snapshot, DEFAULT_POLICY, NOW, table=table)
        assert steps == plain_plan(waiting, snapshot)
        for node_id in data.draw(st.sets(st.sampled_from(sorted(snapshot.nodes)))):
            snapshot = with_node(snapshot, data.draw(worked(snapshot.nodes[node_id])))


def full(snapshot: FleetSnapshot) -> FleetSnapshot:
    """The same fleet with everything hot and every slot taken."""
    for view in snapshot.nodes.values():
        taken = tuple(x._replace(state="hot", running=(run(),) * x.slots) for x in view.instances)
        snapshot = with_node(snapshot, view._replace(instances=taken))
    return snapshot


@FEW
@given(queues(4), fleets(3))
def test_planning_again_right_away_changes_nothing_for_those_who_wait(
    waiting: list[Waiting], drawn: FleetSnapshot
) -> None:
    """Nobody is told twice: the same plan again is silent."""
    snapshot = full(drawn)
    steps = dict(planned(waiting, snapshot))
    settled = []
    for entry in waiting:
        match steps[entry.request.request_id]:
            case Wait(node_id=node_id, instance_key=key):
                settled.append(entry._replace(claim=(node_id, key)))
            case Hold():
                settled.append(entry._replace(held=True))
            case step:
                assert not isinstance(step, Attempt)
    again = planned(settled, snapshot)
    assert not [step for _, step in again if not isinstance(step, Reject)]


@FEW
@given(requests(), fleets())
def test_a_request_that_fails_everywhere_ends_within_its_attempts(
    request: InferenceRequest, snapshot: FleetSnapshot
) -> None:
    history = NEW
    for _ in range(DEFAULT_POLICY.max_attempts + 1):
        step = next_step(request, snapshot, history, DEFAULT_POLICY, NOW)
        if not isinstance(step, Attempt):
            break
        assert step.node_id not in history.tried
        history = history._replace(
            tried=history.tried | {step.node_id}, attempts=history.attempts + 1, model_index=step.model_index
        )
    assert history.attempts <= DEFAULT_POLICY.max_attempts
    assert not isinstance(step, Attempt)


def test_candidates_compare_by_time_then_by_last_choice_then_by_id() -> None:
    assert Candidate._fields[:4] == ("total_s", "last_chosen_s", "node_id", "instance_key")


@FEW
@given(requests(), fleets())
def test_what_is_made_past_its_constructor_has_every_field(
    request: InferenceRequest, snapshot: FleetSnapshot
) -> None:
    (asked, ranking), needs = look(request, snapshot), needs_of(request, request.chain[0], NEW, snapshot)
    made = [asked, ranking, needs]
    moment = Moment(snapshot, DEFAULT_POLICY, NOW, NO_CLAIMS, CostTable())
    decision = decide(request, NEW, moment)
    made.append(decision)
    if isinstance(decision.step, Attempt):
        made += [decision.step, decision.step.cost, decision.step.card]
        view, held = snapshot.nodes[decision.step.node_id], decision.step.instance_key
        before = next(x for x in view.instances if x.key == held)
        row = make_row(view, before, needs, snapshot, DEFAULT_POLICY, NOW)
        after = row_after_work(row, view, before, DEFAULT_POLICY, NOW)
        made += [row] if after is None else [row, after]
    for value in made:
        assert len(value) == len(type(value)._fields)
        assert type(value)(*value) == value
