"""docs/scheduling.md §2: the ten nodes of the page, and the ranges."""

from __future__ import annotations

import pytest

from herd.fleet.snapshot import BusyShare, NodeView
from herd.scheduling import signals
from herd.scheduling.eligibility import Needs
from herd.scheduling.estimate import ask_of
from herd.scheduling.policy import DEFAULT_POLICY, Policy
from herd.scheduling.rows import CostTable
from herd.scheduling.score import NO_CLAIMS, Moment, cards, rank
from herd.scheduling.standing import Cost
from herd.trace import SIGNALS, ScoreCard
from tests.scheduling.build import NOW, RATES, ask, candidate_cost, fleet, instance, node
from tests.scheduling.tables import number, table

NODES: tuple[NodeView, ...] = (
    node("hot", instance()),
    node("warm", instance(state="warm")),
    node("cold", instance(state="cold")),
    node("evicts", instance(state="cold"), instance("x"), max_loaded=1),
    node("shares", instance(running=1, slots=2)),
    node("full", instance(running=1)),
    node("slow", instance(rates=RATES._replace(step_s=0.04))),
    node("wanted", instance(), busy_share=BusyShare(0.5, NOW, False)),
    node("narrow", instance(context_tokens=128)),
    node("late", instance(), status="degraded"),
)


@pytest.mark.parametrize("row", table("node", "T"), ids=lambda row: row["node"])
def test_signals_are_those_of_the_page(row: dict[str, str]) -> None:
    view = next(x for x in NODES if x.node_id == row["node"])
    others = (node("hot", instance()),) if view.node_id != "hot" else ()
    snapshot = fleet(view, *others, waiting={"x": 1})
    moment = Moment(snapshot, DEFAULT_POLICY, NOW, NO_CLAIMS, CostTable())
    request = ask()
    asked = ask_of(request, "m", snapshot, DEFAULT_POLICY)
    ranking = rank(Needs("m", request.needs, None), asked, frozenset(), moment)
    candidate = next(x for x in ranking.candidates if x.node_id == view.node_id)
    cost = candidate_cost(candidate, asked, ranking)
    made = [ScoreCard(*x) for x in cards(ranking, asked, DEFAULT_POLICY, NOW)]
    card = next(x for x in made if x.node_id == view.node_id)
    expected = {name: number(row[name]) for name in SIGNALS}
    assert dict(zip(SIGNALS, card.by_signal, strict=True)) == pytest.approx(expected, abs=6e-3)
    assert card.total == pytest.approx(number(row["total"]), abs=6e-3)
    assert cost.total == pytest.approx(number(row["T"]), abs=6e-3)
    assert candidate.total_s == pytest.approx(cost.total)


def test_the_page_names_the_signals_and_their_ranges() -> None:
    rows = table("signal", "value")
    assert tuple(row["signal"] for row in rows) == SIGNALS
    for row, signal in zip(rows, signals.RANGES, strict=True):
        low, high = row["range"].split(" … ")
        assert (number(low), number(high)) == (signal.best - signal.span, signal.best)


def test_ideal_is_110() -> None:
    nothing = Cost(*[0.0] * 10)
    assert sum(signals.by_signal(nothing[:8], 1.0, 0.0, DEFAULT_POLICY)) == 110 == signals.IDEAL


def test_a_signal_loses_its_whole_span_and_no_more() -> None:
    huge = Cost(*[1e9] * 10)
    values = signals.by_signal(huge[:8], 0.05, 0.0, DEFAULT_POLICY)
    assert values == tuple(signal.best - signal.span for signal in signals.RANGES)


def test_a_request_of_no_time_at_all_has_a_unit() -> None:
    assert signals.unit_s(0.0) == 0.05


def test_points_change_the_scale_and_nothing_else() -> None:
    cost = Cost(0.0, 0.0, 0.0, 1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 3.0)
    assert signals.by_signal(cost[:8], 3.0, 2.0, Policy(points=6.0))[3] == -2.0


@pytest.mark.parametrize("points", [0.0, -1.0, 15.1])
def test_points_out_of_range_are_refused(points: float) -> None:
    with pytest.raises(ValueError, match="points"):
        Policy(points=points)


def test_the_page_names_the_defaults() -> None:
    for row in table("setting", "default"):
        assert getattr(DEFAULT_POLICY, row["setting"]) == number(row["default"]), row["setting"]
