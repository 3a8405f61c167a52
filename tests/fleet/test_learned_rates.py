"""First guesses, what may be learned from, and what survives a restart."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.fleet.hardware import UNKNOWN_CPU, UNKNOWN_GPU, Machine
from herd.fleet.rates import BOUNDS, LearnedRates, Sample, first_guess
from herd.fleet.snapshot import Rates

GUESS = Rates(1000.0, 0.05, 10.0, 2.0)
NOTHING = Sample(None, None, None, None, None, None)


def learned(**fields):
    rates = LearnedRates()
    changed = rates.learn("n", "m", NOTHING._replace(**fields), GUESS)
    return changed, rates.rates("n", "m", GUESS)


def test_the_first_guess_follows_bandwidth_compute_and_disk():
    guess = first_guess(Machine(100e9, 10e12), size_bytes=6_000_000_000, parameters=10_000_000_000)
    assert guess.prefill_tokens_per_s == pytest.approx(500.0)
    assert guess.step_s == pytest.approx(0.003 + 6 / 75)
    assert guess.load_cold_s == pytest.approx(1.2 + 3.0)
    assert guess.load_warm_s == pytest.approx(1.2 + 0.6)


@pytest.mark.parametrize("machine", [UNKNOWN_CPU, UNKNOWN_GPU])
@pytest.mark.parametrize("size", [None, 0, 100_000_000])
@pytest.mark.parametrize("parameters", [None, 135_000_000])
def test_a_first_guess_is_never_zero_whatever_is_unknown(machine, size, parameters):
    assert all(value > 0 for value in first_guess(machine, size, parameters))


@pytest.mark.parametrize(
    ("tokens", "seconds", "speed"),
    [
        (200, 0.1, 1000 + 0.2 * (2000 - 1000)),
        (101, 0.0301, 1000 + 0.2 * (101 / 0.0301 - 1000)),
        (100, 0.1, None),
        (200, 0.03, None),
        (None, 0.1, None),
        (200, None, None),
    ],
)
def test_prefill_is_learned_from_more_than_100_uncached_tokens_and_30_ms(tokens, seconds, speed):
    changed, rates = learned(uncached_tokens=tokens, prefill_s=seconds)
    assert changed is (speed is not None)
    assert rates.prefill_tokens_per_s == pytest.approx(speed or 1000.0)


@pytest.mark.parametrize(
    ("tokens", "seconds", "step"),
    [
        (11, 1.0, 0.05 + 0.2 * (0.1 - 0.05)),
        (9, 0.8, 0.05 + 0.2 * (0.1 - 0.05)),
        (8, 0.8, None),
        (11, None, None),
    ],
)
def test_a_step_is_learned_from_more_than_8_tokens(tokens, seconds, step):
    changed, rates = learned(completion_tokens=tokens, decode_s=seconds)
    assert changed is (step is not None)
    assert rates.step_s == pytest.approx(step or 0.05)


@pytest.mark.parametrize(
    ("load_s", "was", "cold", "warm"),
    [
        (20.0, "cold", 14.0, 2.0),
        (7.0, "warm", 10.0, 4.0),
        (20.0, None, 10.0, 2.0),
        (0.01, "cold", 10.0, 2.0),
        (-1.0, "cold", 10.0, 2.0),
    ],
)
def test_a_load_counts_for_the_state_it_started_from(load_s, was, cold, warm):
    _, rates = learned(load_s=load_s, loaded_from=was)
    assert (rates.load_cold_s, rates.load_warm_s) == pytest.approx((cold, warm))


def test_output_length_starts_at_150_and_moves_by_a_twentieth():
    rates = LearnedRates()
    assert rates.stats("m") is None
    rates.learn_answer("m", 350, 0, 0.0)
    stats = rates.stats("m")
    assert stats is not None
    assert stats.out_tokens == pytest.approx(160.0)


def test_the_token_correction_is_real_over_estimated_within_reason():
    rates = LearnedRates()
    rates.learn_answer("m", 0, prompt_tokens=150, est_tokens=100)
    assert rates.stats("m").token_correction == pytest.approx(1.1)
    rates.learn_answer("m", 0, prompt_tokens=10**9, est_tokens=1)
    assert rates.stats("m").token_correction <= 5.0
    before = rates.stats("m")
    rates.learn_answer("m", 0, prompt_tokens=0, est_tokens=100)
    rates.learn_answer("m", 0, prompt_tokens=100, est_tokens=0)
    assert rates.stats("m") == before


def test_what_was_learned_survives_a_restart_and_only_news_are_dirty():
    rates = LearnedRates()
    rates.learn("n", "m", NOTHING._replace(uncached_tokens=500, prefill_s=1.0), GUESS)
    rates.learn_answer("m", 50, 0, 0.0)
    dirty = rates.take_dirty()
    assert sorted(dirty) == sorted(rates.export())
    assert {tuple(row)[:3] for row in dirty} == {("n", "m", "prefill_tokens_per_s"), ("", "m", "out_tokens")}
    assert rates.take_dirty() == []
    again = LearnedRates()
    again.load(tuple(row) for row in dirty)
    assert again.take_dirty() == []
    assert again.rates("n", "m", GUESS) == rates.rates("n", "m", GUESS)
    assert again.stats("m") == rates.stats("m")


@pytest.mark.parametrize(
    "row",
    [
        ("n", "m", "hat_size", 3.0),
        ("n", "m", "step_s", 0.0),
        ("n", "m", "step_s", float("nan")),
        ("n", "m", "step_s", float("inf")),
    ],
)
def test_a_row_that_means_nothing_is_left_out(row):
    rates = LearnedRates()
    rates.load([row])
    assert rates.export() == []


@given(
    st.lists(
        st.builds(
            Sample,
            *[st.one_of(st.none(), st.floats())] * 5,
            st.sampled_from([None, "cold", "warm"]),
        ),
        max_size=20,
    )
)
def test_no_sample_however_broken_makes_a_rate_useless(samples):
    rates = LearnedRates()
    for sample in samples:
        rates.learn("n", "m", sample, GUESS)
    for _, _, quantity, value in rates.export():
        low, high = BOUNDS[quantity]
        assert low <= value <= high
