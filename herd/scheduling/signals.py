"""Seconds as seven numbers that a person can read (docs/scheduling.md §2). Each loses its share of the same
scale: `points` points are the time that the best choice needs in total.
"""

from __future__ import annotations

from typing import NamedTuple

from herd.scheduling.estimate import Cost
from herd.scheduling.policy import Policy

MIN_UNIT_S = 0.05


class Signal(NamedTuple):
    """A signal starts from `best` and can lose `span`."""

    best: float
    span: float


#: In the order of `herd.trace.SIGNALS`.
RANGES: tuple[Signal, ...] = (
    Signal(50.0, 50.0),  # thermal
    Signal(20.0, 20.0),  # memory_fit
    Signal(0.0, 30.0),  # queue_depth
    Signal(0.0, 25.0),  # wait_time
    Signal(15.0, 15.0),  # role_affinity
    Signal(10.0, 10.0),  # availability_trend
    Signal(15.0, 30.0),  # context_fit
)
IDEAL = sum(signal.best for signal in RANGES)


def unit_s(totals_min_s: float) -> float:
    """U: what the best choice needs in total."""
    return max(MIN_UNIT_S, totals_min_s)


def degraded_s(unit: float, policy: Policy) -> float:
    """What a late beat costs, so that it loses `degraded_points`."""
    return policy.degraded_points * unit / policy.points


def shares(cost: Cost, fastest_decode_s: float) -> tuple[float, ...]:
    """The seconds that each signal accounts for, in the order of SIGNALS."""
    return (
        cost.load,
        cost.evict,
        cost.queue,
        cost.wait + cost.prefill,
        max(0.0, cost.decode - fastest_decode_s),
        cost.price,
        cost.context,
    )


def by_signal(cost: Cost, unit: float, fastest_decode_s: float, policy: Policy) -> tuple[float, ...]:
    """The seven values. `unit` is U, `fastest_decode_s` the least d over all eligible nodes."""
    scale = policy.points / unit
    return tuple(
        [
            signal.best - min(scale * seconds, signal.span)
            for signal, seconds in zip(RANGES, shares(cost, fastest_decode_s), strict=True)
        ]
    )


def total(values: tuple[float, ...], is_degraded: bool, policy: Policy) -> float:
    return sum(values) - (policy.degraded_points if is_degraded else 0.0)
