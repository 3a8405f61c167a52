"""docs/scheduling.md §1, row by row."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp
from types import MappingProxyType
from typing import NamedTuple

import pytest

from herd.fleet.snapshot import ArrivalRate, BusyShare, FleetSnapshot, InstanceView, NodeView
from herd.request import InferenceRequest, PrefixMark
from herd.scheduling.estimate import cached_tokens, victims
from herd.scheduling.policy import DEFAULT_POLICY
from herd.scheduling.standing import cost, standing
from tests.scheduling.build import GB, NOW, ask, fleet, instance, node, run, stats
from tests.scheduling.tables import number, table


class Situation(NamedTuple):
    """`m` is the first instance of the node."""

    node: NodeView
    request: InferenceRequest = ask()
    claims: int = 0
    fleet_fields: Mapping[str, object] = MappingProxyType({})

    def fleet(self) -> FleetSnapshot:
        return fleet(self.node, **self.fleet_fields)


def at(*instances: InstanceView, **fields: object) -> NodeView:
    return node("a", *instances, **fields)


PREFIXES = (PrefixMark(b"a", 50.0), PrefixMark(b"ab", 80.0), PrefixMark(b"abc", 100.0))
ONCE_A_MINUTE = ArrivalRate(1 / 60, NOW)
LOADING = {"loading_since_s": NOW - 3}

SITUATIONS: dict[str, Situation] = {
    "hot and idle": Situation(at(instance())),
    "warm": Situation(at(instance(state="warm"))),
    "cold": Situation(at(instance(state="cold"))),
    "loading for 3 s, for nobody": Situation(at(instance(state="loading", **LOADING))),
    "loading for 3 s, for one request": Situation(at(instance(state="loading", running=1, **LOADING))),
    "loading for 3 s, for one request, 2 slots": Situation(
        at(instance(state="loading", running=1, slots=2, **LOADING))
    ),
    "1 of 2 slots taken": Situation(at(instance(running=1, slots=2))),
    "3 of 4 slots taken": Situation(at(instance(running=3, slots=4))),
    "its only slot taken": Situation(at(instance(running=1))),
    "its only slot taken, 5 s ago, no token yet": Situation(at(instance(running=(run(5.0),)))),
    "its only slot taken, first token 1 s ago": Situation(at(instance(running=(run(2.0, 1.0),)))),
    "its only slot taken, first token 2.9 s ago": Situation(at(instance(running=(run(4.0, 2.9),)))),
    "its only slot taken, 1 claim": Situation(at(instance(running=1)), claims=1),
    "1 of 2 slots taken, 1 claim": Situation(at(instance(running=1, slots=2)), claims=1),
    "its only slot settles for 2 s more": Situation(at(instance(settling_until_s=(NOW + 2,)))),
    "cold, 2 claims": Situation(at(instance(state="cold")), claims=2),
    "another model runs": Situation(at(instance(), instance("x", running=1))),
    "cold, an idle model must go, asked for once a minute": Situation(
        at(instance(state="cold"), instance("x", arrival_rate=ONCE_A_MINUTE), max_loaded=1)
    ),
    "cold, an idle model must go, waited for": Situation(
        at(instance(state="cold"), instance("x"), max_loaded=1), fleet_fields={"waiting": {"x": 1}}
    ),
    "cold, the node loads another for 3 s": Situation(
        at(instance(state="cold"), instance("x", "loading", **LOADING))
    ),
    "cold, a busy model must go": Situation(
        at(instance(state="cold"), instance("x", running=1), max_loaded=1)
    ),
    "busy share 0.5": Situation(at(instance(), busy_share=BusyShare(0.5, NOW, False))),
    "busy share 0.5, idle for 180 s since": Situation(
        at(instance(), busy_share=BusyShare(0.5, NOW - 180, False))
    ),
    "busy share 1": Situation(at(instance(), busy_share=BusyShare(1.0, NOW - 50, True))),
    "half of the machine free": Situation(at(instance(), free_share=0.5)),
    "heat serious": Situation(at(instance(), heat="serious")),
    "80 tokens cached": Situation(
        at(instance(held=((PrefixMark(b"z", 60.0),), (*PREFIXES[:2], PrefixMark(b"abx", 999.0))))),
        ask(prefixes=PREFIXES),
    ),
    "tokens corrected by 1.5": Situation(
        at(instance()), fleet_fields={"stats": {"m": stats(token_correction=1.5)}}
    ),
    "at most 50 tokens wanted": Situation(at(instance()), ask(max_tokens=50)),
    "an embedding": Situation(at(instance()), ask(path="/api/embed")),
    "loaded with a context of 128": Situation(at(instance(context_tokens=128))),
}

PARTS = {"p": "prefill", "d": "decode", "T": "total"}


@pytest.mark.parametrize("row", table("situation", "load"), ids=lambda row: row["situation"])
def test_seconds_are_those_of_the_page(row: dict[str, str]) -> None:
    situation = SITUATIONS[row["situation"]]
    held = situation.node.instances[0]
    seconds = cost(
        situation.request, "m", situation.node, held, situation.fleet(), DEFAULT_POLICY, NOW, situation.claims
    )
    expected = {PARTS.get(k, k): number(v) for k, v in row.items() if k != "situation"}
    assert {name: getattr(seconds, name) for name in expected} == pytest.approx(expected, abs=6e-4)


def test_the_page_has_a_row_for_each_situation() -> None:
    assert [row["situation"] for row in table("situation", "load")] == list(SITUATIONS)


def test_the_parts_add_up_to_the_total() -> None:
    for situation in SITUATIONS.values():
        held = situation.node.instances[0]
        seconds = cost(situation.request, "m", situation.node, held, situation.fleet(), DEFAULT_POLICY, NOW)
        assert sum(seconds[:-1]) == pytest.approx(seconds.total)
        assert min(seconds) >= 0


@pytest.mark.parametrize(
    ("memory", "idle", "busy"),
    [
        ({"max_loaded": 4}, "", ""),
        ({"max_loaded": 3}, "old", ""),
        ({"max_loaded": 2}, "old new", ""),
        ({"max_loaded": 1}, "old new", "run"),
        # Each needs 4 · 1.03 + 0.4 + 4096 · 0.00015 = 5.1344 GB.
        ({"gpu_total_bytes": 24 * GB, "gpu_used_bytes": 18 * GB}, "", ""),
        ({"gpu_total_bytes": 24 * GB, "gpu_used_bytes": 20 * GB}, "old", ""),
        ({"gpu_total_bytes": 24 * GB, "gpu_used_bytes": 24 * GB}, "old", ""),
        ({"memory_total_bytes": 30 * GB, "memory_available_bytes": 9 * GB}, "", ""),
        ({"memory_total_bytes": 30 * GB, "memory_available_bytes": 8 * GB}, "old", ""),
        ({"memory_total_bytes": 100 * GB, "memory_available_bytes": 9 * GB}, "old", ""),
        ({}, "", ""),
    ],
)
def test_idle_ones_go_first_and_the_least_recently_used_of_them(
    memory: dict[str, object], idle: str, busy: str
) -> None:
    view = at(
        instance(state="cold"),
        instance("new", last_used_s=900.0),
        instance("run", running=1, last_used_s=10.0),
        instance("old", last_used_s=100.0),
        **memory,
    )
    found = victims(view, view.instances[0], None, DEFAULT_POLICY, NOW)
    assert (" ".join(x.key for x in found.idle), " ".join(x.key for x in found.busy)) == (idle, busy)


def test_models_of_another_backend_are_no_victims() -> None:
    view = at(
        instance(state="cold"), instance("x", backend_id="llama", backend_kind="llama-server"), max_loaded=1
    )
    assert victims(view, view.instances[0], None, DEFAULT_POLICY, NOW) == ((), ())


def test_the_rest_of_a_busy_victim_is_that_of_its_last_request() -> None:
    both = (run(0.4), run(2.0, 1.0))
    view = at(instance(state="cold"), instance("x", running=both, slots=2), max_loaded=1)
    assert standing(view, view.instances[0], None, {}, DEFAULT_POLICY, NOW).blocked_s == pytest.approx(3.6)


def test_more_context_for_a_busy_model_waits_until_it_is_idle() -> None:
    view = at(instance(running=1, slots=4, context_tokens=4096))
    seconds = cost(
        ask(wanted_context_tokens=8192), "m", view, view.instances[0], fleet(view), DEFAULT_POLICY, NOW
    )
    assert (seconds.wait, seconds.context) == (pytest.approx(3.6), 2.0)


def test_a_context_that_is_large_enough_costs_nothing() -> None:
    view = at(instance(context_tokens=8192))
    seconds = cost(
        ask(wanted_context_tokens=8192), "m", view, view.instances[0], fleet(view), DEFAULT_POLICY, NOW
    )
    assert seconds.context == 0


def test_want_decays_with_the_arrival_rate() -> None:
    rate = ArrivalRate(1 / 60, NOW - 300)
    view = at(instance(state="cold"), instance("x", arrival_rate=rate), max_loaded=1)
    evict_s = standing(view, view.instances[0], None, {}, DEFAULT_POLICY, NOW).evict_s
    assert evict_s == pytest.approx(2 * (1 - exp(-exp(-1))))


def test_a_slot_that_should_have_settled_is_free() -> None:
    view = at(instance(settling_until_s=(NOW - 0.1,)))
    assert standing(view, view.instances[0], None, {}, DEFAULT_POLICY, NOW).own == 0


def test_more_requests_than_slots_wait_for_the_first_that_really_frees_one() -> None:
    """Slots can shrink under a running instance: with 2 running in 1 slot, the later end counts."""
    view = at(instance(running=(run(2.0, 1.0), run(0.4))))
    seconds = cost(ask(), "m", view, view.instances[0], fleet(view), DEFAULT_POLICY, NOW)
    assert seconds.wait == pytest.approx(3.6)


@pytest.mark.parametrize(
    ("held", "tokens"),
    [
        ((), 0.0),
        ((PREFIXES,), 100.0),
        ((PREFIXES[:1],), 50.0),
        (((*PREFIXES, PrefixMark(b"more", 300.0)),), 100.0),
        ((PREFIXES[:1], PREFIXES[:2]), 80.0),
        (((PrefixMark(b"x", 50.0), PrefixMark(b"xb", 80.0)),), 0.0),
    ],
)
def test_cached_is_the_longest_common_prefix(held: tuple[tuple[PrefixMark, ...], ...], tokens: float) -> None:
    assert cached_tokens(ask(prefixes=PREFIXES), instance(held=held)) == tokens


def test_nothing_is_cached_where_the_model_is_not_loaded() -> None:
    assert cached_tokens(ask(prefixes=PREFIXES), instance(state="warm", held=(PREFIXES,))) == 0.0


def test_cached_is_never_more_than_the_prompt() -> None:
    assert cached_tokens(ask(tokens=70.0, prefixes=PREFIXES), instance(held=(PREFIXES,))) == 70.0
