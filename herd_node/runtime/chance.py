"""The only source of chance: identifiers, secrets, and jitter that keeps machines from marching in step."""

from __future__ import annotations

import random
import secrets


def new_hex(n_bytes: int) -> str:
    """`2 * n_bytes` random lower-case hex digits; 8 bytes for an agent id or a boot, 12 for a request id."""
    return secrets.token_hex(n_bytes)


class HexSource:
    """`new_hex` for one identifier a request: chance is drawn for many of them in one system call."""

    def __init__(self, n_bytes: int, at_once: int = 256) -> None:
        self._digits = 2 * n_bytes
        self._at_once = at_once
        self._drawn: list[str] = []

    def __call__(self) -> str:
        if not self._drawn:
            digits = self._digits
            text = new_hex(digits // 2 * self._at_once)
            self._drawn = [text[at : at + digits] for at in range(0, len(text), digits)]
        return self._drawn.pop()


def new_secret() -> bytes:
    """32 random bytes, the size of every key in this project."""
    return secrets.token_bytes(32)


def jitter(base: float, share: float, rng: random.Random | None = None) -> float:
    """`base` moved by up to ± `share` of itself. A seeded `rng` makes it repeatable."""
    drawn = rng.uniform(-1.0, 1.0) if rng is not None else random.uniform(-1.0, 1.0)
    return base * (1.0 + share * drawn)
