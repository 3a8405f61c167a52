"""A waiting room over a real registry, with a clock that stands still."""

from __future__ import annotations

import asyncio
from typing import Any

from herd.fleet.registry import AttemptResult, Registry
from herd.proxy.slots import Granted, WaitingRoom
from herd.request import InferenceRequest
from herd.scheduling.plan import History, Reject
from herd.scheduling.policy import Policy
from herd.scheduling.standing import Cost
from herd_node.protocol.routes import FORWARDED_BY_PATH
from herd_node.runtime.clock import ManualClock
from tests.fleet.build import fresh


def request(request_id: str, *names: str, arrival_s: float = 0.0, **fields: Any) -> InferenceRequest:
    asked = names or ("llama3:8b",)
    return InferenceRequest(
        request_id=request_id,
        route=FORWARDED_BY_PATH["/api/chat"],
        chain=tuple(name.lower() for name in asked),
        asked=asked,
        body=b"{}",
        stream=True,
        **{"est_tokens": 100.0, "needs": frozenset({"completion"}), "arrival_s": arrival_s, **fields},
    )


def cost() -> Cost:
    return Cost(*(0.0 for _ in Cost._fields))


class House:
    """The room, its registry, and everybody in it."""

    def __init__(self, registry: Registry | None = None, *, max_waiting: int = 1000, **policy: Any) -> None:
        self.clock = ManualClock()
        self.registry = registry if registry is not None else fresh()
        self.room = WaitingRoom(self.registry, Policy(**policy), self.clock, max_waiting=max_waiting)
        self._tasks: list[asyncio.Task[Granted | Reject]] = []

    @property
    def now_s(self) -> float:
        return self.clock.now_s()

    def ask(
        self, request_id: str, *names: str, history: History | None = None
    ) -> asyncio.Task[Granted | Reject]:
        """Somebody comes; the answer is the task's result."""
        asked = request(request_id, *names, arrival_s=self.now_s)
        task = asyncio.ensure_future(self.room.acquire(asked, history or History()))
        self._tasks.append(task)
        return task

    async def settle(self) -> None:
        """Let everybody who can go on do so."""
        for _ in range(5):
            await asyncio.sleep(0)

    async def pass_time(self, seconds: float) -> None:
        """Time goes by, and the fleet is looked at again."""
        await self.settle()
        self.clock.advance(seconds)
        self.room.wake()
        await self.settle()

    async def end(self, granted: Granted, *, ok: bool = True) -> None:
        self.registry.end_attempt(granted.token, self.now_s, AttemptResult(ok=ok, total_s=1.0))
        self.room.wake()
        await self.settle()

    def waiting_in_registry(self) -> dict[str, int]:
        return dict(self.registry.snapshot(self.now_s).waiting)

    def in_flight(self) -> int:
        return sum(row.in_flight for row in self.registry.nodes_for_status(self.now_s))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
