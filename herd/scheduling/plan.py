"""The step to take now: for one request (`next_step`) and for everybody who waits (`plan_queue`).

Pure. The shell carries a Step out and comes back with the new facts; it decides nothing itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from herd.fleet.held import NOTHING_HELD
from herd.fleet.snapshot import FleetSnapshot, InstanceView, NodeView, Running
from herd.request import InferenceRequest
from herd.scheduling.bounds import may_be_replaced, needs_of
from herd.scheduling.decide import Decision, decide
from herd.scheduling.eligibility import Needs
from herd.scheduling.estimate import ask_of, service_s
from herd.scheduling.policy import Policy
from herd.scheduling.rows import CostTable
from herd.scheduling.score import (
    NO_CLAIMS,
    NO_DRAINS,
    Blocked,
    Candidate,
    Claims,
    Drain,
    DrainState,
    Moment,
    blocked,
    rank,
)
from herd.scheduling.standing import Standing
from herd.scheduling.steps import (
    NEW,
    Attempt,
    History,
    Hold,
    Pull,
    Reject,
    Step,
    Wait,
    Waiting,
)

__all__ = [
    "NEW",
    "NO_CLAIMS",
    "NO_DRAINS",
    "Attempt",
    "Blocked",
    "Claims",
    "CostTable",
    "Drain",
    "DrainState",
    "History",
    "Hold",
    "Pull",
    "Reject",
    "Step",
    "Wait",
    "Waiting",
    "next_step",
    "plan_queue",
    "virtual_deadline",
]


_NOBODY: frozenset[tuple[str, str]] = frozenset()


def next_step(
    request: InferenceRequest,
    snapshot: FleetSnapshot,
    history: History,
    policy: Policy,
    now_s: float,
    claims: Claims = NO_CLAIMS,
    table: CostTable | None = None,
) -> Step:
    """What to do with one request now. `table` only saves time."""
    moment = Moment(snapshot, policy, now_s, claims, CostTable() if table is None else table)
    return decide(request, history, moment).step


def virtual_deadline(
    request: InferenceRequest,
    snapshot: FleetSnapshot,
    policy: Policy,
    now_s: float,
    table: CostTable | None = None,
) -> float:
    """Place in the queue: now + 5 · E_best, fixed when it first waits. It ages by itself.

    E_best is the least prefill and decode time over eligible nodes; over all holders while none is eligible.
    """
    table = CostTable() if table is None else table
    for model in request.chain:
        ask = ask_of(request, model, snapshot, policy)
        needs = needs_of(request, model, NEW, snapshot)
        rows = table.look(needs, snapshot, policy, now_s).rows
        able = [row for row in rows if row.where is not None] or rows
        e_best_s = service_s(ask, [row.instance for row in able])
        if e_best_s is not None:
            return now_s + policy.order * e_best_s
    return now_s + policy.order * policy.unknown_service_s


def plan_queue(
    waiting: Sequence[Waiting],
    snapshot: FleetSnapshot,
    policy: Policy,
    now_s: float,
    drains: DrainState = NO_DRAINS,
    table: CostTable | None = None,
) -> tuple[list[tuple[str, Step]], DrainState]:
    """What changes for those who wait, in the order in which it must be done, and the drains from now on.

    A request is in the answer if it gets an Attempt or a Reject, a Wait with another claim than it had (or
    after it was held), or a Hold that it was not in. All others go on as they are. At most one Attempt a free
    slot: an Attempt counts as running for everybody who comes after it in the same plan.
    """
    queue = _Queue(waiting, snapshot, policy, now_s, drains, CostTable() if table is None else table)
    for entry in sorted(waiting, key=lambda x: (x.deadline_s, x.arrival_s, x.request.request_id)):
        queue.visit(entry)
    return queue.changes, queue.drains_from_now_on()


def _current_model(entry: Waiting) -> str:
    return entry.request.chain[min(entry.history.model_index, len(entry.request.chain) - 1)]


def _by_model(waiting: Sequence[Waiting]) -> tuple[dict[str, int], dict[str, Waiting]]:
    """How many wait for each model, and who of them came first."""
    counts: dict[str, int] = {}
    oldest: dict[str, Waiting] = {}
    for entry in waiting:
        model = _current_model(entry)
        counts[model] = counts.get(model, 0) + 1
        if model not in oldest or entry.arrival_s < oldest[model].arrival_s:
            oldest[model] = entry
    return counts, oldest


class _Queue:
    """One plan in the making: the fleet as it will be after the steps found so far."""

    def __init__(
        self,
        waiting: Sequence[Waiting],
        snapshot: FleetSnapshot,
        policy: Policy,
        now_s: float,
        drains: DrainState,
        table: CostTable,
    ) -> None:
        self.changes: list[tuple[str, Step]] = []
        counts, oldest = _by_model(waiting)
        self._snapshot = snapshot._replace(waiting=counts)
        self._policy = policy
        self._now_s = now_s
        self._table = table
        self._claimed: dict[tuple[str, str], int] = {}
        self._left: Counter[str] = Counter()
        self._full: dict[Needs, frozenset[tuple[str, str]]] = {}
        self._drains = _still_needed(drains, self._snapshot, waiting) if drains else drains
        self._starving = self._starving_among(oldest)
        self._moment = self._moment_now()
        self._stuck: dict[str, Candidate] = {}

    def visit(self, entry: Waiting) -> None:
        """The next request in order of deadlines.

        1 past the window, or 2 nothing would change: it stays as it is; 3 else it is decided anew.
        """
        model = _current_model(entry)
        if not self._must_decide(entry):
            if self._left[model] >= self._policy.window:  # 1
                return
            if entry.claim is not None and self._stays(entry, model, entry.claim):  # 2
                self._left[model] += 1
                self._claim(entry.claim)
                return
        decision = decide(entry.request, entry.history, self._moment)  # 3
        self._follow(entry, model, decision)

    def _must_decide(self, entry: Waiting) -> bool:
        if entry.request.request_id in self._starving:
            return True
        history = entry.history
        spent_s, budget_s = history.waited_s, self._policy.wait_timeout_s
        if entry.held:
            spent_s, budget_s = history.held_s, self._policy.hold_timeout_s
        return spent_s >= budget_s

    def _follow(self, entry: Waiting, model: str, decision: Decision) -> None:
        step, request_id = decision.step, entry.request.request_id
        match step:
            case Attempt():
                self.changes.append((request_id, step))
                self._sent(entry, model, step)
            case Wait():
                claim = (step.node_id, step.instance_key)
                self._left[model] += 1
                self._claim(claim)
                if entry.held or entry.claim != claim:
                    self.changes.append((request_id, step))
                if request_id in self._starving and decision.best is not None:
                    self._stuck[step.model] = decision.best
            case Hold():
                self._left[model] += 1
                if not entry.held:
                    self.changes.append((request_id, step))
            case Reject() | Pull():
                self.changes.append((request_id, step))

    def _moment_now(self) -> Moment:
        """It holds until something is sent: claims that are added are seen in it."""
        claims = Claims(self._claimed, self._drains)
        return Moment(self._snapshot, self._policy, self._now_s, claims, self._table)

    def _claim(self, claim: tuple[str, str]) -> None:
        self._claimed[claim] = self._claimed.get(claim, 0) + 1

    def _stays(self, entry: Waiting, model: str, claim: tuple[str, str]) -> bool:
        """Whether it waits on for the same, which costs less to find out than a decision.

        1 no holder of its model can be sent to, and the claimed one still could be; 2 the claimed one is
        free, so that it may be sent; 3 the claimed one is still the best, and still not to be sent to.
        """
        request, history, policy = entry.request, entry.history, self._policy
        if may_be_replaced(request, policy) or history.attempts >= policy.max_attempts:
            return False
        needs = needs_of(request, model, history, self._snapshot)
        if claim[0] not in history.tried and claim in self._full_of(needs):  # 1
            return True
        kept = self._table.look(needs, self._snapshot, policy, self._now_s)
        at = kept.places_by_key.get(claim)
        where = None if at is None else kept.rows[at].where
        if where is None or (claim not in self._claimed and _could_send(where)):  # 2
            return False
        ask = ask_of(request, model, self._snapshot, policy)
        ranking = rank(needs, ask, history.tried, self._moment)  # 3
        if not ranking.found or ranking.found[0][2:4] != claim:
            return False
        return blocked(ranking.where, self._snapshot, policy, history.waited_s) is not None

    def _full_of(self, needs: Needs) -> frozenset[tuple[str, str]]:
        """Those that could serve it if none of them can be sent to; else nobody."""
        known = self._full.get(needs)
        if known is not None:
            return known
        rows = self._table.look(needs, self._snapshot, self._policy, self._now_s).rows
        for row in rows:
            if row.where is not None and _could_send(row.where):
                return _NOBODY
        able = [row for row in rows if row.where is not None]
        # Sending only ever takes slots, so what is full stays full for the rest of the plan.
        full = self._full[needs] = frozenset((row.node.node_id, row.instance.key) for row in able)
        return full

    def _sent(self, entry: Waiting, model: str, attempt: Attempt) -> None:
        if self._drains:
            self._drains = {k: drain for k, drain in self._drains.items() if drain.model != attempt.model}
        request_id, snapshot = entry.request.request_id, self._snapshot
        running = Running(request_id, attempt.model, self._now_s, None, attempt.prefill_s, attempt.out_tokens)
        waiting = {**snapshot.waiting, model: snapshot.waiting[model] - 1}
        self._snapshot = _with_attempt(snapshot, attempt, running, waiting)
        self._moment = self._moment_now()

    def _starving_among(self, oldest: Mapping[str, Waiting]) -> set[str]:
        """The oldest request of each model that had none sent for `drain_after_s`."""
        before_s = self._now_s - self._policy.drain_after_s
        return {
            entry.request.request_id
            for entry in oldest.values()
            if entry.arrival_s <= before_s and any(self._is_unserved(model) for model in entry.request.chain)
        }

    def _is_unserved(self, model: str) -> bool:
        before_s = self._now_s - self._policy.drain_after_s
        return self._snapshot.last_sent_s.get(model, before_s) <= before_s

    def drains_from_now_on(self) -> DrainState:
        """Those still needed, and one for each starving model whose best node needs busy ones evicted."""
        drains = dict(self._drains)
        for model, best in self._stuck.items():
            victims = best.where.victims
            if not victims.busy or best.where.drained or not self._is_unserved(model):
                continue
            old = drains.get(best.node_id)
            if old is not None and not _is_over_without_room(old, best.where.node):
                continue
            keys = frozenset(x.key for x in victims.idle + victims.busy)
            since_s = self._now_s if old is None else old.since_s
            drains[best.node_id] = Drain(model, best.instance_key, keys, since_s, best.where.load_s)
        return drains


def _could_send(where: Standing) -> bool:
    """Some request might be sent there now. Never False when one could be."""
    if where.instance.state == "hot":
        return where.own < where.slots
    return where.own < 1 and not where.node_loads_other and not where.victims.busy


def _is_over_without_room(drain: Drain, node: NodeView) -> bool:
    """All that was drained is empty, and still there is no room: others took it."""
    return not any(x.running for x in node.instances if x.key in drain.keys)


def _still_needed(drains: DrainState, snapshot: FleetSnapshot, waiting: Sequence[Waiting]) -> DrainState:
    """A drain ends when its model was sent anywhere, when nobody waits for it, or with its node."""
    waited_for = {model for entry in waiting for model in entry.request.chain}
    return {
        node_id: drain
        for node_id, drain in drains.items()
        if drain.model in waited_for
        and snapshot.last_sent_s.get(drain.model, float("-inf")) <= drain.since_s
        and node_id in snapshot.nodes
        and snapshot.nodes[node_id].status in ("online", "degraded")
    }


def _with_attempt(
    snapshot: FleetSnapshot, attempt: Attempt, running: Running, waiting: Mapping[str, int]
) -> FleetSnapshot:
    """The fleet as it is once the attempt has started, and who waits then."""
    before, node_id = snapshot.nodes, attempt.node_id
    node = before[node_id]
    instances = tuple([_after_start(x, attempt, running) for x in node.instances])
    nodes = {**before, node_id: node._replace(instances=instances, last_chosen_s=running.started_s)}
    only_work = [x.state for x in instances] == [x.state for x in node.instances]
    return snapshot._replace(
        nodes=nodes,
        waiting=waiting,
        last_sent_s={**snapshot.last_sent_s, attempt.model: running.started_s},
        worked=(before, nodes, (node_id,)) if only_work else None,
    )


def _after_start(instance: InstanceView, attempt: Attempt, running: Running) -> InstanceView:
    if instance.key in attempt.evicts:
        return instance._replace(state="warm", held=NOTHING_HELD)
    if instance.key != attempt.instance_key:
        return instance
    ran = (*instance.running, running)
    if instance.state in ("hot", "loading"):
        return instance._replace(running=ran)
    return instance._replace(
        running=ran,
        state="loading",
        loading_since_s=running.started_s,
        loading_expected_s=attempt.cost.load,
    )
