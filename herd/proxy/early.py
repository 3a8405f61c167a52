"""The early commit of R-1: a stream that is silent for long begins before anybody serves it.

Caller's side only: a 200 with the request's id, then pings, or what the request waits for where the caller
wants to be told. It never says what served the request, ends nothing and records nothing. Whoever writes to
the exchange after it has begun must `stop` it first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from herd.proxy.guard import Guard
from herd_node.net.exchange import ClientGone, Exchange, Headers

_log = logging.getLogger(__name__)

_ALARM = "early commit"


class Early:
    """Of one request. The task that writes is its own and ends with `stop`, which must be called."""

    __slots__ = ("_every_s", "_exchange", "_guard", "_headers", "_task", "_word")

    def __init__(
        self,
        exchange: Exchange,
        guard: Guard,
        headers: Callable[[], Headers],
        word: Callable[[], bytes],
        every_s: float,
    ) -> None:
        self._exchange = exchange
        self._guard = guard
        self._headers = headers
        self._word = word
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None

    def expect(self, within_s: float) -> None:
        """Begin unless `stop` or `wait_on` is called before."""
        if self._task is None:
            self._guard.later(_ALARM, max(0.0, within_s), self._begin)

    def wait_on(self) -> None:
        """It may still be refused with its real status: not now."""
        self._guard.clear(_ALARM)

    async def stop(self) -> None:
        """Nothing is written by this from here on."""
        self._guard.clear(_ALARM)
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            if not task.cancelled() and (error := task.exception()) is not None:
                _log.error("a ping could not be sent", exc_info=error)

    def _begin(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="early commit")

    async def _run(self) -> None:
        with suppress(ClientGone):  # the request's own task hears of that by itself
            if not self._exchange.started:
                await self._exchange.start(200, self._headers())
            while True:
                await self._exchange.send(self._word())
                await asyncio.sleep(self._every_s)
