"""One request's interrupts: deadlines, the client leaving, the router draining. One mechanism for all causes.

`asyncio.timeout` knows one cause; here a trip has a name, and the first one wins. Deadlines are instants that
a `Watch` looks at: a timer for each would cost more than all else here, and hardly any is ever reached.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Final, Literal, Self

Cause = Literal["client_gone", "client_stalled", "first_record", "gap", "total", "drain"]

_NEVER_S = float("inf")
#: How often all deadlines are looked at while none of them is nearer than that.
LOOK_S: Final = 1.0


class Tripped(Exception):
    """The guarded block was interrupted; `cause` says by what."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause: Cause = cause


class Watch:
    """One timer for the deadlines of any number of guards. It runs while there is a guard to look at."""

    __slots__ = ("_timer", "guards", "loop", "next_s")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.guards: set[Guard] = set()
        self.next_s = _NEVER_S
        """When the next look is taken, by the loop's clock: whoever sets an earlier deadline says so."""
        self._timer: asyncio.TimerHandle | None = None

    def hurry(self, at_s: float) -> None:
        """There is a deadline before the next look."""
        self.close()
        self.next_s = min(at_s, self.loop.time() + LOOK_S)
        self._timer = self.loop.call_at(self.next_s, self._look)

    def close(self) -> None:
        """Forget the timer; the next deadline sets another."""
        self.next_s = _NEVER_S
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self.next_s, now_s = _NEVER_S, self.loop.time()
        nearest_s = min([guard.look(now_s) for guard in list(self.guards)], default=None)
        if nearest_s is not None:
            self.hurry(nearest_s)


class Guard:
    """Guards the block of the task that enters it. `trip` may be called from any callback of the loop.

    Without a `watch` to share it has one of its own.
    """

    __slots__ = (
        "_cancelled",
        "_cancelling",
        "_due",
        "_is_alone",
        "_loop",
        "_silent_at_s",
        "_silent_cause",
        "_task",
        "_watch",
        "cause",
    )

    def __init__(self, watch: Watch | None = None) -> None:
        self._is_alone = watch is None
        self._watch = watch or Watch(asyncio.get_running_loop())
        self._loop = self._watch.loop
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._cancelled = False
        self._due: dict[str, tuple[float, Cause | Callable[[], None]]] = {}
        self._silent_at_s = _NEVER_S
        self._silent_cause: Cause = "gap"
        self.cause: Cause | None = None

    def __enter__(self) -> Self:
        task = self._task = asyncio.current_task(self._loop)
        assert task is not None
        self._cancelling = task.cancelling()
        self._watch.guards.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watch.guards.discard(self)
        if self._is_alone:
            self._watch.close()
        task, self._task = self._task, None
        if self.cause is None:
            return
        assert task is not None
        left = task.uncancel() if self._cancelled else task.cancelling()
        if kind is asyncio.CancelledError and left <= self._cancelling:  # one from outside passes
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
        self._set(name, seconds, cause)

    def later(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        """Call once after so long, unless cleared, set anew, or the block has ended."""
        self._set(name, seconds, call)

    def clear(self, name: str) -> None:
        """Forget one deadline or call."""
        self._due.pop(name, None)

    def _set(self, name: str, seconds: float, what: Cause | Callable[[], None]) -> None:
        at_s = self._loop.time() + seconds
        self._due[name] = (at_s, what)
        if at_s < self._watch.next_s:
            self._watch.hurry(at_s)

    def touch(self, cause: Cause, limit_s: float) -> None:
        """Progress was made: trip when the next touch does not come within `limit_s`."""
        self._silent_cause = cause
        at_s = self._silent_at_s = self._loop.time() + limit_s
        if at_s < self._watch.next_s:
            self._watch.hurry(at_s)

    def again(self, limit_s: float) -> None:
        """Progress of the same kind within the same limit. This is what a chunk of a stream pays."""
        self._silent_at_s = self._loop.time() + limit_s

    def look(self, now_s: float) -> float:
        """Called by the watch: trip if a deadline has passed, make the calls that are due; what is next."""
        nearest_s = self._silent_at_s
        if nearest_s <= now_s:
            self.trip(self._silent_cause)
            nearest_s = _NEVER_S
        for name, (at_s, what) in list(self._due.items()):
            if at_s > now_s:
                nearest_s = min(nearest_s, at_s)
            elif isinstance(what, str):
                self.trip(what)
            else:
                del self._due[name]
                what()
        return nearest_s
