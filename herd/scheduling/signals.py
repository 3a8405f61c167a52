"""Seconds as seven numbers that a person can read (docs/scheduling.md §2). Each loses its share of the same
scale: `points` points are the time that the best choice needs in total.
"""

from __future__ import annotations

from typing import NamedTuple

from herd.scheduling.policy import Policy
from herd.scheduling.standing import Parts

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


def by_signal(parts: Parts, unit: float, fastest_decode_s: float, policy: Policy) -> tuple[float, ...]:
    """The seven values. `unit` is U, `fastest_decode_s` the least d over all eligible nodes.

    RANGES in longhand, since it is made for eight nodes a request; a test holds the two together.
    """
    scale = policy.points / unit
    load, evict, queue, wait, prefill, decode, price, context = parts
    thermal = scale * load
    memory_fit = scale * evict
    queue_depth = scale * queue
    wait_time = scale * (wait + prefill)
    role_affinity = scale * (decode - fastest_decode_s)
    trend = scale * price
    context_fit = scale * context
    return (
        50.0 - thermal if thermal < 50.0 else 0.0,
        20.0 - memory_fit if memory_fit < 20.0 else 0.0,
        0.0 - queue_depth if queue_depth < 30.0 else -30.0,
        0.0 - wait_time if wait_time < 25.0 else -25.0,
        15.0 if role_affinity < 0.0 else 15.0 - role_affinity if role_affinity < 15.0 else 0.0,
        10.0 - trend if trend < 10.0 else 0.0,
        15.0 - context_fit if context_fit < 30.0 else -15.0,
    )


def total(values: tuple[float, ...], is_degraded: bool, policy: Policy) -> float:
    return sum(values) - (policy.degraded_points if is_degraded else 0.0)
