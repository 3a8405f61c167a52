"""The only source of chance: identifiers, secrets, and jitter that keeps machines from marching in step."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable


def new_hex(n_bytes: int) -> str:
    """`2 * n_bytes` random lower-case hex digits; 8 bytes for an agent id or a boot, 12 for a request id."""
    return secrets.token_hex(n_bytes)


class RisingHex:
    """24 hex digits for one identifier a request: 10 of time, 14 of chance, drawn many at once.

    They rise with time, so that a table keyed by them grows at its end and not all over. They say when they
    were drawn, not when they were handed out.
    """

    def __init__(self, wall_s: Callable[[], float], at_once: int = 256) -> None:
        self._wall_s = wall_s
        self._at_once = at_once
        self._drawn: list[str] = []

    def __call__(self) -> str:
        if not self._drawn:
            time = f"{int(self._wall_s() * 256) & 0xFF_FFFF_FFFF:010x}"
            text = new_hex(7 * self._at_once)
            self._drawn = sorted([time + text[at : at + 14] for at in range(0, len(text), 14)], reverse=True)
        return self._drawn.pop()


def new_secret() -> bytes:
    """32 random bytes, the size of every key in this project."""
    return secrets.token_bytes(32)


def jitter(base: float, share: float, rng: random.Random | None = None) -> float:
    """`base` moved by up to ± `share` of itself. A seeded `rng` makes it repeatable."""
    drawn = rng.uniform(-1.0, 1.0) if rng is not None else random.uniform(-1.0, 1.0)
    return base * (1.0 + share * drawn)
