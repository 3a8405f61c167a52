"""A call that only reads (`show`, `count`): any node that can answer it may, without a slot. Pure."""

from __future__ import annotations

from herd.fleet.snapshot import FleetSnapshot, InstanceView, NodeView
from herd.request import InferenceRequest
from herd.scheduling.bounds import holders_of
from herd.scheduling.eligibility import Needs, has_capabilities
from herd.scheduling.standing import Cost
from herd.scheduling.steps import Attempt, History
from herd.trace import ScoreCard

_FREE = Cost(*[0.0] * len(Cost._fields))


def lookup(
    request: InferenceRequest, snapshot: FleetSnapshot, history: History
) -> tuple[Attempt, InstanceView] | None:
    """The holder to ask: one that has it hot first, then by id. None: `next_step` says why, and for how long.

    Nothing is scored, so the card has no signals.
    """
    for index in range(history.model_index, len(request.chain)):
        name = request.chain[index]
        needs = Needs(name, request.needs, None)
        able = [
            (one.state != "hot", node.node_id, one)
            for node, one in holders_of(name, request.only, snapshot)
            if _answers(node, one) and node.node_id not in history.tried and has_capabilities(one, needs)
        ]
        if able:
            _, node_id, instance = min(able, key=lambda row: row[:2])
            card = ScoreCard(node_id, 0.0, ())
            step = Attempt(node_id, instance.key, name, index, card, (), (), _FREE, 0.0, 0.0, 0.0)
            return step, instance
    return None


def _answers(node: NodeView, instance: InstanceView) -> bool:
    return node.status in ("online", "degraded") and node.backends_ready.get(instance.backend_id, True)
