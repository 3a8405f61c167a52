"""The only reader of time. Everybody else receives a `Clock`, or `now_s` as a plain number.

`now_s` is monotonic and the only time that durations and deadlines are made of; `wall_s` is for people and
for timestamps in logs and rows, and may jump.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from itertools import count
from typing import Protocol


class Clock(Protocol):
    """What a component may know of time."""

    def now_s(self) -> float:
        """Monotonic seconds, from an arbitrary start."""
        ...

    def wall_s(self) -> float:
        """Unix seconds. Never subtract two of them."""
        ...

    async def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's clock."""

    def now_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class ManualClock:
    """A clock that stands still until a test moves it.

    One `advance` wakes a sleeper at most once: whoever sleeps again on waking counts from the new time. Step
    several times to see several rounds of a loop.
    """

    def __init__(self, now_s: float = 1000.0, wall_s: float = 1_700_000_000.0) -> None:
        self._now_s = now_s
        self._wall_s = wall_s
        self._order = count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._watchers: list[tuple[int, asyncio.Future[None]]] = []

    def now_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._wall_s

    @property
    def sleeping(self) -> int:
        """How many are asleep."""
        return sum(not future.done() for _, _, future in self._sleepers)

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_s + seconds, next(self._order), future))
        self._tell_watchers()
        await future

    def advance(self, seconds: float) -> None:
        """Move both times; everybody whose time has come wakes, the earliest first."""
        if seconds < 0:
            raise ValueError("time does not run backwards; use set_wall for a jump of the wall clock")
        self._now_s += seconds
        self._wall_s += seconds
        while self._sleepers and self._sleepers[0][0] <= self._now_s:
            _, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)

    def set_wall(self, wall_s: float) -> None:
        """The wall clock jumps, the monotonic one does not notice."""
        self._wall_s = wall_s

    async def until_sleeping(self, number: int = 1) -> None:
        """Return as soon as at least `number` are asleep, so that a test need not guess when to advance."""
        if self.sleeping >= number:
            return
        watcher = asyncio.get_running_loop().create_future()
        self._watchers.append((number, watcher))
        await watcher

    def _tell_watchers(self) -> None:
        sleeping = self.sleeping
        for number, watcher in self._watchers:
            if number <= sleeping and not watcher.done():
                watcher.set_result(None)
        self._watchers = [row for row in self._watchers if not row[1].done()]
