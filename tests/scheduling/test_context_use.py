"""What becomes of options that would make Ollama load a model anew, and who is chosen for a large context."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from herd.scheduling.context import ContextUse, context_use, is_reload
from herd.scheduling.plan import NEW, Attempt, Reject, Wait, next_step
from herd.scheduling.policy import DEFAULT_POLICY
from herd.scheduling.standing import cost
from tests.scheduling.build import NOW, ask, fleet, instance, node, run

STRIP = DEFAULT_POLICY
WARN, PASS = (replace(STRIP, context_protection=mode) for mode in ("warn", "passthrough"))
LOADED = instance(context_tokens=4096, context_train_tokens=8192)
GPU, THREADS = ("num_gpu", 20), ("num_thread", 8)


@pytest.mark.parametrize(
    ("wanted", "options", "loaded_with", "use"),
    [
        (None, (), (), ContextUse()),
        (4096, (), (), ContextUse()),
        (2048, (), (), ContextUse(num_ctx=4096, unequal=("num_ctx",))),
        (4, (), (), ContextUse(num_ctx=4096, unequal=("num_ctx",))),
        (6000, (), (), ContextUse(reload=True, unequal=("num_ctx",))),
        (None, (THREADS,), (), ContextUse(removed=("num_thread",), unequal=("num_thread",))),
        (None, (("num_thread", 0),), (), ContextUse(removed=("num_thread",))),
        (None, (THREADS,), (THREADS,), ContextUse()),
        (None, (THREADS, GPU), (THREADS,), ContextUse(removed=("num_gpu",), unequal=("num_gpu",))),
        (None, (), (THREADS,), ContextUse(reload=True)),
        (None, (), (GPU,), ContextUse()),
        (2048, (GPU,), (THREADS,), ContextUse(reload=True, unequal=("num_ctx", "num_gpu"))),
        (6000, (GPU,), (), ContextUse(reload=True, unequal=("num_ctx", "num_gpu"))),
        (
            2048,
            (GPU, THREADS),
            (),
            ContextUse(False, 4096, ("num_gpu", "num_thread"), ("num_ctx", "num_gpu", "num_thread")),
        ),
    ],
)  # fmt: skip
def test_strip_changes_what_would_load_a_hot_model_anew_without_need(
    wanted: int | None, options: Any, loaded_with: Any, use: ContextUse
):
    assert context_use(LOADED, wanted, options, loaded_with, STRIP) == use


@pytest.mark.parametrize("policy", [WARN, PASS])
@pytest.mark.parametrize(
    ("wanted", "options", "loaded_with", "use"),
    [
        (None, (), (), ContextUse()),
        (4096, (), (), ContextUse()),
        (2048, (), (), ContextUse(reload=True, unequal=("num_ctx",))),
        (6000, (), (), ContextUse(reload=True, unequal=("num_ctx",))),
        (None, (THREADS,), (), ContextUse(reload=True, unequal=("num_thread",))),
        (None, (("num_thread", 0),), (), ContextUse()),
        (None, (THREADS,), (THREADS,), ContextUse()),
        (None, (), (THREADS,), ContextUse(reload=True)),
    ],
)
def test_the_other_modes_change_nothing_and_know_what_will_happen(
    policy: Any, wanted: int | None, options: Any, loaded_with: Any, use: ContextUse
):
    assert context_use(LOADED, wanted, options, loaded_with, policy) == use


@pytest.mark.parametrize("policy", [STRIP, WARN, PASS])
@pytest.mark.parametrize(
    "there",
    [
        instance(state="cold"),
        instance(state="loading"),
        instance(backend_kind="llama-server", context_tokens=4096, context_fixed=True),
    ],
)
def test_what_is_not_loaded_or_loads_nothing_by_itself_gets_the_request_as_it_is(policy: Any, there: Any):
    assert context_use(there, 2048, (GPU, THREADS), (), policy) == ContextUse()


@pytest.mark.parametrize(("policy", "smaller"), [(STRIP, False), (WARN, True), (PASS, True)])
def test_a_smaller_context_is_a_reload_only_where_it_goes_on_as_it_is(policy: Any, smaller: bool):
    assert is_reload(LOADED, 2048, policy) is smaller
    assert is_reload(LOADED, 6000, policy) is True
    assert is_reload(LOADED, 4096, policy) is False
    assert is_reload(LOADED, None, policy) is False


@pytest.mark.parametrize("policy", [STRIP, WARN])
def test_more_than_the_model_was_trained_for_is_no_reason_to_load_it_anew(policy: Any):
    full = instance(context_tokens=8192, context_train_tokens=8192)
    assert not is_reload(full, 100_000, policy)
    there = node("a", full)
    found = cost(
        ask(wanted_context_tokens=100_000), "m", there, there.instances[0], fleet(there), policy, NOW
    )
    assert found.context == 0.0
    use = context_use(full, 100_000, (), (), policy)
    assert use == ContextUse(num_ctx=8192 if policy is STRIP else None)


def chosen(request: Any, *nodes: Any, policy: Any = STRIP) -> Attempt:
    step = next_step(request, fleet(*nodes), NEW, policy, NOW)
    assert isinstance(step, Attempt), step
    return step


@pytest.mark.parametrize("policy", [STRIP, WARN, PASS])
def test_a_node_with_enough_context_wins(policy: Any):
    narrow = node("a", instance(context_tokens=4096, context_train_tokens=8192))
    wide = node("b", instance(context_tokens=8192, context_train_tokens=8192), last_chosen_s=NOW)
    step = chosen(ask(wanted_context_tokens=8192), narrow, wide, policy=policy)
    assert (step.node_id, step.cost.context) == ("b", 0.0)


def test_else_it_is_loaded_anew_where_that_costs_least():
    rates = LOADED.rates
    slow = node("a", LOADED._replace(rates=rates._replace(load_warm_s=9.0)))
    quick = node("b", LOADED._replace(rates=rates._replace(load_warm_s=3.0)))
    step = chosen(ask(wanted_context_tokens=8192), slow, quick)
    assert (step.node_id, step.cost.context) == ("b", 3.0)


def test_where_numbers_go_on_as_they_are_a_smaller_context_prefers_its_like():
    wide, narrow = (node(name, instance(context_tokens=n)) for name, n in (("a", 8192), ("b", 2048)))
    assert chosen(ask(wanted_context_tokens=2048), wide, narrow).node_id == "a"
    step = chosen(ask(wanted_context_tokens=2048), wide, narrow, policy=PASS)
    assert (step.node_id, step.cost.context) == ("b", 0.0)


def test_a_reload_waits_until_the_model_is_idle_and_a_stripped_one_does_not():
    busy = node("a", instance(slots=4, running=(run(),), context_tokens=4096))
    assert isinstance(next_step(ask(wanted_context_tokens=2048), fleet(busy), NEW, STRIP, NOW), Attempt)
    assert isinstance(next_step(ask(wanted_context_tokens=2048), fleet(busy), NEW, PASS, NOW), Wait)
    assert isinstance(next_step(ask(wanted_context_tokens=8192), fleet(busy), NEW, STRIP, NOW), Wait)


def fixed(tokens: int) -> Any:
    return instance(backend_kind="llama-server", context_fixed=True, context_tokens=tokens)


def test_a_prompt_that_fits_nowhere_is_refused_with_the_numbers():
    small, large = node("a", fixed(1000)), node("b", fixed(2000))
    step = next_step(ask(tokens=2501.0), fleet(small, large), NEW, STRIP, NOW)
    assert isinstance(step, Reject)
    assert (step.status, step.message) == (
        400,
        "model 'm' can not serve this request: the context there is fixed and too small for the request: its "
        "prompt is estimated at 2501 tokens, and the largest context is 2000 tokens, on node 'b'",
    )


def test_a_context_that_nobody_has_is_refused_with_the_numbers():
    step = next_step(ask(wanted_context_tokens=5000), fleet(node("a", fixed(2000))), NEW, STRIP, NOW)
    assert isinstance(step, Reject)
    assert step.status == 400
    assert step.message.endswith(
        "it asks for num_ctx 5000 (its prompt is estimated at 100 tokens), and the largest context is 2000 "
        "tokens, on node 'a'"
    )


@pytest.mark.parametrize("there", [fixed(2000), instance(context_tokens=2000, context_train_tokens=2000)])
def test_a_prompt_that_might_fit_is_sent(there: Any):
    """Estimates are up to a quarter too high; and Ollama itself cuts what is too long."""
    assert chosen(ask(tokens=2500.0), node("a", there)).node_id == "a"
