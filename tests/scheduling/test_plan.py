"""docs/scheduling.md §3 and §4: everybody who waits, and the load rules."""

from __future__ import annotations

import pytest

from herd.fleet.snapshot import FleetSnapshot, NodeView, Rates
from herd.request import PrefixMark
from herd.scheduling.plan import (
    NEW,
    NO_DRAINS,
    Attempt,
    Blocked,
    Claims,
    CostTable,
    Drain,
    DrainState,
    History,
    Hold,
    Reject,
    Step,
    Wait,
    Waiting,
    next_step,
    plan_queue,
    virtual_deadline,
)
from herd.scheduling.policy import DEFAULT_POLICY, Policy
from tests.scheduling.build import GB, NOW, RATES, ask, fleet, instance, node, run


def waits(
    request_id: str, *chain: str, deadline_s: float = NOW + 20, waited_s: float = 0.0, **fields: object
) -> Waiting:
    known = {k: fields.pop(k) for k in ("held", "claim") if k in fields}
    request = ask(*chain, request_id=request_id, **fields)
    history = History(waited_s=waited_s)
    return Waiting(request, history, NOW - waited_s, deadline_s, **known)  # type: ignore[arg-type]


def plan(
    snapshot: FleetSnapshot, *waiting: Waiting, drains: DrainState = NO_DRAINS, now_s: float = NOW
) -> tuple[dict[str, Step], DrainState]:
    steps, after = plan_queue(waiting, snapshot, DEFAULT_POLICY, now_s, drains)
    assert len(dict(steps)) == len(steps), "at most one step a request"
    return dict(steps), after


def kinds(steps: dict[str, Step]) -> dict[str, str]:
    return {k: type(step).__name__ for k, step in steps.items()}


# -- order -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields", "seconds"),
    [("/api/chat", {}, 4.02), ("/api/embed", {}, 1.04), ("/api/chat", {"max_tokens": 50}, 2.02)],
)
def test_the_virtual_deadline_is_five_times_the_best_service_time_away(
    path: str, fields: dict[str, object], seconds: float
) -> None:
    slow = instance(rates=RATES._replace(step_s=0.04), running=0)
    snapshot = fleet(node("slow", slow), node("fast", instance(running=1)))
    deadline = virtual_deadline(ask(path=path, **fields), snapshot, DEFAULT_POLICY, NOW)
    assert deadline == pytest.approx(NOW + 5 * seconds)


def test_a_request_that_nobody_can_serve_has_a_deadline_too() -> None:
    offline = fleet(node("a", instance(), status="offline"))
    assert virtual_deadline(ask(), offline, DEFAULT_POLICY, NOW) == pytest.approx(NOW + 20.1)
    assert virtual_deadline(ask(), fleet(), DEFAULT_POLICY, NOW) == NOW + 50


def test_a_job_of_20_s_yields_to_jobs_of_1_s_that_arrive_up_to_95_s_later() -> None:
    quick = Rates(prefill_tokens_per_s=1e9, step_s=1.0, load_cold_s=8.0, load_warm_s=2.0)
    snapshot = fleet(node("a", instance(rates=quick)))

    def deadline(tokens: int, arrival_s: float) -> float:
        return virtual_deadline(ask(max_tokens=tokens), snapshot, DEFAULT_POLICY, arrival_s)

    long_job = deadline(20, 0.0)
    assert deadline(1, 94.9) < long_job < deadline(1, 95.1)


def test_a_slot_goes_to_the_earliest_deadline_whoever_came_first() -> None:
    free = fleet(node("a", instance()))
    steps, _ = plan(
        free,
        waits("late", deadline_s=NOW + 9),
        waits("soon", deadline_s=NOW + 5),
        waits("mid", deadline_s=NOW + 7),
    )
    assert kinds(steps) == {"soon": "Attempt", "mid": "Wait", "late": "Wait"}
    assert list(steps) == ["soon", "mid", "late"]


def test_models_are_merged_by_deadline() -> None:
    """One slot of room on the node for either model: the earlier deadline loads its own."""
    snapshot = fleet(node("a", instance("m", "cold"), instance("n", "cold"), max_loaded=1))
    steps, _ = plan(snapshot, waits("1", "m", deadline_s=NOW + 9), waits("2", "n", deadline_s=NOW + 8))
    assert kinds(steps) == {"2": "Attempt", "1": "Wait"}
    assert steps["1"].blocked == Blocked.NEEDS_BUSY_EVICTED  # type: ignore[union-attr]


def test_equal_deadlines_go_by_arrival_then_by_id() -> None:
    free = fleet(node("a", instance()))
    assert next(iter(plan(free, waits("b"), waits("a"))[0])) == "a"
    assert next(iter(plan(free, waits("b", waited_s=1.0), waits("a"))[0])) == "b"


def test_a_plan_never_sends_more_than_there_are_free_slots() -> None:
    snapshot = fleet(node("a", instance(slots=3, running=1)), node("b", instance(slots=2)))
    steps, _ = plan(snapshot, *(waits(f"{n}") for n in range(9)))
    sent = [step.node_id for step in steps.values() if isinstance(step, Attempt)]
    assert sorted(sent) == ["a", "a", "b", "b"]


def test_only_a_window_of_24_a_model_is_looked_at() -> None:
    snapshot = fleet(node("a", instance(running=1)), node("b", instance("n", running=1)))
    steps, _ = plan(snapshot, *(waits(f"m{n:02}") for n in range(30)), waits("n", "n", deadline_s=NOW + 99))
    assert sorted(steps) == [*(f"m{n:02}" for n in range(24)), "n"]


def test_whoever_is_past_the_window_still_ends_when_the_wait_is_over() -> None:
    snapshot = fleet(node("a", instance(running=1)))
    steps, _ = plan(
        snapshot,
        *(waits(f"m{n:02}", claim=("a", "m")) for n in range(30)),
        waits("old", deadline_s=NOW + 99, waited_s=300.0),
    )
    assert kinds(steps) == {"old": "Reject"}


# -- what is in the answer ---------------------------------------------------------------------------------


def test_a_wait_is_answered_once_and_then_only_when_its_claim_changes() -> None:
    snapshot = fleet(node("a", instance(running=1)))
    steps, _ = plan(snapshot, waits("1"))
    assert isinstance(steps["1"], Wait)
    assert plan(snapshot, waits("1", claim=("a", "m")))[0] == {}
    assert kinds(plan(snapshot, waits("1", claim=("gone", "m")))[0]) == {"1": "Wait"}
    assert kinds(plan(snapshot, waits("1", held=True))[0]) == {"1": "Wait"}


def test_a_hold_is_answered_once() -> None:
    snapshot = fleet(node("a", instance(), status="offline"))
    assert isinstance(plan(snapshot, waits("1", claim=("a", "m")))[0]["1"], Hold)
    assert plan(snapshot, waits("1", held=True))[0] == {}


def test_a_held_request_is_sent_as_soon_as_a_node_is_there() -> None:
    assert kinds(plan(fleet(node("a", instance())), waits("1", held=True))[0]) == {"1": "Attempt"}


def test_a_held_request_ends_when_its_model_turns_out_to_be_nowhere() -> None:
    steps, _ = plan(fleet(node("a", instance("x"))), waits("1", held=True))
    assert isinstance(steps["1"], Reject)
    assert steps["1"].status == 404


def test_claims_of_those_who_are_skipped_still_stand() -> None:
    """a frees its slot in 3.6 s and b in 4.5 s: who comes second on a would wait longer than first on b."""
    longer = run()._replace(out_tokens=195.0)
    full = fleet(node("a", instance(running=1)), node("b", instance(running=(longer,))))
    first, second = waits("1", claim=("a", "m")), waits("2")
    assert plan(full, first)[0] == {}
    alone, _ = plan(full, second)
    after, _ = plan(full, first, second)
    assert [alone["2"].node_id, after["2"].node_id] == ["a", "b"]  # type: ignore[union-attr]


def test_whoever_waits_gets_the_slot_that_is_freed_where_it_claimed_or_elsewhere() -> None:
    waiting = waits("1", claim=("a", "m"))
    assert kinds(plan(fleet(node("a", instance())), waiting)[0]) == {"1": "Attempt"}
    freed = fleet(node("a", instance(running=1)), node("b", instance()))
    assert plan(freed, waiting)[0]["1"].node_id == "b"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "lost",
    [
        fleet(node("b", instance(running=1))),
        fleet(node("a", instance(running=1), paused=True), node("b", instance(running=1))),
    ],
)
def test_a_claim_on_a_node_that_is_lost_moves_on(lost: FleetSnapshot) -> None:
    steps, _ = plan(lost, waits("1", claim=("a", "m")))
    assert steps["1"].node_id == "b"  # type: ignore[union-attr]


# -- waiting for a busy best node, or taking a free worse one ------------------------------------------------


@pytest.mark.parametrize(("step_s", "kind"), [(0.0439, "Attempt"), (0.0441, "Wait")])
def test_a_free_worse_node_is_taken_if_and_only_if_its_total_time_is_smaller(
    step_s: float, kind: str
) -> None:
    """On a: 3.6 s of waiting and 4.02 s of work. On b: 1.02 s and 150 tokens, 7.62 s at 0.044 s each."""
    snapshot = fleet(node("a", instance(running=1)), node("b", instance(rates=RATES._replace(step_s=step_s))))
    assert type(next_step(ask(), snapshot, NEW, DEFAULT_POLICY, NOW)).__name__ == kind


@pytest.mark.parametrize(("cached", "kind"), [(0.0, "b"), (50.0, "b"), (70.0, "a"), (100.0, "a")])
def test_a_chat_leaves_its_node_when_the_wait_exceeds_the_prefill_saved(cached: float, kind: str) -> None:
    """0.6 s to wait on a, where `cached` tokens of 0.01 s are in the prompt cache."""
    mark = (PrefixMark(b"1", cached),)
    ending = run(4.0, 2.4)._replace(out_tokens=0.6 / 0.02 / 0.35)
    snapshot = fleet(node("a", instance(running=(ending,), held=(mark,))), node("b", instance()))
    step = next_step(ask(prefixes=mark), snapshot, NEW, DEFAULT_POLICY, NOW)
    assert step.node_id == kind  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "e_s", "load_s", "e_there_s", "kth"),
    [
        ("8B on a 4090", 1.5, 2.8, 1.5, 2),
        ("32B", 6.0, 7.9, 6.0, 2),
        ("70B, a slow node", 30.0, 60.0, 121.0, 6),
    ],
)
def test_a_second_copy_is_opened_by_the_kth_waiting_request(
    name: str, e_s: float, load_s: float, e_there_s: float, kth: int
) -> None:
    def rates(service_s: float) -> Rates:
        return Rates(1e9, (service_s - 0.02) / 150, load_s, load_s)

    running = (run(0.0)._replace(prefill_s=0.02),)
    snapshot = fleet(
        node("here", instance(running=running, rates=rates(e_s))),
        node("there", instance(state="cold", rates=rates(e_there_s))),
    )
    steps, _ = plan(snapshot, *(waits(f"{n}", waited_s=1.0) for n in range(1, 10)))
    sent = [int(k) for k, step in steps.items() if isinstance(step, Attempt)]
    assert sent == [kth], name


# -- guard and hysteresis ------------------------------------------------------------------------------------


GUARDED: dict[str, tuple[NodeView, str | None]] = {
    "room": (node("a", instance(state="cold"), instance("x", running=1), max_loaded=2), None),
    "an idle one must go": (node("a", instance(state="cold"), instance("x"), max_loaded=1), None),
    "a busy one must go": (
        node("a", instance(state="cold"), instance("x", running=1), max_loaded=1),
        Blocked.NEEDS_BUSY_EVICTED,
    ),
    "a busy one must go, by memory": (
        node(
            "a",
            instance(state="cold"),
            instance("x", running=1),
            gpu_total_bytes=8 * GB,
            gpu_used_bytes=6 * GB,
        ),
        Blocked.NEEDS_BUSY_EVICTED,
    ),
    "the node loads another": (
        node("a", instance(state="cold"), instance("x", "loading", loading_since_s=NOW)),
        Blocked.NODE_LOADS_OTHER,
    ),
    "hot while the node loads another": (
        node("a", instance(), instance("x", "loading", loading_since_s=NOW)),
        None,
    ),
    "loading for somebody else": (
        node("a", instance(state="loading", slots=4, running=1, loading_since_s=NOW)),
        Blocked.NO_FREE_SLOT,
    ),
    "loading for nobody": (node("a", instance(state="loading", slots=4, loading_since_s=NOW)), None),
    "a slot settles": (node("a", instance(settling_until_s=(NOW + 1,))), Blocked.NO_FREE_SLOT),
}


@pytest.mark.parametrize("name", GUARDED)
def test_the_guard_keeps_loads_from_doing_harm(name: str) -> None:
    view, blocked = GUARDED[name]
    step = next_step(ask(), fleet(view), NEW, DEFAULT_POLICY, NOW)
    assert (step.blocked if isinstance(step, Wait) else None) == blocked


def test_more_context_is_not_asked_of_a_busy_model() -> None:
    """On Ollama it would unload and load it again, and starve meanwhile."""
    view = node("a", instance(running=1, slots=4, context_tokens=4096))
    wide = next_step(ask(wanted_context_tokens=8192), fleet(view), NEW, DEFAULT_POLICY, NOW)
    assert isinstance(wide, Wait)
    assert wide.blocked == Blocked.NEEDS_BUSY_EVICTED
    assert isinstance(next_step(ask(), fleet(view), NEW, DEFAULT_POLICY, NOW), Attempt)


@pytest.mark.parametrize(("waited_s", "kind"), [(0.0, "Wait"), (9.9, "Wait"), (10.0, "Attempt")])
def test_what_others_wait_for_is_not_evicted_before_the_newcomer_waited_10_s(
    waited_s: float, kind: str
) -> None:
    """x is idle but claimed: its own request waits because of a mark on another node."""
    view = node("a", instance(state="cold"), instance("x"), max_loaded=1)
    step = next_step(ask(), fleet(view, waiting={"x": 1}), History(waited_s=waited_s), DEFAULT_POLICY, NOW)
    assert type(step).__name__ == kind


def test_what_a_load_pushes_out_is_not_hot_any_more_for_the_rest_of_the_plan() -> None:
    view = node("a", instance(state="cold"), instance("x"), max_loaded=1)
    steps, _ = plan(
        fleet(view), waits("1", "m", deadline_s=NOW + 1, waited_s=11.0), waits("2", "x", deadline_s=NOW + 2)
    )
    assert kinds(steps) == {"1": "Attempt", "2": "Wait"}
    assert steps["1"].evicts == ("x",)  # type: ignore[union-attr]


def test_what_a_load_pushes_out_is_not_hot_any_more_though_its_row_was_kept() -> None:
    """x on b takes 14.5 s: longer than on a beside m (12.1 s), not than on a after two loads (22.1 s)."""
    a = node("a", instance(state="cold"), instance("x"), max_loaded=1)
    b = node("b", instance("x", running=1, rates=RATES._replace(step_s=0.043)))
    snapshot, table = fleet(a, b), CostTable()
    assert isinstance(next_step(ask("x"), snapshot, NEW, DEFAULT_POLICY, NOW, table=table), Attempt)
    waiting = waits("1", "m", deadline_s=NOW + 1, waited_s=11.0), waits("2", "x", deadline_s=NOW + 2)
    steps = dict(plan_queue(waiting, snapshot, DEFAULT_POLICY, NOW, table=table)[0])
    assert kinds(steps) == {"1": "Attempt", "2": "Wait"}
    assert steps["2"].node_id == "b"  # type: ignore[union-attr]


# -- drain ---------------------------------------------------------------------------------------------------


BUSY_X = node("a", instance(state="cold"), instance("x", running=1, slots=2), max_loaded=1)


def starved(waited_s: float = 120.0, **fields: object) -> Waiting:
    return waits("old", "m", waited_s=waited_s, **fields)


@pytest.mark.parametrize(
    ("waited_s", "last_sent_ago_s", "drains"),
    [(120.0, None, True), (119.0, None, False), (120.0, 120.0, True), (200.0, 119.0, False)],
)
def test_a_drain_starts_after_120_s_without_any_request_sent(
    waited_s: float, last_sent_ago_s: float | None, drains: bool
) -> None:
    sent = {} if last_sent_ago_s is None else {"m": NOW - last_sent_ago_s}
    _, after = plan(fleet(BUSY_X, last_sent_s=sent), starved(waited_s))
    assert after == ({"a": Drain("m", "m", frozenset({"x"}), NOW, 8.0)} if drains else {})


def test_a_drain_needs_a_busy_model_in_the_way() -> None:
    full = fleet(node("a", instance(running=1)))
    assert plan(full, starved())[1] == {}


def test_the_smallest_set_is_drained_idle_ones_and_the_soonest_empty_first() -> None:
    view = node(
        "a",
        instance(state="cold"),
        instance("idle"),
        instance("soon", running=(run(2.0, 1.0),)),
        instance("late", running=1),
        max_loaded=2,
    )
    _, after = plan(fleet(view), starved())
    assert after["a"].keys == {"idle", "soon"}


DRAIN: DrainState = {"a": Drain("m", "m", frozenset({"x"}), NOW - 1, 8.0)}


def test_a_drained_model_is_not_sent_to_though_it_has_a_free_slot() -> None:
    steps, after = plan(fleet(BUSY_X), starved(), waits("1", "x", deadline_s=NOW), drains=DRAIN)
    assert kinds(steps) == {"old": "Wait", "1": "Wait"}
    assert steps["1"].blocked == Blocked.DRAINED  # type: ignore[union-attr]
    assert after == DRAIN


def test_arrivals_see_a_drain_too() -> None:
    step = next_step(ask("x"), fleet(BUSY_X), NEW, DEFAULT_POLICY, NOW, Claims(drains=DRAIN))
    assert isinstance(step, Wait)
    assert step.blocked == Blocked.DRAINED


def test_nothing_else_is_loaded_where_a_drain_makes_room() -> None:
    view = node("a", instance(state="cold"), instance("x", running=1), instance("y", "cold"), max_loaded=2)
    steps, _ = plan(fleet(view), starved(claim=("a", "m")), waits("1", "y", deadline_s=NOW), drains=DRAIN)
    assert steps["1"].blocked == Blocked.DRAINED  # type: ignore[union-attr]


def test_others_go_elsewhere_when_a_drain_makes_them_wait_too_long() -> None:
    """x on a: 3.6 s to its end, 8 s for the load of m. On b x is cold, which takes 8 s."""
    elsewhere = node("b", instance("x", "cold"))
    steps, _ = plan(fleet(BUSY_X, elsewhere), starved(), waits("1", "x"), drains=DRAIN)
    assert steps["1"].node_id == "b"  # type: ignore[union-attr]


def test_the_newcomer_is_sent_once_the_drained_ones_are_idle_and_the_drain_ends() -> None:
    view = node("a", instance(state="cold"), instance("x"), max_loaded=1)
    steps, after = plan(fleet(view), starved(), waits("1", "x", deadline_s=NOW), drains=DRAIN)
    assert kinds(steps) == {"old": "Attempt", "1": "Wait"}
    assert after == {}


@pytest.mark.parametrize(
    ("snapshot", "waiting"),
    [
        (fleet(BUSY_X), waits("1", "x", claim=("a", "x"))),  # nobody waits for m any more
        (fleet(BUSY_X, last_sent_s={"m": NOW}), starved()),  # m was sent elsewhere
        (fleet(node("a", instance(state="cold"), status="offline")), starved()),
        (fleet(), starved()),
    ],
)
def test_a_drain_ends_when_it_is_not_needed(snapshot: FleetSnapshot, waiting: Waiting) -> None:
    assert plan(snapshot, waiting, drains=DRAIN)[1] == {}


def test_one_drain_a_node() -> None:
    view = node("a", instance(state="cold"), instance("n", "cold"), instance("x", running=1), max_loaded=1)
    _, after = plan(fleet(view), starved(), waits("2", "n", waited_s=130.0))
    assert len(after) == 1


def test_a_drain_that_made_no_room_is_chosen_anew() -> None:
    """x is idle now, but y runs: memory shrank, so m needs both gone."""
    view = node("a", instance(state="cold"), instance("x"), instance("y", running=1), max_loaded=1)
    _, after = plan(fleet(view), starved(), drains=DRAIN)
    assert after["a"] == Drain("m", "m", frozenset({"x", "y"}), NOW - 1, 8.0)


def test_a_drain_is_not_taken_over_by_another_starving_model() -> None:
    view = node("a", instance(state="cold"), instance("n", "cold"), instance("x"), instance("y", running=1))
    shrunk = view._replace(max_loaded=1)
    first = waits("2", "n", waited_s=130.0, deadline_s=NOW)
    _, after = plan(fleet(shrunk), first, starved(), drains=DRAIN)
    assert after["a"].model == "m"


def test_hysteresis_and_drain_are_settings() -> None:
    policy = Policy(drain_after_s=5.0)
    _, after = plan_queue([starved(6.0)], fleet(BUSY_X), policy, NOW)
    assert set(after) == {"a"}
