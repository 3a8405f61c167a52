"""How long the scheduler takes for one decision with its eight cards, in this process, without any I/O.

Between two decisions one node changes, as it does in a router: the request that was decided is started and
ends. So what the scheduler keeps of the other nodes counts, and what it must make anew of that one does too.
"""

from __future__ import annotations

import statistics
import time
from typing import NamedTuple

from bench import fleet
from herd.fleet.registry import AttemptResult, Registry
from herd.request import InferenceRequest, PrefixMark
from herd.scheduling import plan
from herd.scheduling.policy import DEFAULT_POLICY
from herd_node.protocol.names import canonical
from herd_node.protocol.routes import FORWARDED_BY_PATH

NODE_COUNTS = (10, 100, 1000)
_SLOTS = 4
_DECISIONS = 400
_STEP_S = 0.001
_PROMPT_TOKENS = 400.0
#: Of different speeds, so that the ranking has something to rank.
_GPUS = ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 3060")


class Decision(NamedTuple):
    """Medians in µs. `snapshot_us`: taking in the node that changed; `plan_us`: choosing, with the cards."""

    nodes: int
    snapshot_us: float
    plan_us: float

    @property
    def total_us(self) -> float:
        return self.snapshot_us + self.plan_us


def measure(node_count: int, decisions: int = _DECISIONS) -> Decision:
    """A fleet with the model hot everywhere, half of the nodes with every slot taken."""
    registry, now_s = _fleet(node_count)
    table = plan.CostTable()
    snapshots, plans = [], []
    for number in range(decisions):
        now_s += _STEP_S
        request = _request(f"d{number}", number)
        began = time.perf_counter_ns()
        snapshot = registry.snapshot(now_s)
        seen = time.perf_counter_ns()
        step = plan.next_step(request, snapshot, plan.NEW, DEFAULT_POLICY, now_s, table=table)
        decided = time.perf_counter_ns()
        snapshots.append((seen - began) / 1e3)
        plans.append((decided - seen) / 1e3)
        assert isinstance(step, plan.Attempt)
        assert len(step.candidates) == min(8, node_count)
        _carry_out(registry, request, step, now_s)
    warm = decisions // 10
    return Decision(node_count, statistics.median(snapshots[warm:]), statistics.median(plans[warm:]))


def _fleet(node_count: int) -> tuple[Registry, float]:
    registry, now_s = Registry(router_id="bench"), 1000.0
    for number in range(node_count):
        node_id, boot = f"node-{number:04}", f"{number:016x}"
        gpu = _GPUS[number % len(_GPUS)]
        beat = fleet.beat(node_id, f"{number:016x}", boot, 1, 20000, slots=_SLOTS, wide_slots=_SLOTS, gpu=gpu)
        registry.on_beat(beat, "127.0.0.1", now_s)
    for target in registry.probes_due(now_s):
        registry.on_probe(target.node_id, True, now_s, target=target)
    key = {
        node.node_id: instance.key
        for node, instance in registry.snapshot(now_s).holders[canonical(fleet.MODEL)]
    }
    for number, (node_id, instance_key) in enumerate(sorted(key.items())):
        taken = _SLOTS if number % 2 else 1
        for slot in range(taken):
            request = _request(f"r{number}-{slot}", 1_000_000 + number * _SLOTS + slot)
            registry.start_attempt(
                node_id,
                instance_key,
                request.request_id,
                request.chain[0],
                0.1,
                150.0,
                request.prefixes,
                now_s,
            )
    return registry, now_s


def _carry_out(registry: Registry, request: InferenceRequest, step: plan.Attempt, now_s: float) -> None:
    token = registry.start_attempt(
        step.node_id,
        step.instance_key,
        request.request_id,
        step.model,
        step.prefill_s,
        step.out_tokens,
        request.prefixes,
        now_s,
    )
    registry.end_attempt(token, now_s, outcome=AttemptResult(ok=True))


def _request(request_id: str, number: int) -> InferenceRequest:
    """A system message that all share, a question of its own."""
    marks = (PrefixMark(b"system", 25.0), PrefixMark(b"%012d" % number, _PROMPT_TOKENS))
    return InferenceRequest(
        request_id=request_id,
        route=FORWARDED_BY_PATH["/v1/chat/completions"],
        chain=(canonical(fleet.MODEL),),
        asked=(fleet.MODEL,),
        body=b"",
        stream=True,
        est_tokens=_PROMPT_TOKENS,
        max_tokens=200,
        needs=frozenset({"completion"}),
        prefixes=marks,
    )
