"""The one queue: who waits for a slot, who is held, and who is sent when the fleet changes.

Late binding: a request that cannot be sent now stays here and is planned again on every fleet event; nothing
queues at a node. This module keeps the list and the timers; every decision is `herd.scheduling.plan`'s.

1. an arrival is planned alone against the claims of those who wait; a free, unclaimed best node is taken
2. otherwise it joins the list, unless the list is full
3. `wake` (a slot freed, a beat, a load finished, a node lost) plans the whole list once, soon
4. while anybody waits the list is also planned once a second: budgets, drains and marks end by time
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from herd.errors import HerdError
from herd.fleet.registry import AttemptToken, Registry
from herd.fleet.snapshot import ModelName
from herd.proxy.contexts import Contexts
from herd.request import InferenceRequest
from herd.scheduling import plan
from herd.scheduling.eligibility import prompts_on
from herd.scheduling.estimate import endings
from herd.scheduling.lookup import lookup
from herd.scheduling.plan import Attempt, Claims, History, Hold, Reject, Wait
from herd.scheduling.policy import Policy
from herd.scheduling.rows import CostTable
from herd_node.runtime.clock import Clock

_REPLAN_S = 1.0
#: Kinds that only read: they take no slot and are never waited for.
_READS = frozenset({"show", "count"})


class Granted(NamedTuple):
    """A reserved slot: the attempt to make, the registry's token for it, and what the instance was before."""

    step: Attempt
    token: AttemptToken | None
    """None for a call that takes no slot."""
    backend_kind: str
    cold: bool
    history: History
    """With the time that was spent waiting: the budgets are the request's, not the attempt's (R-5)."""
    shown: str
    """The model's name as the node spells it."""


def _shown(names: Iterable[ModelName], model: str) -> str:
    for name in names:
        if name.canonical == model:
            return name.shown
    return model


class Outlook(NamedTuple):
    """What somebody who waits can be told."""

    place: int
    """In the order in which those who want the same model are served, from 1."""
    waiting: int
    expected_s: float | None
    """Until a slot is free for it; None while no node can take it."""


class QueueRow(NamedTuple):
    """One model's queue, for people."""

    waiting: int
    oldest_wait_s: float


class _Pending:
    __slots__ = (
        "arrival_s",
        "claim",
        "deadline_s",
        "future",
        "held",
        "history",
        "last_s",
        "on_wait",
        "request",
    )

    def __init__(
        self,
        request: InferenceRequest,
        history: History,
        now_s: float,
        deadline_s: float,
        future: asyncio.Future[Granted | Reject],
        on_wait: Callable[[bool], None],
    ) -> None:
        self.request = request
        self.history = history
        self.arrival_s = request.arrival_s
        self.last_s = now_s
        self.deadline_s = deadline_s
        self.future = future
        self.on_wait = on_wait
        self.held = False
        self.claim: tuple[str, str] | None = None

    def account(self, now_s: float) -> None:
        """Book the time since the last plan to what the request did meanwhile."""
        passed_s, self.last_s = now_s - self.last_s, now_s
        tried, attempts, model_index, waited_s, held_s, prompts = self.history
        if self.held:
            held_s += passed_s
        else:
            waited_s += passed_s
        self.history = History(tried, attempts, model_index, waited_s, held_s, prompts)

    def as_waiting(self) -> plan.Waiting:
        return plan.Waiting(
            self.request, self.history, self.arrival_s, self.deadline_s, self.held, self.claim
        )


class WaitingRoom:
    """Grants slots. One a router; lives as long as its event loop."""

    def __init__(self, registry: Registry, policy: Policy, clock: Clock, *, max_waiting: int) -> None:
        self._registry = registry
        self._policy = policy
        self._clock = clock
        self._max_waiting = max_waiting
        self._table = CostTable()
        self._contexts = Contexts(registry, policy)
        self._waiting: dict[str, _Pending] = {}
        self._by_model: Counter[str] = Counter()
        self._claims: Counter[tuple[str, str]] = Counter()
        self._drains: plan.DrainState = plan.NO_DRAINS
        self._wake_scheduled = False
        self._timer: asyncio.TimerHandle | None = None
        self._closed: Reject | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def claims_on(self, node_id: str) -> int:
        """How many of those who wait have claimed a slot of this node."""
        return sum(count for (node, _), count in self._claims.items() if node == node_id)

    def queues(self) -> dict[str, QueueRow]:
        """Who waits for which model, and for how long the oldest has."""
        now_s = self._clock.now_s()
        oldest: dict[str, float] = {}
        for pending in self._waiting.values():
            model = pending.request.chain[0]
            oldest[model] = max(oldest.get(model, 0.0), now_s - pending.arrival_s)
        return {model: QueueRow(self._by_model[model], age_s) for model, age_s in oldest.items()}

    async def acquire(
        self,
        request: InferenceRequest,
        history: History,
        on_wait: Callable[[bool], None] = lambda _held: None,
    ) -> Granted | Reject:
        """A slot for the request, however long that takes, or the reason why it gets none.

        Cancel it to leave the queue. Attempts that failed are in `history`. `on_wait` is called when it has
        to wait or is held (True), and whenever the one becomes the other.
        """
        now_s = self._clock.now_s()
        step = self._decide(request, history, now_s)
        if isinstance(step, Granted | Reject):
            return step
        future: asyncio.Future[Granted | Reject] = asyncio.get_running_loop().create_future()
        snapshot = self._registry.snapshot(now_s)
        deadline_s = plan.virtual_deadline(request, snapshot, self._policy, now_s, self._table)
        pending = _Pending(request, history, now_s, deadline_s, future, on_wait)
        self._join(pending)
        self._settle(pending, step)
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():  # granted and cancelled in the same turn of the loop
                self._give_back(future.result())
            raise
        finally:
            self._leave(pending)

    def _decide(self, request: InferenceRequest, history: History, now_s: float) -> Granted | plan.Step:
        """A slot or a refusal at once, or how it will wait."""
        if self._closed is not None:
            return self._closed
        snapshot, kind = self._registry.snapshot(now_s), request.route.kind
        if kind in _READS and (found := lookup(request, snapshot, history)) is not None:
            shown = _shown(found[1].names, found[0].model)
            return Granted(found[0], None, found[1].backend_kind, False, history, shown)
        claims = Claims(self._claims, self._drains) if self._waiting else plan.NO_CLAIMS
        step = plan.next_step(request, snapshot, history, self._policy, now_s, claims, self._table)
        if isinstance(step, Reject):
            return step
        if kind == "count":  # nobody can count now; a guess is better than to wait
            return Reject(501, f"nobody can count the tokens of model '{request.asked[0]}' now", None, ())
        if isinstance(step, Attempt):
            return self._grant(request, history, step, now_s)
        if len(self._waiting) >= self._max_waiting:
            message = f"{len(self._waiting)} requests wait already, the most that this router lets wait"
            return Reject(503, message, 5, ())
        return step

    def outlook(self, request_id: str) -> Outlook | None:
        """Where one that waits stands; None for everybody else. For people: costs the whole queue."""
        mine = self._waiting.get(request_id)
        if mine is None:
            return None
        model = mine.request.chain[0]
        queue = [row for row in self._waiting.values() if row.request.chain[0] == model]
        place = 1 + sum((row.deadline_s, row.arrival_s) < (mine.deadline_s, mine.arrival_s) for row in queue)
        expected_s = None
        if mine.claim is not None:
            now_s = self._clock.now_s()
            instance = self._registry.instance(*mine.claim)
            rests = sorted(end.rest_s(now_s) for end in endings(instance, now_s))
            if rests:
                rounds, rest = divmod(place - 1, len(rests))
                expected_s = rests[rest] + rounds * rests[-1]
        return Outlook(place, len(queue), expected_s)

    def wake(self) -> None:
        """Something changed in the fleet: plan the list soon, once for however many changes."""
        if self._waiting and not self._wake_scheduled:
            self._wake_scheduled = True
            asyncio.get_running_loop().call_soon(self._replan)

    def close(self, message: str) -> None:
        """The router drains: whoever waits is refused, and so is whoever comes."""
        self._closed = Reject(503, message, 5, ())
        for pending in list(self._waiting.values()):
            self._resolve(pending, self._closed)

    def _replan(self) -> None:
        self._wake_scheduled = False
        if not self._waiting:
            return
        self._arm()  # first: whatever happens here, the next look comes
        now_s = self._clock.now_s()
        for pending in self._waiting.values():
            pending.account(now_s)
        rows = [pending.as_waiting() for pending in self._waiting.values()]
        snapshot = self._registry.snapshot(now_s)
        steps, self._drains = plan.plan_queue(rows, snapshot, self._policy, now_s, self._drains, self._table)
        for request_id, step in steps:
            self._settle(self._waiting[request_id], step)

    def _settle(self, pending: _Pending, step: plan.Step) -> None:
        match step:
            case Attempt():
                granted = self._grant(pending.request, pending.history, step, self._clock.now_s())
                self._resolve(pending, granted)
            case Reject():
                self._resolve(pending, step)
            case Wait():
                pending.held = False
                self._claim(pending, (step.node_id, step.instance_key))
                pending.on_wait(False)
            case Hold():
                pending.held = True
                self._claim(pending, None)
                pending.on_wait(True)
            case plan.Pull():  # a seam: this version's planner does not return it
                raise HerdError(f"the planner returned {step!r}")

    def _grant(self, request: InferenceRequest, history: History, step: Attempt, now_s: float) -> Granted:
        if self._contexts.concern(request):
            step = self._contexts.settle(request, step, now_s)
        token = self._registry.start_attempt(
            step.node_id,
            step.instance_key,
            request.request_id,
            step.model,
            step.prefill_s,
            step.out_tokens,
            request.prefixes,
            now_s,
        )
        cold, facts = token.was != "hot", token.instance.facts
        if request.route.kind == "completion" and history.prompts is None:
            history = history._replace(prompts=prompts_on(facts.backend_kind))
        if cold:
            self._registry.evict(step.node_id, step.evicts, now_s)
        return Granted(step, token, facts.backend_kind, cold, history, _shown(facts.names, step.model))

    def _give_back(self, result: Granted | Reject) -> None:
        if isinstance(result, Granted) and result.token is not None:
            self._registry.abandon_attempt(result.token, self._clock.now_s())
            self.wake()

    def _resolve(self, pending: _Pending, result: Granted | Reject) -> None:
        self._forget(pending)
        if not pending.future.done():
            pending.future.set_result(result)
        elif isinstance(result, Granted):
            self._give_back(result)

    def _join(self, pending: _Pending) -> None:
        self._waiting[pending.request.request_id] = pending
        self._by_model[pending.request.chain[0]] += 1
        self._changed()
        self._arm()

    def _leave(self, pending: _Pending) -> None:
        if self._waiting.get(pending.request.request_id) is pending:
            self._forget(pending)
            self.wake()

    def _forget(self, pending: _Pending) -> None:
        if self._waiting.pop(pending.request.request_id, None) is None:
            return
        self._claim(pending, None)
        model = pending.request.chain[0]
        self._by_model[model] -= 1
        if not self._by_model[model]:
            del self._by_model[model]
        if not self._waiting:
            self._drains = plan.NO_DRAINS  # a drain serves somebody who waits
        self._changed()

    def _claim(self, pending: _Pending, claim: tuple[str, str] | None) -> None:
        if pending.claim == claim:
            return
        if pending.claim is not None:
            self._claims[pending.claim] -= 1
            if not self._claims[pending.claim]:
                del self._claims[pending.claim]
        if claim is not None:
            self._claims[claim] += 1
        pending.claim = claim

    def _changed(self) -> None:
        self._registry.set_waiting(dict(self._by_model))

    def _arm(self) -> None:
        if self._timer is None and self._waiting:
            self._timer = asyncio.get_running_loop().call_later(_REPLAN_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._replan()
