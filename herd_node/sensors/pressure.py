"""How short of memory a machine is. Pure: numbers and the kernel's texts in, a word out.

Two witnesses. The share that is available says how much fits; Linux's pressure stall information (PSI) says
whether programs already wait for memory. PSI counts stalls inside a container's own limit too, so it is
believed only where the machine itself is short.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from herd_node.protocol.wire import Memory, PressureWord

WARN_BELOW_SHARE = 0.10
CRITICAL_BELOW_SHARE = 0.05
#: With more than this available, stalls come from somewhere else than the machine's memory.
STALLS_COUNT_BELOW_SHARE = 0.25
#: Percent of the last 10 s in which some, or all, tasks waited for memory.
WARN_SOME_PERCENT = 10.0
CRITICAL_FULL_PERCENT = 10.0


class Stalls(NamedTuple):
    """`avg10` of /proc/pressure/memory."""

    some_percent: float
    full_percent: float


def pressure(available_share: float | None, stalls: Stalls | None = None) -> PressureWord | None:
    """None when neither witness speaks."""
    # 1. what is available
    if available_share is not None and available_share < CRITICAL_BELOW_SHARE:
        return "critical"
    short = available_share is None or available_share < STALLS_COUNT_BELOW_SHARE
    # 2. who waits already
    if stalls is not None and short and stalls.full_percent >= CRITICAL_FULL_PERCENT:
        return "critical"
    if available_share is not None and available_share < WARN_BELOW_SHARE:
        return "warn"
    if stalls is not None and short and stalls.some_percent >= WARN_SOME_PERCENT:
        return "warn"
    return None if available_share is None and stalls is None else "normal"


def memory_of(meminfo: str, psi: str | None) -> Memory:
    """/proc/meminfo and /proc/pressure/memory (None where the kernel has none) as one reading."""
    fields = parse_meminfo(meminfo)
    total, available = fields.get("MemTotal"), fields.get("MemAvailable")
    swap_total, swap_free = fields.get("SwapTotal"), fields.get("SwapFree")
    stalls = None if psi is None else parse_stalls(psi)
    share = available / total if total and available is not None else None
    return Memory(
        total_bytes=total,
        available_bytes=available,
        used_bytes=None if total is None or available is None else max(0, total - available),
        swap_used_bytes=None if swap_total is None or swap_free is None else max(0, swap_total - swap_free),
        pressure=pressure(share, stalls),
        source="meminfo" if stalls is None else "meminfo+psi",
    )


def parse_meminfo(text: str) -> Mapping[str, int]:
    """Bytes by name; lines that are not `Name: N kB` are left out."""
    fields: dict[str, int] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[0].isascii() and words[0].isdigit() and words[1] == "kB":
            fields[name] = int(words[0]) * 1024
    return fields


def parse_stalls(text: str) -> Stalls | None:
    """`some avg10=0.12 …` and `full avg10=0.00 …`; None when they are not there."""
    averages: dict[str, float] = {}
    for line in text.splitlines():
        kind, *pairs = line.split() or [""]
        for pair in pairs:
            name, _, value = pair.partition("=")
            if name == "avg10":
                try:
                    averages[kind] = float(value)
                except ValueError:
                    return None
    if "some" not in averages:
        return None
    return Stalls(averages["some"], averages.get("full", 0.0))
