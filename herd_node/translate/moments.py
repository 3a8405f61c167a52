"""Times as Ollama writes and reads them: RFC 3339 with nanoseconds, nanosecond counts, Go durations. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from herd_node.translate.base import Refusal

_UNIT_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|μs|ms|s|m|h)")
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")


class Stamps:
    """Times of many lines: those of one second differ in their fraction only."""

    __slots__ = ("_second", "_second_s")

    def __init__(self) -> None:
        self._second_s = -1
        self._second = ""

    def rfc3339(self, wall_s: float) -> str:
        """`2026-11-23T03:09:15.39073712Z`: UTC, fraction without trailing zeros."""
        whole_s = int(wall_s)
        if whole_s != self._second_s:
            self._second_s = whole_s
            self._second = datetime.fromtimestamp(whole_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        fraction = f"{int((wall_s - whole_s) * 1e9):09d}".rstrip("0")
        return f"{self._second}.{fraction}Z" if fraction else f"{self._second}Z"


def rfc3339(wall_s: float) -> str:
    return Stamps().rfc3339(wall_s)


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def keep_alive_s(value: object) -> float | None:
    """Seconds of a `keep_alive` value; None when absent. Raises Refusal as Ollama does."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise Refusal(400, f"Unsupported type: '{type(value).__name__}'")
    return _go_duration_s(value) if isinstance(value, str) else float(value)


def _go_duration_s(text: str) -> float:
    rest = text[1:] if text[:1] in ("+", "-") else text
    if rest == "0":
        return 0.0
    total_s, position = 0.0, 0
    for part in _PART.finditer(rest):
        if part.start() != position:
            break
        total_s += float(part[1]) * _UNIT_S[part[2]]
        position = part.end()
    if not rest or position != len(rest):
        unit_missing = bool(rest) and _NUMBER.fullmatch(rest[position:]) is not None
        what = "missing unit in duration" if unit_missing else "invalid duration"
        raise Refusal(400, f'time: {what} "{text}"')
    return -total_s if text[0] == "-" else total_s
