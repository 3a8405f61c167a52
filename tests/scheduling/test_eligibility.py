"""docs/scheduling.md, "Who is left out"."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest

from herd.fleet.snapshot import NodeView
from herd.scheduling.eligibility import REASONS, Hope, Needs, Reason, most_hopeful, why_not
from herd.scheduling.policy import DEFAULT_POLICY
from tests.scheduling.build import GB, NOW, fleet, instance, node
from tests.scheduling.tables import table

NEEDS = Needs("m", frozenset({"completion"}), None)


class Case(NamedTuple):
    word: str | None
    node: NodeView
    needs: Needs = NEEDS


def a(*instances, **fields) -> NodeView:
    return node("a", *(instances or (instance(),)), **fields)


COLD = instance(state="cold")
FIXED = instance(context_tokens=4096, context_fixed=True, backend_kind="llama-server")
WANTS_8K = NEEDS._replace(wanted_context_tokens=8192)
TOOLS = NEEDS._replace(words=frozenset({"completion", "tools"}))

CASES = (
    Case(None, a()),
    Case(None, a(status="degraded")),
    Case("offline", a(status="offline", last_beat_s=NOW - 31)),
    Case("unreachable", a(status="offline", last_beat_s=NOW - 4)),
    Case("pending", a(status="pending")),
    Case("draining", a(status="draining")),
    Case("breaker_open", a(breaker_open_until_s=NOW + 5)),
    Case(None, a(breaker_open_until_s=NOW)),
    Case("paused", a(paused=True)),
    Case("heat_critical", a(heat="critical")),
    Case(None, a(heat="serious")),
    Case("backend_not_ready", a(backends_ready={"ollama-11434": False})),
    Case(None, a(backends_ready={"ollama-11434": True, "llama-server-8080": False})),
    Case("capability_missing", a(), TOOLS),
    Case(None, a(instance(capabilities=frozenset())), TOOLS),
    Case(None, a(FIXED)),
    Case("context_too_small", a(FIXED), WANTS_8K),
    Case(None, a(instance(context_tokens=4096)), WANTS_8K),
    # It needs 4 · 1.03 + 0.4 + 4096 · 0.00015 = 5.1344 GB; with 8192 tokens 5.7488.
    Case("model_too_large", a(COLD, gpu_total_bytes=5 * GB)),
    Case(None, a(instance(), gpu_total_bytes=5 * GB)),
    Case(None, a(COLD, gpu_total_bytes=int(5.5 * GB))),
    Case("model_too_large", a(COLD, gpu_total_bytes=int(5.5 * GB)), WANTS_8K),
    Case("model_too_large", a(COLD, memory_total_bytes=int(5.6 * GB))),
    Case(None, a(COLD, memory_total_bytes=int(5.8 * GB))),
    Case(None, a(instance(state="cold", size_bytes=None), gpu_total_bytes=1)),
    Case("memory_too_small", a(COLD, gpu_total_bytes=8 * GB, gpu_used_bytes=4 * GB)),
    Case(None, a(COLD, instance("x"), gpu_total_bytes=8 * GB, gpu_used_bytes=6 * GB)),
    Case(
        "memory_too_small",
        a(COLD, instance("x", size_bytes=GB), gpu_total_bytes=8 * GB, gpu_used_bytes=8 * GB),
    ),
    Case(None, a(instance(), gpu_total_bytes=8 * GB, gpu_used_bytes=8 * GB)),
    Case("memory_too_small", a(COLD, memory_total_bytes=20 * GB, memory_available_bytes=7 * GB)),
    Case(None, a(COLD, memory_total_bytes=20 * GB, memory_available_bytes=8 * GB)),
    Case("pressure_critical", a(COLD, pressure="critical")),
    Case(None, a(instance(), pressure="critical")),
    Case(None, a(COLD, pressure="warn")),
    Case("model_bad", a(instance(state="cold", bad_until_s=NOW + 1))),
    Case(None, a(instance(state="cold", bad_until_s=NOW))),
    Case("busy_mark", a(instance(busy_until_s=NOW + 2))),
    Case(None, a(instance(busy_until_s=NOW))),
    Case("not_pinned", a(), NEEDS._replace(only="b")),
    Case(None, a(), NEEDS._replace(only="a")),
    Case("other_prompts", a(), NEEDS._replace(prompts="raw")),
    Case(None, a(), NEEDS._replace(prompts="templated")),
    Case(None, a(FIXED), NEEDS._replace(prompts="raw")),
    Case("other_prompts", a(FIXED), NEEDS._replace(prompts="templated")),
    # What is wrong for ever is said first: nobody should wait for it.
    Case("capability_missing", a(status="offline"), TOOLS),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.word))
def test_the_first_reason_against_a_node(case: Case) -> None:
    found = why_not(case.node, case.node.instances[0], case.needs, DEFAULT_POLICY, NOW)
    assert (None if found is None else found[0]) == case.word


def test_kv_of_the_metadata_is_used_where_it_is_known() -> None:
    view = a(instance(state="cold", kv_bytes_per_token=1), gpu_total_bytes=int(4.6 * GB))
    assert why_not(view, view.instances[0], NEEDS, DEFAULT_POLICY, NOW) is None


def test_no_more_context_is_counted_than_the_model_was_trained_for() -> None:
    view = a(instance(state="cold", context_train_tokens=4096), gpu_total_bytes=int(5.5 * GB))
    assert why_not(view, view.instances[0], WANTS_8K, DEFAULT_POLICY, NOW) is None


def test_capabilities_are_those_of_the_name_that_was_asked_for() -> None:
    held = instance(names=("m", "m-tools"))
    tools = replace(held.names[1], capabilities=TOOLS.words)
    view = a(held._replace(names=(held.names[0], tools)))
    assert why_not(view, view.instances[0], TOOLS._replace(model="m-tools"), DEFAULT_POLICY, NOW) is None
    assert why_not(view, view.instances[0], TOOLS, DEFAULT_POLICY, NOW) is not None
    assert set(fleet(view).holders) == {"m", "m-tools"}


def test_a_mark_says_when_it_ends() -> None:
    view = a(instance(busy_until_s=NOW + 2))
    assert why_not(view, view.instances[0], NEEDS, DEFAULT_POLICY, NOW) == ("busy_mark", NOW + 2)


def test_the_page_has_every_word_with_its_hope() -> None:
    rows = {row["word"]: row["hope"].replace(" ", "_").upper() for row in table("word", "hope")}
    assert rows == {reason.value: REASONS[reason].hope.name for reason in Reason}
    assert set(REASONS) == set(Reason)


@pytest.mark.parametrize(
    ("reasons", "best"),
    [
        ([], None),
        ([Reason.MODEL_ABSENT], Reason.MODEL_ABSENT),
        ([Reason.MODEL_ABSENT, Reason.CAPABILITY_MISSING], Reason.CAPABILITY_MISSING),
        ([Reason.CAPABILITY_MISSING, Reason.TRIED], Reason.TRIED),
        ([Reason.TRIED, Reason.OFFLINE, Reason.PAUSED], Reason.OFFLINE),
    ],
)
def test_the_most_hopeful_reason_decides(reasons: list[Reason], best: Reason | None) -> None:
    assert most_hopeful(reasons) == best
    assert Hope.NOWHERE < Hope.NEVER < Hope.SPENT < Hope.NOT_NOW
