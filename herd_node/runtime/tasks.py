"""The only creator of asyncio tasks: each has a name, an owner that keeps it, and an end that is not lost.

The event loop keeps weak references only, so a task that nobody holds may be collected while it runs, and an
exception that nobody awaits vanishes. `Tasks` is the holder; `supervise` wraps loops that must not end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from herd_node.runtime.clock import Clock

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Tasks:
    """Owns tasks from their start to their end.

    A task that swallows its cancellation is cancelled again every `patience_s` seconds when the owner closes.
    """

    def __init__(self, name: str, *, patience_s: float = 5.0) -> None:
        self.name = name
        self._patience_s = patience_s
        self._running: set[asyncio.Task[Any]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._running)

    def spawn(self, coro: Coroutine[Any, Any, _T], *, name: str) -> asyncio.Task[_T]:
        """Start `coro`; it is kept until done, and an exception that ends it is logged."""
        if self._closed:
            coro.close()
            raise RuntimeError(f"{self.name} is closed; {name} cannot start")
        task = asyncio.create_task(coro, name=f"{self.name}/{name}")
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Cancel everything and wait until it has ended. Nothing can be spawned afterwards."""
        self._closed = True
        current = asyncio.current_task()
        while waiting := [task for task in self._running if task is not current and not task.done()]:
            for task in waiting:
                task.cancel()
            _, stubborn = await asyncio.wait(waiting, timeout=self._patience_s)
            for task in stubborn:
                _log.warning("task %s goes on although it was cancelled", task.get_name())

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        if (error := task.exception()) is not None:
            _log.error("task %s ended with an error: %r", task.get_name(), error, exc_info=error)


async def supervise(
    make: Callable[[], Coroutine[Any, Any, object]],
    *,
    name: str,
    clock: Clock,
    on_crash: Callable[[str, BaseException], None] | None = None,
    first_delay_s: float = 0.5,
    max_delay_s: float = 30.0,
) -> None:
    """Run `make()` for ever: one that raises, or returns, is started again after a pause that doubles.

    A run that lasted `max_delay_s` earns the short pause again. The traceback is logged once for errors in
    a row that read the same. Ends only by cancellation.
    """
    delay_s = first_delay_s
    last_error = ""
    while True:
        began_s = clock.now_s()
        try:
            await make()
        except Exception as error:  # noqa: BLE001 - a loop must not end the program: logged, counted, restarted
            if clock.now_s() - began_s >= max_delay_s:
                delay_s, last_error = first_delay_s, ""
            known, last_error = last_error, repr(error)
            _log.error(
                "%s failed and starts again in %.1f s: %s",
                name,
                delay_s,
                last_error,
                exc_info=error if last_error != known else None,
            )
            if on_crash is not None:
                on_crash(name, error)
        else:
            _log.warning("%s ended by itself and starts again in %.1f s", name, delay_s)
        await clock.sleep(delay_s)
        delay_s = min(delay_s * 2, max_delay_s)
