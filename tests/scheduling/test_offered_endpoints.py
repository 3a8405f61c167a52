"""Requests for what not every backend offers: excluded, refused with a sentence, or looked up."""

from __future__ import annotations

import pytest

from herd.scheduling.lookup import lookup
from herd.scheduling.plan import NEW, Attempt, History, Hold, Reject, next_step
from herd.scheduling.policy import DEFAULT_POLICY
from herd_node.protocol.routes import FORWARDED_BY_PATH, OFFERED_BY
from tests.scheduling.build import NOW, ask, fleet, instance, node

CAN = frozenset({"completion"})


def request(path: str, *more: str):
    return ask(path=path, needs=FORWARDED_BY_PATH[path].needs | frozenset(more))


def holder(node_id: str, *words: str, **fields: object):
    return node(node_id, instance(capabilities=CAN | frozenset(words)), **fields)


def step(path: str, *nodes, more: tuple[str, ...] = ()):
    return next_step(request(path, *more), fleet(*nodes), NEW, DEFAULT_POLICY, NOW)


@pytest.mark.parametrize("path", OFFERED_BY)
def test_only_a_node_that_offers_it_gets_the_request(path: str):
    found = step(path, holder("a"), holder("b", path), holder("c"))
    assert isinstance(found, Attempt)
    assert found.node_id == "b"
    assert {exclusion.reason for exclusion in found.excluded} == {"capability_missing"}


@pytest.mark.parametrize("path", OFFERED_BY)
def test_where_nobody_offers_it_the_sentence_says_who_would(path: str):
    found = step(path, holder("a"), holder("b", "/v1/something/else"))
    assert isinstance(found, Reject)
    assert found.status == 501
    assert found.message == f"model 'm' is on no node that offers {path}; {OFFERED_BY[path]} would"


def test_what_the_model_itself_lacks_is_named_first():
    found = step("/v1/messages", holder("a"), more=("tools",))
    assert isinstance(found, Reject)
    assert (found.status, "support /v1/messages, tools" in found.message) == (400, True)
    found = step("/v1/messages", holder("a", "/v1/messages"), more=("tools",))
    assert isinstance(found, Reject)
    assert (found.status, "support tools" in found.message) == (400, True)


def test_whoever_offers_it_and_cannot_now_is_waited_for():
    found = step("/v1/messages", holder("a"), holder("b", "/v1/messages", status="offline"))
    assert isinstance(found, Hold)


def test_a_model_of_which_nothing_is_known_is_left_to_its_node():
    found = step("/v1/messages", node("a", instance(capabilities=frozenset())))
    assert isinstance(found, Attempt)


def test_a_count_is_looked_up_where_it_is_offered_however_busy_the_node_is():
    path = "/v1/messages/count_tokens"
    busy = node("b", instance(capabilities=CAN | {path}, running=3))
    snapshot = fleet(holder("a"), busy)
    found = lookup(request(path), snapshot, NEW)
    assert found is not None
    assert found[0].node_id == "b"
    assert lookup(request(path), snapshot, History(tried=frozenset({"b"}))) is None
    assert lookup(ask(path="/api/show", needs=frozenset()), snapshot, NEW) is not None
