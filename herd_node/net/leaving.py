"""Work for a caller ends when the caller leaves, wherever it waits just then."""

from __future__ import annotations

import asyncio
from types import TracebackType

from herd_node.net.exchange import ClientGone, Exchange


class UntilGone:
    """Ends the block of the task that enters it with ClientGone as soon as the caller has left.

    Once a call; `asyncio.timeout` without a time would do the same for three times the cost.
    """

    __slots__ = ("_cancelling", "_exchange", "_left", "_task")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self._left = False

    def __enter__(self) -> None:
        if self._exchange.gone:
            raise ClientGone("the caller left")
        task = self._task = asyncio.current_task()
        assert task is not None
        self._cancelling = task.cancelling()
        self._exchange.on_gone(self._leave)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._left and task is not None:
            left = task.uncancel()
            if kind is asyncio.CancelledError and left <= self._cancelling:  # one from outside passes
                raise ClientGone("the caller left") from None

    def _leave(self) -> None:
        if self._task is not None:
            self._left = True
            self._task.cancel()
