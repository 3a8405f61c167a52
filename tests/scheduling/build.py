"""Fleets in a few words, for the tables of these tests. Every default is a round number on purpose."""

from __future__ import annotations

from herd.fleet.held import Held, PromptCache
from herd.fleet.snapshot import (
    FleetSnapshot,
    InstanceView,
    ModelName,
    ModelStats,
    NodeView,
    Rates,
    Running,
    listing_of,
)
from herd.request import InferenceRequest, PrefixMark
from herd.scheduling.estimate import Ask
from herd.scheduling.policy import DEFAULT_POLICY
from herd.scheduling.score import Candidate, Ranking
from herd.scheduling.signals import degraded_s
from herd.scheduling.standing import Cost, cost_of
from herd_node.protocol.routes import FORWARDED_BY_PATH

NOW = 1000.0
GB = 10**9

#: 100 prompt tokens at 100 tokens/s after 0.02 s: p = 1.02; 150 tokens at 0.02 s: d = 3.0; E = 4.02.
RATES = Rates(prefill_tokens_per_s=100.0, step_s=0.02, load_cold_s=8.0, load_warm_s=2.0)
WORDS = frozenset({"completion"})
OLLAMA = "ollama-11434"


def run(ago_s: float = 0.4, first_ago_s: float | None = None) -> Running:
    """A request in a slot: p = 1, 150 tokens of 0.02 s."""
    first_s = None if first_ago_s is None else NOW - first_ago_s
    return Running("r", "m", NOW - ago_s, first_s, prefill_s=1.0, out_tokens=150.0)


def holding(*sequences: tuple[PrefixMark, ...]) -> Held:
    """A prompt cache in which these sequences lie, oldest first."""
    cache = PromptCache()
    for sequence in filter(None, sequences):
        cache.add(sequence, len(sequences))
    return cache.held


def instance(
    name: str = "m",
    state: str = "hot",
    *,
    running: int | tuple[Running, ...] = 0,
    names: tuple[str, ...] | None = None,
    capabilities: frozenset[str] = WORDS,
    **fields: object,
) -> InstanceView:
    """A number of `running` requests stands for as many that were sent 0.4 s ago."""
    shown = names or (name,)
    if "held" in fields:
        fields["held"] = holding(*fields["held"])  # type: ignore[misc]
    ran = tuple(run() for _ in range(running)) if isinstance(running, int) else running
    given: dict[str, object] = {
        "backend_id": OLLAMA,
        "backend_kind": "ollama",
        "key": name,
        "slots": 1,
        "loading_since_s": None,
        "loading_expected_s": None,
        "kv_bytes_per_token": None,
        "context_tokens": None,
        "context_train_tokens": None,
        "context_fixed": False,
        "members": (),
        "bad_until_s": 0.0,
        "busy_until_s": 0.0,
        "rates": RATES,
        "running": ran,
        "size_bytes": 4 * GB,
        **fields,
    }
    listed = tuple(ModelName(canonical=x, shown=x, capabilities=capabilities) for x in shown)
    return InstanceView(node_id="", names=listed, state=state, **given)  # type: ignore[arg-type]


def node(node_id: str, *instances: InstanceView, **fields: object) -> NodeView:
    """An online machine, idle, of which the memory is not known."""
    given: dict[str, object] = {"status": "online", "last_beat_s": NOW, **fields}
    placed = tuple(x._replace(node_id=node_id) for x in instances)
    return NodeView(node_id=node_id, instances=placed, **given)  # type: ignore[arg-type]


def fleet(*nodes: NodeView, **fields: object) -> FleetSnapshot:
    online = any(view.status in ("online", "degraded") for view in nodes)
    given: dict[str, object] = {"any_online": online, **fields}
    by_id = {view.node_id: view for view in nodes}
    return FleetSnapshot(nodes=by_id, listing=listing_of(nodes), **given)  # type: ignore[arg-type]


def ask(*chain: str, tokens: float = 100.0, path: str = "/api/chat", **fields: object) -> InferenceRequest:
    """A request for `m` of 100 prompt tokens, if nothing else is said."""
    names = chain or ("m",)
    given: dict[str, object] = {
        "request_id": "q",
        "needs": frozenset({"completion"}),
        "est_tokens": tokens,
        **fields,
    }
    return InferenceRequest(
        route=FORWARDED_BY_PATH[path], chain=names, asked=names, body=b"", stream=True, **given
    )  # type: ignore[arg-type]


def stats(out_tokens: float = 150.0, token_correction: float = 1.0) -> ModelStats:
    return ModelStats(out_tokens=out_tokens, token_correction=token_correction)


def candidate_cost(candidate: Candidate, asked: Ask, ranking: Ranking) -> Cost:
    """The parts of a candidate's T."""
    late_s = degraded_s(ranking.unit, DEFAULT_POLICY) if candidate.where.late else 0.0
    return cost_of(candidate.where, asked, candidate.cached, NOW, late_s)
