"""Slots as live attempts: what they do to an instance's state, what settles, what is learned."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.fleet.attempt import sample
from herd.fleet.events import AttemptEnded, AttemptFirstRecord, AttemptStarted, InstanceFreed, ModelChanged
from herd.fleet.rates import LearnedRates
from herd.fleet.registry import AttemptResult
from herd.fleet.snapshot import Rates
from tests.fleet.build import HOST, KEY, OLLAMA, beat, marks, model, online, start


def hear(registry, now_s, *models):
    registry.on_beat(beat("attic", *models), HOST, now_s)


def state(registry):
    return registry.instance("attic", KEY).state


RATES = Rates(100.0, 0.02, 8.0, 2.0)
DONE = AttemptResult(ok=True)
FAILED = AttemptResult(ok=False)


def test_an_attempt_takes_a_slot_and_gives_it_back():
    registry = online(model())
    token = start(registry, 1.0, request_id="q1")
    view = registry.instance("attic", KEY)
    assert [(one.request_id, one.model, one.started_s, one.first_record_s) for one in view.running] == [
        ("q1", "llama3:8b", 1.0, None)
    ]
    assert view.taken == 1
    registry.first_record(token, 1.5)
    assert registry.instance("attic", KEY).running[0].first_record_s == 1.5
    registry.end_attempt(token, 2.0, DONE)
    assert registry.instance("attic", KEY).taken == 0
    assert registry.drain_events() == [
        AttemptStarted("attic", KEY, "q1"),
        AttemptFirstRecord("attic", KEY, "q1"),
        AttemptEnded("attic", KEY, "q1", True, False),
    ]


def test_whoever_drains_some_types_of_events_gets_those_and_the_others_are_gone():
    registry = online(model(state="warm"))
    registry.end_attempt(start(registry, 1.0), 2.0, DONE)
    assert registry.drain_events((ModelChanged,)) == [
        ModelChanged("attic", KEY, "loading"),
        ModelChanged("attic", KEY, "hot"),
    ]
    assert registry.drain_events() == []


maybe_s = st.none() | st.floats(0.0, 100.0)
maybe_tokens = st.none() | st.integers(0, 1000)


@given(
    st.builds(
        AttemptResult,
        ok=st.just(True),
        prompt_tokens=maybe_tokens,
        cached_tokens=maybe_tokens,
        completion_tokens=maybe_tokens,
        ttft_s=maybe_s,
        total_s=maybe_s,
        prefill_ms=maybe_s,
        decode_ms=maybe_s,
        load_s=maybe_s,
    ),
    st.sampled_from(("hot", "warm")),
)
def test_an_answer_without_a_time_teaches_no_speed(outcome, state):
    registry = online(model(state=state))
    learned = LearnedRates().learn("attic", "m", sample(start(registry, 1.0), outcome), RATES)
    assert outcome.timed or not learned


def test_ending_an_attempt_twice_frees_one_slot():
    registry = online(model())
    first, second = start(registry, 1.0), start(registry, 1.0)
    registry.end_attempt(first, 2.0, DONE)
    registry.end_attempt(first, 2.0, AttemptResult(ok=False, cancelled=True, settle_s=9.0))
    registry.first_record(first, 3.0)
    assert len(registry.instance("attic", KEY).running) == 1
    registry.abandon_attempt(second, 2.0)
    assert registry.instance("attic", KEY).taken == 0


def test_a_cold_model_is_loading_from_the_moment_it_is_sent_to_and_hot_at_its_first_record():
    registry = online(model(state="cold"))
    token = start(registry, 1.0)
    view = registry.instance("attic", KEY)
    assert (view.state, view.loading_since_s, view.slots) == ("loading", 1.0, 1)
    assert view.loading_expected_s == view.rates.load_cold_s
    registry.first_record(token, 4.0)
    view = registry.instance("attic", KEY)
    assert (view.state, view.loading_since_s, view.slots) == ("hot", None, 2)
    assert [event.state for event in registry.drain_events() if isinstance(event, ModelChanged)] == [
        "loading",
        "hot",
    ]


def test_a_warm_model_is_expected_to_load_faster():
    registry = online(model(state="warm"))
    start(registry, 1.0)
    view = registry.instance("attic", KEY)
    assert view.loading_expected_s == view.rates.load_warm_s


def test_an_answer_without_a_first_record_proves_the_model_hot_too():
    registry = online(model(state="cold"))
    registry.end_attempt(start(registry, 1.0), 3.0, DONE)
    assert state(registry) == "hot"


@pytest.mark.parametrize("was", ["cold", "warm"])
def test_a_load_that_failed_leaves_the_model_as_it_was(was):
    registry = online(model(state=was))
    registry.end_attempt(start(registry, 1.0), 3.0, FAILED)
    assert state(registry) == was


def test_a_load_goes_on_for_the_others_when_one_request_fails():
    registry = online(model(state="cold"))
    first, second = start(registry, 1.0), start(registry, 1.5)
    registry.end_attempt(first, 2.0, FAILED)
    assert state(registry) == "loading"
    registry.end_attempt(second, 2.0, FAILED)
    assert state(registry) == "cold"


def test_a_load_survives_its_caller_and_beats_that_know_less_for_three_times_its_estimate():
    registry = online(model(state="cold"))
    patience_s = 3 * registry.instance("attic", KEY).rates.load_cold_s
    registry.end_attempt(start(registry, 1.0), 2.0, AttemptResult(ok=False, cancelled=True, settle_s=2.5))
    hear(registry, 0.9 + patience_s, model(state="cold"))
    assert state(registry) == "loading"
    hear(registry, 1.1 + patience_s, model(state="cold"))
    assert state(registry) == "cold"


def test_a_beat_that_calls_a_working_model_cold_is_not_believed():
    registry = online(model())
    token = start(registry, 1.0)
    hear(registry, 100.0, model(state="cold"))
    assert state(registry) == "hot"
    registry.end_attempt(token, 101.0, DONE)
    hear(registry, 105.9, model(state="cold"))
    assert state(registry) == "hot", "the beat may have been written before the answer ended"
    hear(registry, 106.1, model(state="cold"))
    assert state(registry) == "cold"


def test_an_unload_after_the_last_answer_is_believed_at_once():
    registry = online(model())
    registry.end_attempt(start(registry, 1.0), 10.0, DONE)
    hear(registry, 11.0, model(state="warm", unloaded_s_ago=1.5))
    assert state(registry) == "hot", "it was unloaded before the answer that proved it hot"
    hear(registry, 11.1, model(state="warm", unloaded_s_ago=0.5))
    assert state(registry) == "warm"


def test_a_beat_that_calls_a_model_hot_ends_its_load():
    registry = online(model(state="cold"))
    start(registry, 1.0)
    hear(registry, 5.0, model())
    assert registry.instance("attic", KEY).loading_since_s is None
    assert state(registry) == "hot"


def test_a_load_that_only_the_agent_knows_of_counts_from_its_first_beat():
    registry = online(model(state="cold"))
    hear(registry, 5.0, model(state="loading"))
    hear(registry, 10.0, model(state="loading"))
    view = registry.instance("attic", KEY)
    assert (view.state, view.loading_since_s) == ("loading", 5.0)
    hear(registry, 15.0, model(state="cold"))
    assert state(registry) == "cold"


# ---- settling -------------------------------------------------------------------------------------------

LEFT = AttemptResult(ok=False, cancelled=True, settle_s=2.5)


def test_a_request_cancelled_before_its_first_record_keeps_its_slot_taken_for_a_while():
    registry = online(model())
    registry.end_attempt(start(registry, 1.0), 2.0, LEFT)
    view = registry.snapshot(4.4).nodes["attic"].instances[0]
    assert (view.running, view.settling_until_s, view.taken) == ((), (4.5,), 1)
    assert registry.next_due_s() == 4.5
    registry.drain_events()
    assert registry.snapshot(4.5).nodes["attic"].instances[0].taken == 0
    assert registry.drain_events() == [InstanceFreed("attic", KEY)]
    assert registry.next_due_s() is None


def test_a_slot_has_settled_when_the_backend_shows_it_idle():
    registry = online(model())
    registry.end_attempt(start(registry, 1.0), 2.0, LEFT)
    registry.settled("attic", KEY, 2.1)
    assert registry.instance("attic", KEY).taken == 0


def test_a_beat_with_idle_slots_settles_only_what_it_can_have_seen():
    registry = online(model())
    registry.end_attempt(start(registry, 1.0), 2.0, AttemptResult(ok=False, cancelled=True, settle_s=60.0))
    hear(registry, 2.5, model(slots_taken=0))
    assert registry.instance("attic", KEY).taken == 1
    hear(registry, 3.5, model(slots_taken=1))
    assert registry.instance("attic", KEY).taken == 1
    hear(registry, 4.0, model(slots_taken=0))
    assert registry.instance("attic", KEY).taken == 0


# ---- marks ----------------------------------------------------------------------------------------------


def test_busy_and_bad_marks_end_by_themselves_and_wake_the_planner():
    registry = online(model())
    registry.mark_busy("attic", KEY, 3.0)
    registry.mark_busy("attic", KEY, 2.0)
    registry.mark_bad("attic", KEY, 61.0)
    view = registry.instance("attic", KEY)
    assert (view.busy_until_s, view.bad_until_s) == (3.0, 61.0)
    assert registry.next_due_s() == 2.0
    registry.drain_events()
    registry.snapshot(61.0)
    assert registry.drain_events() == [InstanceFreed("attic", KEY)] * 3


def test_marks_of_an_instance_that_is_gone_are_no_error():
    registry = online(model())
    registry.mark_busy("attic", "no such", 3.0)
    registry.mark_bad("attic", "no such", 3.0)
    registry.settled("attic", "no such", 3.0)
    with pytest.raises(KeyError):
        start(registry, 1.0, key="no such")


# ---- learning -------------------------------------------------------------------------------------------

SPOKE = AttemptResult(
    ok=True,
    total_s=11.0,
    ttft_s=1.0,
    prompt_tokens=2000,
    cached_tokens=0,
    completion_tokens=101,
    prefill_ms=1000.0,
    decode_ms=10_000.0,
)


def test_a_request_that_ran_alone_teaches_speed_and_the_views_show_it():
    registry = online(model())
    guess = registry.instance("attic", KEY).rates
    registry.end_attempt(start(registry, 1.0, prefixes=marks("s", "q")), 12.0, SPOKE)
    rates = registry.instance("attic", KEY).rates
    assert rates.prefill_tokens_per_s == pytest.approx(guess.prefill_tokens_per_s * 0.8 + 2000 * 0.2)
    assert rates.step_s == pytest.approx(guess.step_s * 0.8 + 0.1 * 0.2)
    stats = registry.snapshot(12.0).stats["llama3:8b"]
    assert stats.out_tokens == pytest.approx(150 + 0.05 * (101 - 150))
    assert stats.token_correction == pytest.approx(1 + 0.2 * (5.0 - 1)), (
        "2,000 real, 200 estimated, bounded by 5"
    )


def test_requests_that_met_teach_no_speed_but_their_length():
    registry = online(model(), model("b", weights="w"))
    guess = registry.instance("attic", KEY).rates
    first = start(registry, 1.0)
    second = start(registry, 2.0, key=f"{OLLAMA}|w", name="b")
    registry.end_attempt(second, 3.0, SPOKE)
    registry.end_attempt(first, 12.0, SPOKE)
    assert registry.instance("attic", KEY).rates == guess
    assert set(registry.snapshot(12.0).stats) == {"llama3:8b", "b"}


def test_work_of_another_router_is_company_too():
    registry = online(model())
    guess = registry.instance("attic", KEY).rates
    token = start(registry, 1.0)
    registry.on_beat(beat("attic", model(), in_flight={"llama3:8b": 2}), HOST, 5.0)
    registry.end_attempt(token, 12.0, SPOKE)
    assert registry.instance("attic", KEY).rates == guess


def test_a_failed_request_teaches_nothing():
    registry = online(model())
    guess = registry.instance("attic", KEY).rates
    registry.end_attempt(start(registry, 1.0), 12.0, SPOKE._replace(ok=False))
    assert registry.instance("attic", KEY).rates == guess
    assert registry.snapshot(12.0).stats == {}


def test_where_the_cache_may_have_helped_unseen_no_prefill_is_learned():
    registry = online(model())
    unseen = SPOKE._replace(cached_tokens=None, decode_ms=None, completion_tokens=None)
    registry.end_attempt(start(registry, 1.0, prefixes=marks("s", "a")), 2.0, unseen)
    first = registry.instance("attic", KEY).rates
    registry.end_attempt(start(registry, 3.0, prefixes=marks("s", "b")), 4.0, unseen)
    assert registry.instance("attic", KEY).rates == first
    registry.end_attempt(start(registry, 5.0, prefixes=marks("t", "b")), 6.0, unseen)
    assert registry.instance("attic", KEY).rates != first


@pytest.mark.parametrize(("was", "quantity"), [("cold", "load_cold_s"), ("warm", "load_warm_s")])
def test_the_first_token_after_a_load_teaches_its_length(was, quantity):
    registry = online(model(state=was))
    guess = getattr(registry.instance("attic", KEY).rates, quantity)
    result = AttemptResult(ok=True, ttft_s=31.0, prefill_ms=1000.0, total_s=40.0)
    registry.end_attempt(start(registry, 1.0), 41.0, result)
    assert getattr(registry.instance("attic", KEY).rates, quantity) == pytest.approx(guess * 0.6 + 30.0 * 0.4)


def test_rates_belong_to_the_weights_and_outlive_the_listing():
    registry = online(model())
    registry.end_attempt(start(registry, 1.0), 12.0, SPOKE)
    rates = registry.instance("attic", KEY).rates
    hear(registry, 13.0)
    hear(registry, 14.0, model("renamed"))
    assert registry.instance("attic", KEY).rates == rates
    again = online(model())
    again.load_rates(tuple(row) for row in registry.rates.export())
    assert again.instance("attic", KEY).rates == rates
    assert again.snapshot(0.0).stats == {"llama3:8b": registry.snapshot(14.0).stats["llama3:8b"]}


# ---- busy share, arrivals, order ------------------------------------------------------------------------


def test_the_busy_share_grows_while_anything_runs_and_fades_after():
    registry = online(model())
    view = registry.snapshot(0.0).nodes["attic"]
    assert view.busy_share == (0.0, 0.0, False)
    first, second = start(registry, 100.0), start(registry, 150.0)
    assert registry.snapshot(150.0).nodes["attic"].busy_share == (0.0, 100.0, True)
    registry.end_attempt(first, 200.0, DONE)
    registry.end_attempt(second, 280.0, DONE)
    share = registry.snapshot(280.0).nodes["attic"].busy_share
    assert share == (pytest.approx(1 - 2.718281828**-1.0), 280.0, False)


def test_the_last_choice_and_the_last_send_are_remembered():
    registry = online(model())
    registry.end_attempt(start(registry, 7.0), 9.0, DONE)
    snapshot = registry.snapshot(9.0)
    assert snapshot.nodes["attic"].last_chosen_s == 7.0
    assert snapshot.last_sent_s == {"llama3:8b": 7.0}
    assert snapshot.nodes["attic"].instances[0].last_used_s == 9.0
    assert snapshot.nodes["attic"].instances[0].arrival_rate == (pytest.approx(1 / 300), 7.0)
