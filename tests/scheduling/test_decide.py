"""docs/scheduling.md §3, one request: DESIGN's hold, 400, 404 and wait told apart, row by row."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from herd.fleet.snapshot import FleetSnapshot
from herd.request import InferenceRequest, PrefixMark
from herd.scheduling.plan import (
    NEW,
    Attempt,
    Blocked,
    Claims,
    History,
    Hold,
    Reject,
    Step,
    Wait,
    next_step,
)
from herd.scheduling.policy import DEFAULT_POLICY
from herd.trace import Exclusion
from tests.scheduling.build import GB, NOW, ask, fleet, instance, node
from tests.scheduling.tables import table

OTHER = node("other", instance("x"))
OFFLINE = node("a", instance(), status="offline", last_beat_s=NOW - 100)
BUSY = node("a", instance(running=1))
FREE_N = node("b", instance("n"))
MN = ask("m", "n")
TOOLS = ask(needs=frozenset({"completion", "tools"}))
WAITED = History(waited_s=300.0)
HELD = History(held_s=30.0)
FAILED = History(tried=frozenset({"a"}), attempts=1)
LARGE = instance(state="cold", size_bytes=80 * GB)
NARROW = instance(context_fixed=True, context_tokens=50)
BLIND = node("c", instance("n", capabilities=frozenset({"embedding"})))


ONLY_A = ask(only="a")
GONE_A = {"m": frozenset({"a"})}


class Situation(NamedTuple):
    fleet: FleetSnapshot
    request: InferenceRequest = ask()
    history: History = NEW


SITUATIONS: dict[str, Situation] = {
    "the holder is online and idle": Situation(fleet(node("a", instance()))),
    "the holder is busy": Situation(fleet(BUSY)),
    "the holder is busy, waited 300 s": Situation(fleet(BUSY), ask(), WAITED),
    "the holder is busy, waited 300 s, the next model is free": Situation(fleet(BUSY, FREE_N), MN, WAITED),
    "the holder is busy, waited 300 s, the next model is busy too": Situation(
        fleet(BUSY, node("b", instance("n", running=1))), MN, WAITED
    ),
    "the holder is offline": Situation(fleet(OFFLINE, OTHER)),
    "the holder is offline, the next model is free": Situation(fleet(OFFLINE, FREE_N), MN),
    "the holder is offline, held 30 s": Situation(fleet(OFFLINE, OTHER), ask(), HELD),
    "the holder was known before a restart": Situation(fleet(OTHER, remembered={"m": frozenset({"old"})})),
    "the holder is draining": Situation(fleet(node("a", instance(), status="draining"), OTHER)),
    "the holder's backend is not ready": Situation(
        fleet(node("a", instance(), backends_ready={"ollama-11434": False}))
    ),
    "the holder said busy": Situation(fleet(node("a", instance(busy_until_s=NOW + 1)))),
    "the holder's breaker is open": Situation(fleet(node("a", instance(), breaker_open_until_s=NOW + 9))),
    "the holder is short of memory": Situation(
        fleet(node("a", instance(state="cold"), gpu_total_bytes=8 * GB, gpu_used_bytes=8 * GB))
    ),
    "the holder is too hot": Situation(fleet(node("a", instance(), heat="critical"))),
    "the holder is paused": Situation(fleet(node("a", instance(), paused=True))),
    "one holder can never, another is offline": Situation(
        fleet(OFFLINE, node("b", LARGE, gpu_total_bytes=8 * GB))
    ),
    "the model lacks a capability": Situation(fleet(node("a", instance())), TOOLS),
    "the fixed context is too small": Situation(fleet(node("a", NARROW))),
    "the weights are larger than the machine": Situation(fleet(node("a", LARGE, gpu_total_bytes=8 * GB))),
    "the only holder is offline and lacks a capability": Situation(fleet(OFFLINE, OTHER), TOOLS),
    "nobody lists the model": Situation(fleet(OTHER)),
    "nobody lists any model of the chain": Situation(fleet(OTHER), MN),
    "nobody lists the first, the second can never": Situation(fleet(OTHER, BLIND), MN),
    "nobody lists the first, the second is offline": Situation(fleet(OFFLINE, OTHER), ask("z", "m")),
    "nobody lists the first, the second is free": Situation(fleet(OTHER, FREE_N), MN),
    "no node is online, nobody lists the model": Situation(fleet(OFFLINE), ask("z")),
    "no node is online, nobody lists the model, held 30 s": Situation(fleet(OFFLINE), ask("z"), HELD),
    "there is no node at all": Situation(fleet()),
    "pinned to a node that is idle, a better one is there": Situation(
        fleet(node("a", instance(state="cold")), node("b", instance())), ONLY_A
    ),
    "pinned to a node that is busy, another is idle": Situation(fleet(BUSY, node("b", instance())), ONLY_A),
    "pinned to a node that is offline, another is idle": Situation(
        fleet(OFFLINE, node("b", instance())), ONLY_A
    ),
    "pinned to a node that is offline, held 30 s": Situation(
        fleet(OFFLINE, node("b", instance())), ONLY_A, HELD
    ),
    "pinned to a node without the model": Situation(fleet(node("a"), node("b", instance())), ONLY_A),
    "pinned to a node without the model, no node is online": Situation(
        fleet(node("a", status="offline"), node("b", instance(), status="offline")), ONLY_A
    ),
    "pinned to a node with the next model only": Situation(
        fleet(node("a", instance("n")), node("b", instance())), MN._replace(only="a")
    ),
    "pinned to a node that nobody knows": Situation(fleet(node("b", instance())), ONLY_A),
    "pinned to a node that had the model before a restart": Situation(
        fleet(node("b", instance()), remembered=GONE_A), ONLY_A
    ),
    "pinned to a node that lacks a capability, another has it": Situation(
        fleet(node("a", instance()), node("b", instance(capabilities=TOOLS.needs))), TOOLS._replace(only="a")
    ),
    "pinned to a node that failed, another is idle": Situation(
        fleet(node("a", instance()), node("b", instance())), ONLY_A, FAILED
    ),
    "the only holder failed for this request": Situation(fleet(node("a", instance())), ask(), FAILED),
    "the only holder failed and is gone": Situation(fleet(OTHER), ask(), FAILED),
    "one holder failed, another is free": Situation(
        fleet(node("a", instance()), node("b", instance())), ask(), FAILED
    ),
    "one holder failed, another is offline": Situation(
        fleet(node("a", instance()), node("b", instance(), status="offline")), ask(), FAILED
    ),
    "one holder failed, another is offline, held 30 s": Situation(
        fleet(node("a", instance()), node("b", instance(), status="offline")),
        ask(),
        FAILED._replace(held_s=30.0),
    ),
    "the only holder failed, the next model is free": Situation(
        fleet(node("a", instance()), FREE_N), MN, FAILED
    ),
    "three attempts failed": Situation(
        fleet(node("d", instance())), ask(), History(tried=frozenset("abc"), attempts=3)
    ),
}


def answer(step: Step, request: InferenceRequest) -> str:
    match step:
        case Attempt(model_index=place):
            assert step.model == request.chain[place]
            return "attempt next" if place else "attempt"
        case Wait():
            return "wait"
        case Hold():
            return "hold"
        case Reject(status=None):
            return "last failure"
        case Reject(status=status):
            return str(status)
        case _:
            raise AssertionError(step)


@pytest.mark.parametrize("row", table("situation", "answer"), ids=lambda row: row["situation"])
def test_the_answer_is_that_of_the_page(row: dict[str, str]) -> None:
    situation = SITUATIONS[row["situation"]]
    step = next_step(situation.request, situation.fleet, situation.history, DEFAULT_POLICY, NOW)
    assert answer(step, situation.request) == row["answer"]


def test_the_page_has_a_row_for_each_situation() -> None:
    assert [row["situation"] for row in table("situation", "answer")] == list(SITUATIONS)


def decide(name: str) -> Step:
    situation = SITUATIONS[name]
    return next_step(situation.request, situation.fleet, situation.history, DEFAULT_POLICY, NOW)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody lists the model", "model 'm' not found: no node of the fleet has it"),
        (
            "nobody lists any model of the chain",
            "models 'm', 'n' not found: no node of the fleet has any of them",
        ),
        (
            "the model lacks a capability",
            "model 'm' can not serve this request: it does not support tools",
        ),
        (
            "nobody lists the first, the second can never",
            "model 'n' can not serve this request: it does not support completion",
        ),
        ("the holder is busy, waited 300 s", "every node that could serve model 'm' stayed busy for 300 s"),
        ("the holder is offline, held 30 s", "nobody could take model 'm' within 30 s: the node is offline"),
        ("the holder is offline", "model 'm' can not be served now: the node is offline"),
        ("there is no node at all", "model 'm' can not be served now: no node is online"),
        ("pinned to a node without the model", "node 'a' does not have model 'm'"),
        ("pinned to a node that nobody knows", "node 'a' is not known"),
        (
            "pinned to a node that lacks a capability, another has it",
            "model 'm' can not serve this request: it does not support tools",
        ),
    ],
)
def test_the_message_names_model_and_reason(name: str, message: str) -> None:
    step = decide(name)
    assert isinstance(step, Hold | Reject)
    assert step.message == message


def test_names_stand_in_messages_as_the_caller_wrote_them() -> None:
    request = ask("m")._replace(asked=("library/M:latest",))
    step = next_step(request, fleet(OTHER), NEW, DEFAULT_POLICY, NOW)
    assert isinstance(step, Reject)
    assert "'library/M:latest'" in step.message


@pytest.mark.parametrize(
    ("history", "budget_s"), [(NEW, 300.0), (History(waited_s=299.0), 1.0), (History(held_s=29.0), 300.0)]
)
def test_a_wait_says_how_much_longer_it_may_take(history: History, budget_s: float) -> None:
    step = next_step(ask(), fleet(BUSY), history, DEFAULT_POLICY, NOW)
    assert isinstance(step, Wait)
    assert (step.budget_s, step.node_id, step.instance_key, step.blocked) == (
        budget_s,
        "a",
        "m",
        "no_free_slot",
    )


def test_a_hold_says_how_much_longer_it_may_take() -> None:
    step = next_step(ask(), fleet(OFFLINE, OTHER), History(held_s=12.0, waited_s=99.0), DEFAULT_POLICY, NOW)
    assert isinstance(step, Hold)
    assert (step.budget_s, step.reason) == (18.0, "offline")


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("the holder is busy, waited 300 s", 4),  # 3.6 s until the slot is free
        ("the holder is offline, held 30 s", 5),  # nobody knows
    ],
)
def test_retry_after_is_the_shortest_queue(name: str, seconds: int) -> None:
    step = decide(name)
    assert isinstance(step, Reject)
    assert step.retry_after_s == seconds


def test_retry_after_is_the_first_mark_that_ends() -> None:
    marked = fleet(node("a", instance(busy_until_s=NOW + 1.5)), node("b", instance(busy_until_s=NOW + 100)))
    step = next_step(ask(), marked, HELD, DEFAULT_POLICY, NOW)
    assert isinstance(step, Reject)
    assert (step.status, step.retry_after_s) == (503, 2)


def test_retry_after_is_a_minute_at_most() -> None:
    busy = tuple([instance(running=1).running[0]._replace(out_tokens=1e6)])
    step = next_step(ask(), fleet(node("a", instance(running=busy))), WAITED, DEFAULT_POLICY, NOW)
    assert isinstance(step, Reject)
    assert step.retry_after_s == 60


def test_an_earlier_model_that_was_given_up_is_not_tried_again() -> None:
    step = next_step(MN, fleet(node("a", instance()), FREE_N), History(model_index=1), DEFAULT_POLICY, NOW)
    assert isinstance(step, Attempt)
    assert (step.model, step.model_index, step.node_id) == ("n", 1, "b")


def test_the_first_model_is_used_cold_rather_than_the_second_hot() -> None:
    step = next_step(MN, fleet(node("a", instance(state="cold")), FREE_N), NEW, DEFAULT_POLICY, NOW)
    assert isinstance(step, Attempt)
    assert step.model == "m"


def test_whoever_waited_too_long_still_gets_a_slot_that_is_free() -> None:
    step = next_step(ask(), fleet(node("a", instance())), WAITED, DEFAULT_POLICY, NOW)
    assert isinstance(step, Attempt)


def test_an_attempt_carries_what_the_shell_must_know() -> None:
    nodes = [node(f"n{n:02}", instance(slots=2, running=n % 2)) for n in range(20)]
    out = node("off", instance(), status="offline", last_beat_s=0.0)
    step = next_step(ask(), fleet(*nodes, out, OTHER), NEW, DEFAULT_POLICY, NOW)
    assert isinstance(step, Attempt)
    assert (step.node_id, step.instance_key, step.model) == ("n00", "m", "m")
    assert (step.est_tokens, step.prefill_s, step.out_tokens) == (100.0, 1.02, 150.0)
    assert len(step.candidates) == 8
    assert step.candidates[0] == step.card
    assert step.excluded == (Exclusion("off", "offline"), Exclusion("other", "model_absent"))


def test_at_most_64_exclusions_are_kept_and_holders_come_first() -> None:
    absent = [node(f"a{n:03}") for n in range(99)]
    step = next_step(
        ask(),
        fleet(*absent, node("z", instance(), paused=True), node("y", instance())),
        NEW,
        DEFAULT_POLICY,
        NOW,
    )
    assert isinstance(step, Attempt)
    assert len(step.excluded) == 64
    assert step.excluded[0] == ("z", "paused")


def test_a_remembered_holder_counts_as_offline_until_it_is_heard() -> None:
    step = next_step(ask(), fleet(OTHER, remembered={"m": frozenset({"old"})}), NEW, DEFAULT_POLICY, NOW)
    assert isinstance(step, Hold)
    assert Exclusion("old", "offline") in step.excluded
    heard = fleet(OTHER, remembered={"m": frozenset({"other"})})
    assert isinstance(next_step(ask(), heard, NEW, DEFAULT_POLICY, NOW), Reject)


def test_a_claim_of_somebody_earlier_is_respected() -> None:
    free = fleet(node("a", instance()))
    step = next_step(ask(), free, NEW, DEFAULT_POLICY, NOW, Claims({("a", "m"): 1}))
    assert isinstance(step, Wait)
    assert step.blocked == Blocked.CLAIMED


def test_ties_go_to_the_least_recently_chosen_then_to_the_id() -> None:
    def chosen(*nodes) -> str:
        step = next_step(ask(), fleet(*nodes), NEW, DEFAULT_POLICY, NOW)
        assert isinstance(step, Attempt)
        return step.node_id

    assert chosen(node("b", instance()), node("a", instance())) == "a"
    late, early = node("a", instance(), last_chosen_s=9.0), node("b", instance(), last_chosen_s=8.0)
    assert chosen(late, early) == "b"


def test_a_late_beat_loses_ten_points_and_keeps_its_signals() -> None:
    late = node("late", instance(), status="degraded")
    step = next_step(ask(), fleet(late), NEW, DEFAULT_POLICY, NOW)
    assert isinstance(step, Attempt)
    assert step.card.total == pytest.approx(sum(step.card.by_signal) - 10)


def test_a_shared_prefix_draws_a_chat_back_to_its_node() -> None:
    marks = (PrefixMark(b"1", 60.0), PrefixMark(b"2", 90.0))
    fast = instance(rates=instance().rates._replace(step_s=0.018))
    nodes = node("a", instance(held=(marks[:1],))), node("b", fast)
    plain = next_step(ask(), fleet(*nodes), NEW, DEFAULT_POLICY, NOW)
    chat = next_step(ask(prefixes=marks), fleet(*nodes), NEW, DEFAULT_POLICY, NOW)
    assert isinstance(plain, Attempt)
    assert isinstance(chat, Attempt)
    # b decodes 0.3 s faster; a saves 0.6 s of prefill.
    assert (plain.node_id, chat.node_id) == ("b", "a")
