"""Numbers as people read them: for the page and the terminal. Pure; what is not known is a dash."""

from __future__ import annotations

from typing import Final

UNKNOWN: Final = "–"


def percent(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0f}%"


def size(value_bytes: float | None) -> str:
    """Decimal units, as model sizes are given everywhere: 4.7 GB."""
    return UNKNOWN if not value_bytes else _scaled(value_bytes, 1000, ("B", "kB", "MB", "GB", "TB"))


def memory(value_bytes: float | None) -> str:
    """Binary units, as memory is sold: 32 GiB."""
    return UNKNOWN if value_bytes is None else _scaled(value_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def memory_share(used_bytes: float | None, total_bytes: float | None) -> str:
    """14/32 GiB."""
    if not total_bytes:
        return UNKNOWN
    used, total = memory(used_bytes), memory(total_bytes)
    same_unit = used.split(" ")[-1] == total.split(" ")[-1]
    return f"{used.split(' ')[0]}/{total}" if same_unit else f"{used}/{total}"


def duration_ms(value_ms: float | None) -> str:
    if value_ms is None:
        return UNKNOWN
    return f"{value_ms:.0f} ms" if value_ms < 999.5 else duration(value_ms / 1000)


def duration(value_s: float | None) -> str:
    """1.2 s, 45 s, 3 min 5 s, 2 h 4 min, 3 d."""
    if value_s is None:
        return UNKNOWN
    if value_s < 9.95:
        return f"{max(0.0, value_s):.1f} s"
    whole = round(value_s)
    minutes, seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    if whole < 86_400:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{whole // 86_400} d"


def ago(value_s: float | None) -> str:
    """Whole seconds: 3 s ago."""
    if value_s is None:
        return UNKNOWN
    value_s = max(0.0, value_s)
    return f"{value_s:.0f} s ago" if value_s < 9.95 else f"{duration(value_s)} ago"


def number(value: float | None, digits: int = 1) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def count(value: int, one: str, many: str | None = None) -> str:
    """1 node, 2 nodes."""
    return f"{value} {one if value == 1 else many or one + 's'}"


def busy(in_flight: int, slots: int) -> str:
    """In flight / slots; a model that is not loaded has no slots yet."""
    return f"{in_flight}/{slots}" if slots or in_flight else UNKNOWN


def text(value: object) -> str:
    return UNKNOWN if value is None or value == "" else str(value)


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    step = 0
    while value >= base * 0.9995 and step < len(units) - 1:
        value, step = value / base, step + 1
    return f"{value:.1f} {units[step]}" if value < 9.95 and step else f"{value:.0f} {units[step]}"
