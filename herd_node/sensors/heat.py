"""How hot a machine is, in four words. Pure: a table over temperatures and their own limits.

critical   a sensor reached the limit that its own driver calls critical (the machine protects itself)
serious    it reached the temperature from which the machine slows down, or is being slowed down now
fair       less than 10 °C below that
nominal    none of these
None       nothing is known; never invented
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from herd_node.protocol.wire import HeatWord

FAIR_MARGIN_C = 10.0
#: A limit outside is a placeholder of the firmware (0, -274, 255 … are common); so is such a temperature.
PLAUSIBLE_LIMIT_C = (40.0, 126.0)
PLAUSIBLE_C = (1.0, 150.0)

#: (slows down, critical) of sensors whose drivers give no limits. AMD: its processors hold 90–95 °C by
#: slowing down. ARM boards: the Raspberry Pi's firmware slows down from 80 °C on and hard at 85 °C.
DRIVER_LIMITS_C: dict[str, tuple[float, float]] = {
    "k10temp": (90.0, 100.0),
    "zenpower": (90.0, 100.0),
    "cpu_thermal": (80.0, 90.0),
    "cpu-thermal": (80.0, 90.0),
}
DEFAULT_LIMITS_C = (85.0, 100.0)

WORST_FIRST: tuple[HeatWord, ...] = ("critical", "serious", "fair", "nominal")


class Temperature(NamedTuple):
    """One processor sensor. It slows down from `high_c` on and protects itself at `critical_c`, if given."""

    sensor: str
    celsius: float
    high_c: float | None = None
    critical_c: float | None = None


def plausible(celsius: float | None) -> bool:
    return celsius is not None and PLAUSIBLE_C[0] <= celsius <= PLAUSIBLE_C[1]


def limits_c(reading: Temperature) -> tuple[float, float]:
    """(slows down, critical): the driver's own where they make sense, else the table's."""
    known_high, known_critical = DRIVER_LIMITS_C.get(reading.sensor, DEFAULT_LIMITS_C)
    critical = reading.critical_c if _is_limit(reading.critical_c) else None
    high = reading.high_c if _is_limit(reading.high_c) else None
    if critical is None:
        critical = max(known_critical, (high or 0.0) + 5.0)
    if high is None:
        high = min(known_high, critical - 5.0)
    # Intel gives the same number twice: it slows down as it comes near
    return min(high, critical - 5.0), critical


def _is_limit(celsius: float | None) -> bool:
    return celsius is not None and PLAUSIBLE_LIMIT_C[0] <= celsius <= PLAUSIBLE_LIMIT_C[1]


def word_of(reading: Temperature) -> HeatWord:
    high, critical = limits_c(reading)
    if reading.celsius >= critical:
        return "critical"
    if reading.celsius >= high:
        return "serious"
    return "fair" if reading.celsius >= high - FAIR_MARGIN_C else "nominal"


def classify(readings: Sequence[Temperature], throttled: bool | None) -> HeatWord | None:
    """The worst word of all sensors; a processor that is being slowed down is at least serious."""
    words = {word_of(reading) for reading in readings}
    if throttled:
        words.add("serious")
    return next((word for word in WORST_FIRST if word in words), None)
