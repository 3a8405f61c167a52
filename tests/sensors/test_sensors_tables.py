"""Pressure and heat as pure tables, with properties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd_node.sensors.heat import Temperature, classify, limits_c, word_of
from herd_node.sensors.pressure import Stalls, memory_of, parse_meminfo, parse_stalls, pressure

QUIET, SOME, FULL = Stalls(0.0, 0.0), Stalls(12.0, 1.0), Stalls(40.0, 10.0)
RANK = {None: -1, "normal": 0, "nominal": 0, "warn": 1, "fair": 1, "serious": 2, "critical": 3}


@pytest.mark.parametrize(
    ("share", "stalls", "word"),
    [
        (0.50, None, "normal"),
        (0.10, None, "normal"),
        (0.0999, None, "warn"),
        (0.05, None, "warn"),
        (0.0499, None, "critical"),
        (0.0, None, "critical"),
        (0.50, FULL, "normal"),
        (0.25, FULL, "normal"),
        (0.20, FULL, "critical"),
        (0.20, SOME, "warn"),
        (0.20, QUIET, "normal"),
        (0.07, QUIET, "warn"),
        (0.07, FULL, "critical"),
        (None, FULL, "critical"),
        (None, SOME, "warn"),
        (None, QUIET, "normal"),
        (None, None, None),
    ],
)
def test_pressure(share: float | None, stalls: Stalls | None, word: str | None) -> None:
    assert pressure(share, stalls) == word


shares = st.floats(0, 1)
stalls = st.none() | st.builds(Stalls, st.floats(0, 100), st.floats(0, 100))


@given(shares, shares, stalls)
def test_more_available_memory_is_never_more_pressure(
    one: float, other: float, waiting: Stalls | None
) -> None:
    less, more = sorted((one, other))
    assert RANK[pressure(more, waiting)] <= RANK[pressure(less, waiting)]


@pytest.mark.parametrize("text", ["", "some", "some avg10", "some avg10=x", "full avg10=1", "\n\n"])
def test_stalls_that_are_not_there_are_unknown(text: str) -> None:
    assert parse_stalls(text) is None


def test_stalls_of_an_old_kernel_without_full() -> None:
    assert parse_stalls("some avg10=1.50 avg60=0 avg300=0 total=9\n") == Stalls(1.5, 0.0)


def test_meminfo_without_available_memory_says_so() -> None:
    memory = memory_of("MemTotal: 1000 kB\nMemFree: 10 kB\n", None)
    assert (memory.total_bytes, memory.available_bytes, memory.used_bytes) == (1024000, None, None)
    assert (memory.pressure, memory.swap_used_bytes) == (None, None)


@given(st.text())
def test_no_text_of_the_kernel_raises(text: str) -> None:
    parse_meminfo(text)
    memory_of(text, text)


@pytest.mark.parametrize(
    ("reading", "limits"),
    [
        (Temperature("coretemp", 50, 100, 100), (95, 100)),
        (Temperature("coretemp", 50, 80, 100), (80, 100)),
        (Temperature("coretemp", 50, None, 105), (85, 105)),
        (Temperature("k10temp", 50), (90, 100)),
        (Temperature("cpu-thermal", 50, None, 105), (80, 105)),
        (Temperature("cpu-thermal", 50), (80, 90)),
        (Temperature("unknown", 50), (85, 100)),
        (Temperature("unknown", 50, 110, None), (110, 115)),
        (Temperature("unknown", 50, 0, -274), (85, 100)),
        (Temperature("unknown", 50, 255, 255), (85, 100)),
    ],
)
def test_limits_are_the_drivers_own_where_they_make_sense(
    reading: Temperature, limits: tuple[float, float]
) -> None:
    assert limits_c(reading) == limits


@pytest.mark.parametrize(
    ("celsius", "word"),
    [
        (20, "nominal"),
        (69.9, "nominal"),
        (70, "fair"),
        (79.9, "fair"),
        (80, "serious"),
        (99.9, "serious"),
        (100, "critical"),
    ],
)
def test_words_of_one_sensor(celsius: float, word: str) -> None:
    assert word_of(Temperature("coretemp", celsius, 80, 100)) == word


@pytest.mark.parametrize(
    ("readings", "throttled", "word"),
    [
        ((), None, None),
        ((), False, None),
        ((), True, "serious"),
        ((Temperature("a", 30),), None, "nominal"),
        ((Temperature("a", 30),), True, "serious"),
        ((Temperature("a", 30), Temperature("b", 101)), False, "critical"),
        ((Temperature("a", 76), Temperature("b", 30)), None, "fair"),
    ],
)
def test_a_machine_is_as_hot_as_its_hottest_sensor(readings, throttled, word) -> None:
    assert classify(readings, throttled) == word


temperatures = st.builds(
    Temperature,
    st.sampled_from(["coretemp", "k10temp", "cpu_thermal", "x"]),
    st.floats(1, 150),
    st.none() | st.floats(-300, 300),
    st.none() | st.floats(-300, 300),
)


@given(temperatures, st.floats(0, 50))
def test_hotter_is_never_a_milder_word(reading: Temperature, more: float) -> None:
    hotter = reading._replace(celsius=reading.celsius + more)
    assert RANK[word_of(hotter)] >= RANK[word_of(reading)]


@given(temperatures)
def test_the_limits_are_in_order(reading: Temperature) -> None:
    high, critical = limits_c(reading)
    assert 35 <= high < critical
