"""Rows and learning from one attempt."""

from __future__ import annotations

from typing import Any

from herd.dialects import Ending
from herd.errors import UpstreamFailed
from herd.proxy import records
from herd.proxy.calls import Peer
from herd.proxy.records import Sent
from herd.request import Principal
from herd.scheduling.plan import Attempt, Reject
from herd.trace import Exclusion, ScoreCard, Status, Trace
from tests.fleet.build import model, online, start
from tests.proxy.room_kit import cost, request

CARD = ScoreCard("attic", 110.0, (50.0,) * 7)
REQUEST = request("r1", "Llama3:8B", "other")._replace(
    arrival_s=100.0,
    arrival_wall_s=5000.0,
    principal=Principal("lan", "10.0.0.9", "10.0.0.9"),
    user="anna",
    tags=("a",),
    client_request_id="theirs",
    est_tokens=12.34,
)


def sent(*, cold: bool = False, model_index: int = 0) -> Sent:
    step = Attempt(
        "attic",
        "key",
        REQUEST.chain[model_index],
        model_index,
        CARD,
        (CARD,),
        (Exclusion("cellar", "offline"),),
        cost(),
        12.34,
        1.0,
        100.0,
    )
    token = start(online(model()), 0.0)
    peer = Peer("attic", "10.0.0.5", 11436, "a" * 16, "b" * 16)
    return Sent(step, token, peer, "ollama", cold, "0.1.0", 101.5, 5001.5, retries=1)


def row_of(one: Sent | None, status: Status, now_s: float, **more: Any) -> Trace:
    unknown = {"ttft_s": None, "ending": None, "error": None, "reject": None}
    return records.trace(REQUEST, one, status, number=2, router_id="r", now_s=now_s, **{**unknown, **more})


def test_a_started_row_has_the_choice_and_no_end():
    row = row_of(sent(), "started", 101.5)
    assert (row.request_id, row.attempt, row.status, row.timestamp) == ("r1", 2, "started", 5001.5)
    assert (row.node_id, row.score, row.card, row.candidates) == ("attic", 110.0, CARD, (CARD,))
    assert row.excluded == (Exclusion("cellar", "offline"),)
    assert (row.latency_ms, row.time_to_first_token_ms, row.queue_ms) == (None, None, 1500.0)
    assert (row.model, row.original_model) == ("llama3:8b", "Llama3:8B")
    assert (row.fallback_used, row.retry_count) == (False, 1)
    assert (row.client_request_id, row.user, row.tags) == ("theirs", "anna", ("a",))
    assert (row.client_ip, row.principal) == ("10.0.0.9", "lan")


def test_a_row_of_a_stand_in_says_what_served_and_what_was_asked_for():
    one = sent()
    one = one._replace(step=one.step._replace(model="loaded:8b", stand_in="Loaded:8b"))
    row = row_of(one, "started", 101.5)
    assert (row.model, row.original_model, row.fallback_used) == ("loaded:8b", "Llama3:8B", True)


def test_a_start_can_be_made_later():
    assert records.started(REQUEST, sent(), 2, "r") == row_of(sent(), "started", 999.0)


def test_every_field_stands_in_its_place():
    ending = Ending("complete", "stop", prompt_tokens=9, cached_tokens=4, completion_tokens=3, message="m")
    row = row_of(sent(model_index=1), "completed", 103.0, ttft_s=0.5, ending=ending)
    assert row == Trace(
        request_id="r1",
        attempt=2,
        status="completed",
        timestamp=5001.5,
        model="other",
        original_model="Llama3:8B",
        original_format="ollama",
        kind="chat",
        router_id="r",
        client_request_id="theirs",
        node_id="attic",
        score=110.0,
        card=CARD,
        candidates=(CARD,),
        excluded=(Exclusion("cellar", "offline"),),
        latency_ms=1500.0,
        time_to_first_token_ms=500.0,
        queue_ms=1500.0,
        prompt_tokens=9,
        cached_tokens=4,
        completion_tokens=3,
        retry_count=1,
        fallback_used=True,
        client_ip="10.0.0.9",
        principal="lan",
        user="anna",
        error_message="m",
        finish_reason="stop",
        estimated_tokens=12.3,
        tags=("a",),
        agent_version="0.1.0",
    )


def test_a_completed_row_has_the_counts_and_times():
    ending = Ending("complete", "stop", prompt_tokens=9, cached_tokens=4, completion_tokens=3)
    row = row_of(sent(model_index=1), "completed", 103.0, ttft_s=0.5, ending=ending)
    assert (row.latency_ms, row.time_to_first_token_ms) == (1500.0, 500.0)
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (9, 4, 3)
    assert (row.model, row.original_model, row.fallback_used) == ("other", "Llama3:8B", True)
    assert (row.finish_reason, row.error_message, row.estimated_tokens) == ("stop", None, 12.3)


def test_a_rejected_row_has_its_reasons_and_no_node():
    reject = Reject(503, "nobody", 5, (Exclusion("cellar", "busy_mark"),))
    row = row_of(None, "rejected", 130.0, error=UpstreamFailed("x" * 5000), reject=reject)
    assert (row.node_id, row.score, row.card, row.agent_version) == (None, None, None, None)
    assert row.excluded == (Exclusion("cellar", "busy_mark"),)
    assert (row.latency_ms, row.queue_ms, row.timestamp) == (30_000.0, 30_000.0, 5000.0)
    assert row.error_message == "x" * 1000


def test_the_load_is_what_the_prefill_does_not_explain():
    ending = Ending("complete", "stop", prefill_ms=200.0)
    assert records.result(sent(), ending, 3.0, 5.0, 10).load_s is None
    assert records.result(sent(cold=True), ending, 3.0, 5.0, 10).load_s == 2.8
    assert records.result(sent(cold=True), ending, 0.1, 5.0, 10).load_s == 0.0
    assert records.result(sent(cold=True), ending, None, 5.0, 10).load_s is None
    assert records.result(sent(cold=True), Ending("complete"), 3.0, 5.0, 0).est_tokens is None
