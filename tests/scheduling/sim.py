"""A discrete-event fleet in which estimates are true: who waits, for how long, under the real planner."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from herd.fleet.snapshot import FleetSnapshot, InstanceView, NodeView, Running
from herd.scheduling.plan import (
    NEW,
    Attempt,
    DrainState,
    Hold,
    Reject,
    Wait,
    Waiting,
    plan_queue,
    virtual_deadline,
)
from herd.scheduling.policy import Policy
from tests.scheduling.build import ask, fleet

BEAT_S = 5.0


@dataclass(frozen=True)
class Sent:
    request_id: str
    model: str
    node_id: str
    arrival_s: float
    sent_s: float


@dataclass
class Sim:
    """`arrivals`: (instant, model, completion tokens)."""

    nodes: dict[str, NodeView]
    arrivals: list[tuple[float, str, int]]
    policy: Policy
    until_s: float
    now_s: float = 0.0
    queue: dict[str, Waiting] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    drains: DrainState = field(default_factory=dict)
    drained: list[tuple[float, DrainState]] = field(default_factory=list)
    last_sent_s: dict[str, float] = field(default_factory=dict)

    def run(self) -> Sim:
        events = [
            (at_s, n, "arrive", (model, tokens)) for n, (at_s, model, tokens) in enumerate(self.arrivals)
        ]
        beats = range(int(self.until_s / BEAT_S) + 1)
        self._events = events + [(n * BEAT_S, -1 - n, "beat", ()) for n in beats]  # type: ignore[operator]
        heapq.heapify(self._events)
        self._number = len(self.arrivals)
        while self._events and self._events[0][0] <= self.until_s:
            self.now_s, number, kind, what = heapq.heappop(self._events)
            getattr(self, f"_{kind}")(number, *what)
            self._plan()
        return self

    def _at(self, at_s: float, kind: str, *what: object) -> None:
        self._number += 1
        heapq.heappush(self._events, (at_s, self._number, kind, what))  # type: ignore[misc]

    def _snapshot(self) -> FleetSnapshot:
        return fleet(*self.nodes.values(), last_sent_s=dict(self.last_sent_s))

    def _beat(self, number: int) -> None:
        pass

    def _arrive(self, number: int, model: str, tokens: int) -> None:
        request = ask(model, request_id=f"q{number}", max_tokens=tokens)
        deadline_s = virtual_deadline(request, self._snapshot(), self.policy, self.now_s)
        self.queue[request.request_id] = Waiting(request, NEW, self.now_s, deadline_s)

    def _plan(self) -> None:
        waiting = [
            x._replace(history=x.history._replace(waited_s=self.now_s - x.arrival_s))
            for x in self.queue.values()
        ]
        steps, self.drains = plan_queue(waiting, self._snapshot(), self.policy, self.now_s, self.drains)
        if self.drains:
            self.drained.append((self.now_s, self.drains))
        for request_id, step in steps:
            match step:
                case Attempt():
                    self._start(self.queue.pop(request_id), step)
                case Wait():
                    claim = (step.node_id, step.instance_key)
                    self.queue[request_id] = self.queue[request_id]._replace(held=False, claim=claim)
                case Hold():
                    self.queue[request_id] = self.queue[request_id]._replace(held=True, claim=None)
                case Reject():
                    self.rejected.append(request_id)
                    del self.queue[request_id]

    def _change(self, node_id: str, key: str, **fields: object) -> InstanceView:
        view = self.nodes[node_id]
        changed = {x.key: x._replace(**fields) if x.key == key else x for x in view.instances}  # type: ignore[arg-type]
        self.nodes[node_id] = view._replace(instances=tuple(changed.values()))
        return changed[key]

    def _held(self, node_id: str, key: str) -> InstanceView:
        return next(x for x in self.nodes[node_id].instances if x.key == key)

    def _start(self, entry: Waiting, step: Attempt) -> None:
        request_id = entry.request.request_id
        self.sent.append(Sent(request_id, step.model, step.node_id, entry.arrival_s, self.now_s))
        self.last_sent_s[step.model] = self.now_s
        for key in step.evicts:
            assert not self._held(step.node_id, key).running, "a busy model was evicted"
            self._change(step.node_id, key, state="warm")
        held = self._held(step.node_id, step.instance_key)
        running = Running(request_id, step.model, self.now_s, None, step.prefill_s, step.out_tokens)
        if held.state == "hot":
            assert len(held.running) < held.slots
            self._change(step.node_id, held.key, running=(*held.running, running))
            self._at(
                self.now_s + step.cost.prefill + step.cost.decode, "end", step.node_id, held.key, request_id
            )
            return
        assert not any(x.state == "loading" for x in self.nodes[step.node_id].instances), "two loads"
        self._change(
            step.node_id,
            held.key,
            state="loading",
            running=(running,),
            loading_since_s=self.now_s,
            loading_expected_s=step.cost.load,
        )
        loaded_s = self.now_s + step.cost.load
        self._at(loaded_s, "loaded", step.node_id, held.key)
        self._at(loaded_s + step.cost.prefill + step.cost.decode, "end", step.node_id, held.key, request_id)

    def _loaded(self, number: int, node_id: str, key: str) -> None:
        self._change(node_id, key, state="hot", last_used_s=self.now_s)

    def _end(self, number: int, node_id: str, key: str, request_id: str) -> None:
        left = tuple(x for x in self._held(node_id, key).running if x.request_id != request_id)
        self._change(node_id, key, running=left, last_used_s=self.now_s)

    def longest_gaps_s(self) -> dict[str, float]:
        """By model: the longest time in which somebody waited for it and none was sent."""
        gaps: dict[str, float] = {}
        models = {model for _, model, _ in self.arrivals}
        for model in models:
            served = sorted((x.sent_s, x.arrival_s, x.request_id) for x in self.sent if x.model == model)
            waiting = {f"q{n}": at_s for n, (at_s, name, _) in enumerate(self.arrivals) if name == model}
            last_s, longest = 0.0, 0.0
            for sent_s, _, request_id in [*served, (self.until_s, 0.0, "")]:
                oldest = min((at_s for at_s in waiting.values() if at_s <= sent_s), default=sent_s)
                longest = max(longest, sent_s - max(last_s, oldest))
                last_s = sent_s
                waiting.pop(request_id, None)
            gaps[model] = longest
        return gaps
