"""One request's interrupts: deadlines, the client leaving, the router draining. One mechanism for all causes.

`asyncio.timeout` knows one cause; here a trip has a name, and the first one wins.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Literal, Self

Cause = Literal["client_gone", "client_stalled", "first_record", "gap", "total", "drain"]


class Tripped(Exception):
    """The guarded block was interrupted; `cause` says by what."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause: Cause = cause


class Guard:
    """Guards the block of the task that enters it. `trip` may be called from any callback of the loop."""

    __slots__ = ("_cancelling", "_gap_cause", "_gap_s", "_last_s", "_loop", "_task", "_timers", "cause")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._last_s = 0.0
        self._gap_s = 0.0
        self._gap_cause: Cause = "gap"
        self.cause: Cause | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        task, self._task = self._task, None
        if self.cause is None or task is None or kind is not asyncio.CancelledError:
            return
        if task.uncancel() <= self._cancelling:  # a cancellation from outside passes
            raise Tripped(self.cause) from None

    def trip(self, cause: Cause) -> None:
        """Interrupt the block. Later trips change nothing."""
        if self.cause is None and self._task is not None:
            self.cause = cause
            self._task.cancel()

    def check(self) -> None:
        """Raise at once what a trip inside this very step would raise at the next await."""
        if self.cause is not None:
            raise asyncio.CancelledError

    def deadline(self, name: str, seconds: float, cause: Cause) -> None:
        """Trip after so long, unless cleared or set anew under the same name."""
        self.clear(name)
        self._timers[name] = self._loop.call_later(seconds, self.trip, cause)

    def clear(self, name: str) -> None:
        """Forget one deadline."""
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def watch_gap(self, seconds: float) -> None:
        """From now on trip when `touch` was not called for so long. One timer, however many touches."""
        self._gap_s = seconds
        self._last_s = self._loop.time()
        self.clear("gap")
        self._timers["gap"] = self._loop.call_later(seconds, self._check_gap)

    def touch(self, cause: Cause = "gap") -> None:
        """Progress was made; `cause` names what the next silence will be blamed on."""
        self._last_s = self._loop.time()
        self._gap_cause = cause

    def _check_gap(self) -> None:
        silent_s = self._loop.time() - self._last_s
        if silent_s >= self._gap_s:
            self.trip(self._gap_cause)
        else:
            self._timers["gap"] = self._loop.call_later(self._gap_s - silent_s, self._check_gap)
