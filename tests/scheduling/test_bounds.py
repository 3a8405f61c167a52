"""How far a request goes: one node alone, one kind of server, and no other model than may serve it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.fleet.snapshot import FleetSnapshot, NodeView
from herd.request import InferenceRequest
from herd.scheduling.eligibility import prompts_on
from herd.scheduling.lookup import lookup
from herd.scheduling.plan import NEW, Attempt, History, Hold, Reject, Step, next_step, plan_queue
from herd.scheduling.policy import DEFAULT_POLICY
from herd.scheduling.steps import Waiting
from herd.trace import Exclusion
from tests.scheduling import strategies
from tests.scheduling.build import NOW, ask, fleet, instance, node

COMPLETIONS = "/v1/completions"
KINDS = ("ollama", "llama-server", "llama-router", "openai")


def step_of(request: InferenceRequest, snapshot: FleetSnapshot, history: History = NEW) -> Step:
    return next_step(request, snapshot, history, DEFAULT_POLICY, NOW)


def on(node_id: str, kind: str, *names: str, **fields: object) -> NodeView:
    return node(node_id, *[instance(name, backend_kind=kind) for name in names or ("m",)], **fields)


def completion(*chain: str, **fields: object) -> InferenceRequest:
    return ask(*chain, path=COMPLETIONS, **fields)


# ---- one node alone


@given(strategies.fleets(), strategies.requests(), st.sampled_from("abcdef"))
def test_a_pinned_request_is_sent_to_its_node_or_nowhere(
    snapshot: FleetSnapshot, request: InferenceRequest, only: str
):
    node_ids = [*snapshot.nodes, only]
    for node_id in node_ids:
        pinned = request._replace(only=node_id)
        step = step_of(pinned, snapshot)
        assert getattr(step, "node_id", node_id) == node_id
        alone = snapshot.nodes.get(node_id)
        if alone is not None and alone.status == "online":
            same = step_of(request, fleet(alone, stats=snapshot.stats, waiting=snapshot.waiting))
            assert type(same) is type(step)
            if isinstance(step, Reject) and isinstance(same, Reject):
                assert step.status == same.status


def test_the_others_are_left_out_by_name():
    step = step_of(ask(only="a"), fleet(node("a", instance()), node("b", instance()), node("c")))
    assert isinstance(step, Attempt)
    assert step.excluded == (Exclusion("b", "not_pinned"), Exclusion("c", "model_absent"))
    assert [card[0] for card in step.candidates] == ["a"]


def test_an_endpoint_that_the_node_lacks_is_said_of_the_node():
    path = "/v1/messages"
    can = instance(capabilities=frozenset({"completion", path}))
    request = ask(path=path, needs=frozenset({"completion", path}), only="a")
    step = step_of(request, fleet(node("a", instance()), node("b", can)))
    assert isinstance(step, Reject)
    assert step.status == 501
    assert step.message.startswith("model 'm' is on a node that does not offer /v1/messages; ")


def test_a_look_up_is_pinned_too():
    snapshot = fleet(node("a", instance(state="cold")), node("b", instance()))
    show = ask(path="/api/show", needs=frozenset())
    for only, served in ((None, "b"), ("a", "a"), ("b", "b")):
        found = lookup(show._replace(only=only), snapshot, NEW)
        assert found is not None
        assert found[0].node_id == served
    assert lookup(show._replace(only="c"), snapshot, NEW) is None


def test_whoever_waits_for_one_node_does_not_take_the_slot_of_another():
    busy, free = node("a", instance(running=1)), node("b", instance())
    waiting = Waiting(ask(only="a"), NEW, NOW, NOW + 1.0)
    other = Waiting(ask(request_id="r"), NEW, NOW, NOW + 2.0)
    changes, _ = plan_queue([waiting, other], fleet(busy, free), DEFAULT_POLICY, NOW)
    sent = {request_id: step.node_id for request_id, step in changes if isinstance(step, Attempt)}
    assert sent == {"r": "b"}


# ---- text completions


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_of_holders_binds_the_whole_chain(kind: str):
    """Its holder is busy by its own word, and only a server of another kind has the next model free."""
    held = node("a", instance(backend_kind=kind, busy_until_s=NOW + 9))
    for other in KINDS:
        step = step_of(completion("m", "n"), fleet(held, on("b", other, "n")))
        if prompts_on(kind) == prompts_on(other):
            assert isinstance(step, Attempt)
            assert step.model == "n"
        else:
            assert isinstance(step, Hold)
            assert step_of(ask("m", "n"), fleet(held, on("b", other, "n"))).node_id == "b"  # a chat may go


def test_an_offline_holder_binds_too():
    gone = on("a", "ollama", status="offline", last_beat_s=0.0)
    assert isinstance(step_of(completion("m", "n"), fleet(gone, on("b", "llama-server", "n"))), Hold)


def test_where_both_kinds_hold_it_the_first_attempt_binds_the_later_ones():
    both = fleet(
        on("a", "ollama"), on("b", "llama-server"), on("c", "openai", "m", "n"), on("d", "ollama", "n")
    )
    first = step_of(completion("m", "n"), both)
    assert isinstance(first, Attempt)
    for prompts, nodes in (("templated", ["a", "d"]), ("raw", ["b", "c"])):
        history, served = History(prompts=prompts), []
        while isinstance(step := step_of(completion("m", "n"), both, history), Attempt):
            served.append(step.node_id)
            history = history._replace(tried=history.tried | {step.node_id}, attempts=len(served))
        assert sorted(served) == nodes
        assert isinstance(step, Reject)
        assert step.status is None  # the last failure


def test_only_the_pinned_holder_counts():
    here = node("a", instance("m"), instance("n", backend_kind="llama-server"))
    there = on("b", "llama-server", "m")
    step = step_of(completion("m", "n", only="a"), fleet(here, there))
    assert isinstance(step, Attempt)
    busy = here._replace(
        instances=tuple([x._replace(busy_until_s=NOW + 9 if x.key == "m" else 0.0) for x in here.instances])
    )
    assert isinstance(step_of(completion("m", "n", only="a"), fleet(busy, there)), Hold)


def test_a_model_that_nobody_has_binds_nothing():
    for kind in KINDS:
        step = step_of(completion("nowhere", "n"), fleet(on("a", kind, "n")))
        assert isinstance(step, Attempt)
        assert step.model == "n"


@given(strategies.fleets(), strategies.requests(), st.lists(st.sampled_from(KINDS), min_size=6, max_size=6))
def test_a_text_completion_never_crosses(
    snapshot: FleetSnapshot, request: InferenceRequest, kinds: list[str]
):
    views = [
        view._replace(instances=tuple([x._replace(backend_kind=kind) for x in view.instances]))
        for view, kind in zip(snapshot.nodes.values(), kinds, strict=False)
    ]
    mixed = fleet(*views, stats=snapshot.stats)
    request = completion(*request.chain, tokens=request.est_tokens)
    holders = {prompts_on(one.backend_kind) for _, one in mixed.holders.get(request.chain[0], ())}
    history, seen = NEW, set()
    while isinstance(step := step_of(request, mixed, history), Attempt):
        kind = next(x for x in mixed.nodes[step.node_id].instances if x.key == step.instance_key).backend_kind
        seen.add(prompts_on(kind))
        history = history._replace(
            tried=history.tried | {step.node_id},
            attempts=history.attempts + 1,
            prompts=history.prompts or prompts_on(kind),
        )
    assert len(seen) <= 1
    assert not seen or len(holders) != 1 or seen == holders
