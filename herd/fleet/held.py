"""What lies in an instance's prompt cache, as far as the router can know: the sequences it was sent last.

A value: it is replaced, never changed. Digests are chained, so one digest stands for the whole prompt up to
there, and whoever passes through it passes through all before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from herd.request import PrefixMark


class Held(NamedTuple):
    """`digests` is an index, so that a look costs the marks asked for, however many sequences are held."""

    by_last: Mapping[bytes, tuple[PrefixMark, ...]]
    """Last digest -> sequence, newest last."""
    digests: Mapping[bytes, int]
    """Digest -> how many of the sequences pass through it."""

    @property
    def sequences(self) -> tuple[tuple[PrefixMark, ...], ...]:
        return tuple(self.by_last.values())

    def prefix_tokens(self, asked: Sequence[PrefixMark]) -> float:
        """Tokens of the longest prefix of `asked` that is held, as its own marks count them."""
        digests = self.digests
        low, high = 0, len(asked)
        while low < high:
            middle = (low + high) // 2
            if asked[middle][0] in digests:
                low = middle + 1
            else:
                high = middle
        return asked[low - 1].tokens if low else 0.0

    def starts_like(self, asked: Sequence[PrefixMark]) -> bool:
        return bool(asked) and asked[0][0] in self.digests

    def with_sequence(self, new: tuple[PrefixMark, ...], slots: int) -> Held:
        """After `new`, which is not empty: it replaces what it extends; the last `slots` stay."""
        by_last, digests = dict(self.by_last), dict(self.digests)
        gone = []
        last = b""
        for last, _ in new:
            if last in by_last:
                gone.append(by_last.pop(last))
            digests[last] = digests.get(last, 0) + 1
        by_last[last] = new
        while len(by_last) > slots:
            gone.append(by_last.pop(next(iter(by_last))))
        for old in gone:
            _forget(digests, old)
        return Held(by_last, digests)

    def without(self, sequence: tuple[PrefixMark, ...]) -> Held:
        """Without this very sequence; an equal one that came later stays."""
        if not sequence or self.by_last.get(sequence[-1].digest) is not sequence:
            return self
        by_last, digests = dict(self.by_last), dict(self.digests)
        _forget(digests, by_last.pop(sequence[-1].digest))
        return Held(by_last, digests)


NOTHING_HELD = Held(MappingProxyType({}), MappingProxyType({}))


def _forget(digests: dict[bytes, int], sequence: tuple[PrefixMark, ...]) -> None:
    for digest, _ in sequence:
        left = digests[digest] - 1
        if left:
            digests[digest] = left
        else:
            del digests[digest]
