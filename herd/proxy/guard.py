"""One request's interrupts: deadlines, the client leaving, the router draining. One mechanism for all causes.

`asyncio.timeout` knows one cause; here a trip has a name, and the first one wins.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Literal, Self

Cause = Literal["client_gone", "client_stalled", "first_record", "gap", "total", "drain"]

_NEVER_S = float("inf")


class Tripped(Exception):
    """The guarded block was interrupted; `cause` says by what."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause: Cause = cause


class Guard:
    """Guards the block of the task that enters it. `trip` may be called from any callback of the loop.

    `loop` is the running one; whoever has it at hand gives it, because asking for it costs a system call in
    Python 3.11.
    """

    __slots__ = (
        "_cancelled",
        "_cancelling",
        "_loop",
        "_silence",
        "_silent_at_s",
        "_silent_cause",
        "_silent_timer_s",
        "_task",
        "_timers",
        "cause",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = loop if loop is not None else asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._cancelled = False
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._silence: asyncio.TimerHandle | None = None
        self._silent_at_s = self._silent_timer_s = _NEVER_S
        self._silent_cause: Cause = "gap"
        self.cause: Cause | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.current_task(self._loop)
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._silence is not None:
            self._silence.cancel()
        task, self._task = self._task, None
        assert task is not None
        left = task.uncancel() if self._cancelled else task.cancelling()
        if self.cause is None or kind is not asyncio.CancelledError:
            return
        if left <= self._cancelling:  # a cancellation from outside passes
            raise Tripped(self.cause) from None

    def trip(self, cause: Cause) -> None:
        """Interrupt the block. Later trips change nothing. The task's own trip is raised by `check`."""
        if self.cause is None and self._task is not None:
            self.cause = cause
            if asyncio.current_task(self._loop) is not self._task:
                self._cancelled = True
                self._task.cancel()

    def check(self) -> None:
        """Raise what the task itself has tripped."""
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

    def touch(self, cause: Cause, limit_s: float) -> None:
        """Progress was made: trip when the next touch does not come within `limit_s`.

        One timer, however many touches: it is moved only when the new limit ends before it.
        """
        self._silent_cause = cause
        self._silent_at_s = self._loop.time() + limit_s
        if self._silent_at_s < self._silent_timer_s:
            self._arm()

    def _arm(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
        self._silent_timer_s = self._silent_at_s
        self._silence = self._loop.call_at(self._silent_at_s, self._look)

    def _look(self) -> None:
        if self._loop.time() >= self._silent_at_s:
            self.trip(self._silent_cause)
        else:
            self._arm()
