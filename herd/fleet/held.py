"""What lies in an instance's prompt cache, as far as the router can know: the sequences it was sent last.

`PromptCache` is the registry's own and changes with every request; `Held` is what a view shows of it, a value
that is replaced and never changed. Digests are chained, so one digest stands for the whole prompt up to
there, and whoever passes through it passes through all before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from herd.request import PrefixMark


class Held(NamedTuple):
    """An index, so that a look costs the marks asked for, however many sequences are held."""

    digests: Mapping[bytes, int]
    """Digest -> how many of the sequences pass through it."""

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


NOTHING_HELD = Held(MappingProxyType({}))


class PromptCache:
    __slots__ = ("_by_last", "_digests", "_held")

    def __init__(self) -> None:
        self._by_last: dict[bytes, tuple[PrefixMark, ...]] = {}
        """Last digest -> sequence, newest last."""
        self._digests: dict[bytes, int] = {}
        self._held: Held | None = NOTHING_HELD
        """What was handed out of `_digests` as it is; None: nothing, so it may be changed in place."""

    @property
    def held(self) -> Held:
        """The same object until a sequence comes or goes."""
        held = self._held
        if held is None:
            held = self._held = Held(self._digests) if self._digests else NOTHING_HELD
        return held

    @property
    def sequences(self) -> tuple[tuple[PrefixMark, ...], ...]:
        return tuple(self._by_last.values())

    def starts_like(self, asked: Sequence[PrefixMark]) -> bool:
        return bool(asked) and asked[0][0] in self._digests

    def add(self, new: tuple[PrefixMark, ...], slots: int) -> None:
        """`new`, which is not empty, replaces what it extends; the last `slots` stay."""
        by_last, digests = self._by_last, self._changeable()
        last = b""
        for last, _ in new:
            if last in by_last:
                _uncount(by_last.pop(last), digests)
            digests[last] = digests.get(last, 0) + 1
        by_last[last] = new
        while len(by_last) > slots:
            _uncount(by_last.pop(next(iter(by_last))), digests)

    def remove(self, sequence: tuple[PrefixMark, ...]) -> None:
        """This very sequence; an equal one that came later stays."""
        if sequence and self._by_last.get(sequence[-1].digest) is sequence:
            _uncount(self._by_last.pop(sequence[-1].digest), self._changeable())

    def clear(self) -> None:
        self._by_last, self._digests, self._held = {}, {}, NOTHING_HELD

    def _changeable(self) -> dict[bytes, int]:
        if self._held is not None:
            self._digests, self._held = self._digests.copy(), None
        return self._digests


def _uncount(sequence: tuple[PrefixMark, ...], digests: dict[bytes, int]) -> None:
    for digest, _ in sequence:
        left = digests[digest] - 1
        if left:
            digests[digest] = left
        else:
            del digests[digest]
