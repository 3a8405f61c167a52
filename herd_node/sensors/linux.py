"""Linux's own readings: /proc and /sys under a root that tests replace. Read anew each time.

A file that is missing, unreadable or full of nonsense is an unknown value, no error: drivers come and go.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from herd_node.protocol.wire import Heat, Memory
from herd_node.sensors.heat import Temperature, classify, plausible
from herd_node.sensors.pressure import memory_of

#: hwmon drivers that measure the processor.
CPU_DRIVERS = frozenset({"coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal"})
#: Thermal zones of the processor; `acpitz` (often a fixed number) only where nothing else speaks.
CPU_ZONE = re.compile(r"cpu|soc|pkg|package|core|cluster", re.IGNORECASE)
LAST_RESORT_ZONE = "acpitz"
#: The sensor that stands for all the cores of a package; where it is, the cores need not be read.
PACKAGE_LABEL = re.compile(r"Package id|Tctl|Tdie", re.IGNORECASE)
#: A critical trip point switches the machine off; it is in danger a little earlier.
SHUTDOWN_MARGIN_C = 5.0
#: Trip points below it are switched off (0, -274) or control a fan.
FAR_TOO_COLD_C = 45.0

_NUMBER = re.compile(r"\d+")


class LinuxSensors:
    """Remembers only the throttle counters, whose growth is the news."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"
        self._sys = root / "sys"
        self._etc = root / "etc"
        self._throttles: int | None = None

    def memory(self) -> Memory | None:
        meminfo = read_text(self._proc / "meminfo")
        if meminfo is None:
            return None
        return memory_of(meminfo, read_text(self._proc / "pressure" / "memory"))

    def heat(self) -> Heat:
        throttled = self._throttled()
        hwmon, zones = list(self._hwmon()), list(self._zones())
        readings = hwmon + zones
        sources = [
            name
            for name, known in (
                ("hwmon", bool(hwmon)),
                ("thermal zones", bool(zones)),
                ("throttle counters", throttled is not None),
            )
            if known
        ]
        return Heat(
            state=classify(readings, throttled),
            cpu_c=max((reading.celsius for reading in readings), default=None),
            throttled=throttled,
            source=" + ".join(sources) or None,
        )

    def cpu_model(self) -> str | None:
        """`model name` (x86), else the board's name (ARM)."""
        for line in (read_text(self._proc / "cpuinfo") or "").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model") and value.strip():
                return value.strip()
        board = read_text(self._proc / "device-tree" / "model")
        return None if board is None else board.strip("\x00\n ") or None

    def os_version(self) -> str | None:
        for line in (read_text(self._etc / "os-release") or "").splitlines():
            name, _, value = line.partition("=")
            if name == "PRETTY_NAME":
                return value.strip().strip("\"'") or None
        return None

    # -- heat

    def _hwmon(self) -> Iterator[Temperature]:
        for chip in folders(self._sys / "class" / "hwmon", "hwmon*"):
            name = read_text(chip / "name")
            if name is None or name.strip() not in CPU_DRIVERS:
                continue
            yield from _chip(chip, name.strip())

    def _zones(self) -> Iterator[Temperature]:
        zones = [
            (read_text(zone / "type") or "", zone)
            for zone in folders(self._sys / "class" / "thermal", "thermal_zone*")
        ]
        chosen = [(kind.strip(), zone) for kind, zone in zones if CPU_ZONE.search(kind)]
        if not chosen:
            chosen = [(kind.strip(), zone) for kind, zone in zones if kind.strip() == LAST_RESORT_ZONE]
        for kind, zone in chosen:
            celsius = milli(zone / "temp")
            if celsius is not None and plausible(celsius):
                high, critical = _trips(zone)
                yield Temperature(kind, celsius, high, critical)

    def _throttled(self) -> bool | None:
        """Whether the counters grew since the last reading; None at the first, and where there are none."""
        counts = [
            count
            for cpu in folders(self._sys / "devices" / "system" / "cpu", "cpu[0-9]*")
            for name in ("core_throttle_count", "package_throttle_count")
            if (count := read_number(cpu / "thermal_throttle" / name)) is not None
        ]
        before, self._throttles = self._throttles, sum(counts) if counts else None
        if before is None or self._throttles is None:
            return None
        return self._throttles > before


def _chip(chip: Path, driver: str) -> Iterator[Temperature]:
    """The package's sensor where there is one, else all: a big processor has a hundred."""
    inputs = sorted(chip.glob("temp*_input"))
    labelled = [
        (file, read_text(file.with_name(file.name.replace("_input", "_label"))) or "") for file in inputs
    ]
    packages = [file for file, label in labelled if PACKAGE_LABEL.search(label)]
    for file in packages or inputs:
        celsius = milli(file)
        if celsius is not None and plausible(celsius):
            high = milli(file.with_name(file.name.replace("_input", "_max")))
            critical = milli(file.with_name(file.name.replace("_input", "_crit")))
            yield Temperature(driver, celsius, high, critical)


def _trips(zone: Path) -> tuple[float | None, float | None]:
    """(slows down, critical) from the zone's trip points: the lowest that makes sense of each kind."""
    passive: list[float] = []
    critical: list[float] = []
    for file in zone.glob("trip_point_*_type"):
        kind = (read_text(file) or "").strip()
        celsius = milli(file.with_name(file.name.replace("_type", "_temp")))
        if celsius is None or celsius < FAR_TOO_COLD_C:
            continue
        if kind == "passive":
            passive.append(celsius)
        elif kind == "hot":
            critical.append(celsius)
        elif kind == "critical":
            critical.append(celsius - SHUTDOWN_MARGIN_C)
    return min(passive, default=None), min(critical, default=None)


def folders(parent: Path, pattern: str) -> list[Path]:
    """In the order of their numbers, so that two readings list the same things alike."""
    try:
        return sorted(parent.glob(pattern), key=_number_in)
    except OSError:
        return []


def _number_in(path: Path) -> tuple[int, str]:
    found = _NUMBER.search(path.name)
    return (int(found.group()) if found else 0, path.name)


def read_text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def read_number(file: Path) -> int | None:
    text = read_text(file)
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def milli(file: Path) -> float | None:
    """A file in thousandths, as sysfs gives temperatures."""
    number = read_number(file)
    return None if number is None else number / 1000.0
