"""What the figures should be, as one table, and what they are.

Ratios are taken within a round, against a peer that was measured in the same minute; the median of the rounds
counts. A goal whose peer is not installed has no verdict.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from bench.decision import Decision
from bench.memory import Memory
from bench.rounds import Round
from bench.targets import AGENT, DIRECT, ROUTER, SGLANG, TITLES, VLLM

Verdict = Literal["met", "within 1.3 ×", "missed", "not measured"]

#: A figure so close to its goal may land with the gap explained.
NEAR = 1.3
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """`figure` of `target` in `scenario`, divided by the same of `peer` if there is one, against `bound`."""

    text: str
    scenario: str
    figure: str
    bound: float
    target: str = ROUTER
    peer: str | None = None
    at_least: bool = False
    unit: str = "×"


GOALS: tuple[Goal, ...] = (
    Goal(
        text="CPU a request, short chats, 8 connections",
        scenario="short-8",
        figure="cpu_us",
        bound=0.8,
        peer=SGLANG,
    ),
    Goal(
        text="CPU a request, short chats, 8 connections",
        scenario="short-8",
        figure="cpu_us",
        bound=1.5,
        peer=SGLANG,
        target=AGENT,
    ),
    Goal(
        text="requests/s, 64 connections",
        scenario="short-64",
        figure="per_s",
        bound=1.1,
        peer=SGLANG,
        at_least=True,
    ),
    Goal(text="CPU a chunk, 500 slow streams", scenario="slow-500", figure="cpu_us", bound=0.8, peer=VLLM),
    Goal(
        text="CPU a chunk, 500 slow streams",
        scenario="slow-500",
        figure="cpu_us",
        bound=1.5,
        peer=VLLM,
        target=AGENT,
    ),
    Goal(
        text="CPU a chunk, streams without delay, 16 connections",
        scenario="stream-16",
        figure="cpu_us",
        bound=1.0,
        peer=SGLANG,
    ),
    Goal(
        text="time to first token added, 1 connection",
        scenario="stream-1",
        figure="ttft_added_ms",
        bound=0.5,
        peer=VLLM,
    ),
    Goal(text="500 slow streams end after", scenario="slow-500", figure="seconds", bound=1.05, peer=DIRECT),
    Goal(text="errors in 2,000 slow streams", scenario="slow-2000", figure="errors", bound=0, unit="errors"),
    Goal(text="CPU a chunk, 2,000 slow streams", scenario="slow-2000", figure="cpu_us", bound=0.8, peer=VLLM),
    Goal(
        text="p99 of time to first token while 2,000 connect",
        scenario="slow-2000",
        figure="ttft_ms_p99",
        bound=500,
        unit="ms",
    ),
    Goal(text="CPU of an 8 MB image request", scenario="image-8m", figure="cpu_us", bound=1.0, peer=SGLANG),
    Goal(
        text="agent hop: p50 of router + agent minus router alone, 1 connection",
        scenario="short-1",
        figure="hop_ms",
        bound=0.3,
        target=AGENT,
        unit="ms",
    ),
)
_DECISION_US = 100.0
_FRESH_MIB = 64.0
_GROWTH_MIB = 10.0


class Result(NamedTuple):
    """One goal, judged. `by_round` has what the median was taken of."""

    text: str
    target: str
    goal: str
    actual: str
    verdict: Verdict
    by_round: tuple[float, ...] = ()


def judge(
    rounds: Sequence[Round], decisions: Sequence[Decision], memory: Memory | None
) -> tuple[Result, ...]:
    """The goals of what was measured, in the order of the issue."""
    measured = {scenario for one in rounds for scenario in one}
    judged = [_judge(goal, rounds) for goal in GOALS if goal.scenario in measured]
    for decision in decisions:
        if decision.nodes == 100:
            text = "decision with its eight cards, 100 nodes, half of them free"
            judged.append(_absolute(text, decision.total_us, _DECISION_US, "µs"))
    if memory is not None:
        judged.append(_absolute("fresh PSS", memory.fresh_bytes / _MIB, _FRESH_MIB, "MB"))
        text = f"growth over {memory.requests:,} requests"
        judged.append(_absolute(text, memory.growth_bytes / _MIB, _GROWTH_MIB, "MB"))
    return tuple(judged)


def _absolute(text: str, actual: float, bound: float, unit: str) -> Result:
    return Result(
        text, TITLES[ROUTER], f"≤ {bound:g} {unit}", f"{actual:.1f} {unit}", _verdict(actual, bound)
    )


def _judge(goal: Goal, rounds: Sequence[Round]) -> Result:
    against = f" × {TITLES[goal.peer]}" if goal.peer else f" {goal.unit}"
    sign = "≥" if goal.at_least else "≤"
    wanted = f"{sign} {goal.bound:g}{against}"
    values = [value for one in rounds if (value := _value(goal, one)) is not None]
    if not values:
        return Result(goal.text, TITLES[goal.target], wanted, "–", "not measured")
    actual = statistics.median(values)
    if goal.figure == "errors":
        actual = max(values)  # one error in one round is one too many
    shown = f"{actual:.2f}{against}" if goal.unit in ("×", "ms") else f"{actual:.0f}{against}"
    verdict = _verdict(goal.bound, actual) if goal.at_least else _verdict(actual, goal.bound)
    return Result(goal.text, TITLES[goal.target], wanted, shown, verdict, tuple(values))


def _value(goal: Goal, done: Round) -> float | None:
    row = done.get(goal.scenario, {})
    own = row.get(goal.target)
    if own is None or goal.figure not in own.figures:
        return None
    if goal.peer is None:
        return own.figures[goal.figure]
    other = row.get(goal.peer)
    if other is None or other.figures.get(goal.figure, 0.0) <= 0:
        return None
    return own.figures[goal.figure] / other.figures[goal.figure]


def _verdict(actual: float, bound: float) -> Verdict:
    if actual <= bound:
        return "met"
    return "within 1.3 ×" if actual <= NEAR * bound else "missed"
