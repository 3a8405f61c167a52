"""No model with waiting requests is left unserved beyond 120 s plus the drain time (docs/scheduling.md)."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd.fleet.snapshot import Rates
from herd.scheduling.policy import Policy
from tests.scheduling.build import RATES, instance, node
from tests.scheduling.sim import BEAT_S, Sim

pytestmark = pytest.mark.slow

PATIENT = Policy(wait_timeout_s=1e9)


def stream(model: str, every_s: float, tokens: int, until_s: float) -> list[tuple[float, str, int]]:
    return [(n * every_s, model, tokens) for n in range(int(until_s / every_s))]


def one_busy_node(policy: Policy) -> Sim:
    """`x` is asked for without end, two at a time; `m` once, after 10 s. There is room for one model."""
    view = node("a", instance("x", slots=2), instance("m", "cold"), max_loaded=1)
    arrivals = [*stream("x", 2.1, 150, 300.0), (10.0, "m", 150)]
    return Sim({"a": view}, arrivals, policy, 300.0).run()


def test_a_model_behind_an_endless_stream_is_served_once_the_drain_is_over() -> None:
    sim = one_busy_node(PATIENT)
    sent = next(x for x in sim.sent if x.model == "m")
    waited_s = sent.sent_s - sent.arrival_s
    assert 120.0 <= waited_s <= 120.0 + BEAT_S + 2 * 4.02
    first_s, drains = sim.drained[0]
    assert first_s >= 130.0
    assert drains["a"].keys == {"x"}
    assert sim.drains == {}


def test_the_stream_goes_on_after_the_drain() -> None:
    sim = one_busy_node(PATIENT)
    back = [x.sent_s for x in sim.sent if x.model == "x" and x.sent_s > sim.drained[-1][0]]
    assert back
    assert max(sim.longest_gaps_s().values()) < 160.0


def test_without_the_drain_it_would_never_be_served() -> None:
    """Shows that the fleet above really needs the rule."""
    sim = one_busy_node(Policy(wait_timeout_s=1e9, drain_after_s=1e9))
    assert not [x for x in sim.sent if x.model == "m"]


def test_a_wait_that_is_over_is_refused() -> None:
    sim = one_busy_node(Policy(wait_timeout_s=60.0))
    assert [f"q{len(sim.arrivals) - 1}"] == [
        x for x in sim.rejected if x not in {s.request_id for s in sim.sent}
    ]


def test_an_idle_fleet_serves_at_once() -> None:
    views = {name: node(name, instance("x", slots=2)) for name in "ab"}
    sim = Sim(views, stream("x", 3.0, 150, 100.0), PATIENT, 100.0).run()
    assert all(x.sent_s == x.arrival_s for x in sim.sent)
    assert {x.node_id for x in sim.sent} == {"a", "b"}


MODELS = ("m", "n", "o")
LONGEST_LOAD_S, LONGEST_STEP_S, MOST_TOKENS = 10.0, 0.08, 150


@st.composite
def sims(draw: st.DrawFn) -> Sim:
    many = draw(st.integers(2, 3))
    speed = st.builds(
        Rates,
        prefill_tokens_per_s=st.just(RATES.prefill_tokens_per_s),
        step_s=st.sampled_from((0.02, LONGEST_STEP_S)),
        load_cold_s=st.sampled_from((2.0, LONGEST_LOAD_S)),
        load_warm_s=st.just(2.0),
    )
    views = {}
    for name in "ab"[: draw(st.integers(1, 2))]:
        held = [instance(x, "cold", slots=draw(st.integers(1, 3)), rates=draw(speed)) for x in MODELS[:many]]
        views[name] = node(name, *held, max_loaded=draw(st.integers(1, 2)))
    arrivals = []
    for model in MODELS[:many]:
        every_s = draw(st.sampled_from((2.0, 5.0, 40.0, 200.0)))
        arrivals += stream(model, every_s, draw(st.integers(20, MOST_TOKENS)), 300.0)
    return Sim(views, sorted(arrivals), PATIENT, 450.0)


@settings(max_examples=20, deadline=None)
@given(sims())
def test_no_model_with_waiting_requests_is_left_unserved(sim: Sim) -> None:
    """A drain may have to wait for the one before it: a load and a request on each of the other models."""
    longest_s = 1.02 + MOST_TOKENS * LONGEST_STEP_S
    models = len({model for _, model, _ in sim.arrivals})
    bound_s = 120.0 + BEAT_S + longest_s + (models - 1) * (LONGEST_LOAD_S + longest_s + BEAT_S)
    gaps = sim.run().longest_gaps_s()
    assert not sim.rejected
    assert max(gaps.values()) <= bound_s, gaps
