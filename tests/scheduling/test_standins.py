"""VRAM fallback: a loaded model of the same category instead of a cold load (docs/scheduling.md §3)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.fleet.snapshot import FleetSnapshot, InstanceView, ModelName, NodeView
from herd.request import InferenceRequest
from herd.scheduling.categories import category_of
from herd.scheduling.plan import NEW, Attempt, History, Hold, Reject, Step, Wait, next_step, plan_queue
from herd.scheduling.policy import DEFAULT_POLICY, Policy
from herd.scheduling.steps import Waiting
from tests.scheduling import strategies
from tests.scheduling.build import GB, NOW, ask, fleet, instance, node

ON = Policy(vram_fallback=True)
TALKS = frozenset({"completion"})
CALLS = TALKS | {"tools"}
THINKS = CALLS | {"thinking"}
SEES = TALKS | {"vision"}
EVERYTHING = frozenset({"completion", "embedding", "thinking", "tools", "vision"})
COLD = node("cold", instance(state="cold", size_bytes=8 * GB))


def named(name: str, *words: str, family: str | None = None) -> ModelName:
    return ModelName(canonical=name, shown=name, capabilities=frozenset(words or TALKS), family=family)


def loaded(name: str, words: frozenset[str] = TALKS, **fields: object) -> InstanceView:
    return instance(name, capabilities=words, **fields)


def step_of(snapshot: FleetSnapshot, request: InferenceRequest | None = None, policy: Policy = ON) -> Step:
    return next_step(request or ask(), snapshot, NEW, policy, NOW)


def served(*nodes: NodeView, request: InferenceRequest | None = None, policy: Policy = ON) -> str:
    """The model that answers at once; empty where the request waits or is refused."""
    step = step_of(fleet(*nodes), request, policy)
    assert isinstance(step, Attempt | Wait | Hold | Reject)
    return step.model if isinstance(step, Attempt) else ""


# ---- categories


@pytest.mark.parametrize(
    ("name", "category"),
    [
        (named("llama3.1:8b", "completion", "tools"), "general"),
        (named("smollm2:135m"), "general"),
        (named("decoder:1b"), "general"),
        (named("opencoder:8b"), "code"),
        (named("qwen2.5-coder:7b", "completion", "tools", "insert"), "code"),
        (named("deepseek-coder-v2:16b"), "code"),
        (named("codellama:13b", family="llama"), "code"),
        (named("devstral-small-2", "completion", "tools", "vision"), "code"),
        (named("hf.co/bigcode/starcoder2-3b-gguf", family="starcoder2"), "code"),
        (named("mine:1", family="starcoder2"), "code"),
        (named("llava:7b", "completion", "vision"), "vision"),
        (named("qwen3-vl:4b", "completion", "vision", "thinking"), "vision"),
        (named("qwen3:8b", "completion", "tools", "thinking"), "reasoning"),
        (named("deepseek-r1:7b"), "reasoning"),
        (named("qwq:32b"), "reasoning"),
        (named("mine:2", family="gptoss"), "reasoning"),
        (named("nomic-embed-text", "embedding"), None),
        (named("m", "completion", "embedding", "thinking", "tools", "vision"), None),
        (replace(named("m"), capabilities=frozenset()), None),
        (replace(named("m"), capabilities=frozenset({"/v1/messages"})), None),
    ],
    ids=lambda value: value.canonical if isinstance(value, ModelName) else str(value),
)
def test_a_model_is_for_what_its_words_its_name_or_its_family_say(name: ModelName, category: str | None):
    assert category_of(name) == category


def test_endpoints_of_a_backend_are_no_ability_of_a_model():
    assert category_of(replace(named("m"), capabilities=TALKS | {"/v1/messages"})) == "general"


# ---- when


def test_off_the_model_is_loaded():
    assert served(COLD, node("hot", loaded("x")), policy=DEFAULT_POLICY) == "m"


@pytest.mark.parametrize(
    ("fallback", "policy", "model"),
    [
        ("default", ON, "x"),
        ("loaded", ON, "x"),
        ("loaded", DEFAULT_POLICY, "x"),
        ("default", DEFAULT_POLICY, "m"),
        ("none", ON, "m"),
        ("chain", ON, "m"),
    ],
)
def test_the_request_has_the_last_word(fallback: str, policy: Policy, model: str):
    request = ask(fallback=fallback)
    assert served(COLD, node("hot", loaded("x")), request=request, policy=policy) == model


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_it_needs_a_load_everywhere(state: str):
    cold, hot = node("a", instance(state=state)), node("z", loaded("x"))
    assert served(cold, hot) == "x"
    for there in ("hot", "loading"):
        busy = node("b", instance(state=there, running=1))
        assert served(cold, hot, busy) in ("m", "")
    gone = node("b", instance(), status="offline", last_beat_s=0.0)
    assert served(cold, hot, gone) == "x"  # loaded where it is of no use


@pytest.mark.parametrize(
    ("path", "replaced"),
    [
        ("/api/chat", True),
        ("/api/generate", True),
        ("/v1/chat/completions", True),
        ("/v1/messages", True),
        ("/v1/responses", True),
        ("/v1/completions", False),
        ("/v1/embeddings", False),
        ("/api/embed", False),
        ("/api/embeddings", False),
        ("/v1/rerank", False),
        ("/v1/images/generations", False),
        ("/v1/audio/transcriptions", False),
    ],
)
def test_only_an_answer_in_words_has_a_stand_in(path: str, replaced: bool):
    assert served(COLD, node("hot", loaded("x")), request=ask(path=path)) == ("x" if replaced else "m")


def test_whoever_waits_for_a_load_takes_what_becomes_free():
    """The node is busy with another model, so the load must wait; then a stand-in's slot is free."""
    full = {"gpu_total_bytes": 10 * GB, "gpu_used_bytes": 9 * GB}
    there = node("a", instance(state="cold"), loaded("y", CALLS, running=1, size_bytes=9 * GB), **full)
    before = fleet(there, node("b", loaded("x", running=1)))
    wait = step_of(before)
    assert isinstance(wait, Wait)
    entry = Waiting(ask(), NEW, NOW, NOW + 1.0, False, (wait.node_id, wait.instance_key))
    assert plan_queue([entry], before, ON, NOW)[0] == []
    [(_, step)], _ = plan_queue([entry], fleet(there, node("b", loaded("x"))), ON, NOW)
    assert isinstance(step, Attempt)
    assert (step.model, step.stand_in) == ("x", "x")


# ---- which


def test_it_is_of_the_same_category_and_can_do_all_that_the_model_can():
    cold = node("cold", instance(state="cold", capabilities=CALLS))
    for words, found in ((CALLS, "x"), (CALLS | {"insert"}, "x"), (TALKS, "m"), (THINKS, "m"), (SEES, "m")):
        assert served(cold, node("hot", loaded("x", words))) == found
    seer = node("cold", instance(state="cold", capabilities=SEES))
    assert served(seer, node("hot", loaded("x", SEES | {"tools"}))) == "x"
    assert served(seer, node("hot", loaded("x", CALLS))) == "m"
    assert served(cold, node("hot", loaded("my-coder", CALLS))) == "m"


def test_nothing_known_is_no_stand_in_and_has_none():
    for unknown in (frozenset[str](), EVERYTHING):
        assert served(COLD, node("hot", loaded("x", unknown))) == "m"
        cold = node("cold", instance(state="cold", capabilities=unknown))
        assert served(cold, node("hot", loaded("x"))) == "m"
        assert served(cold, node("hot", loaded("x", unknown))) == "m"


def test_nodes_that_say_different_things_of_the_model_all_count():
    able = node("b", instance(state="cold", capabilities=CALLS))
    assert served(COLD, able, node("hot", loaded("x"))) == "m"
    assert served(COLD, able, node("hot", loaded("x", CALLS))) == "x"


def test_the_nearest_in_size_stands_in_and_of_two_the_larger():
    def among(**sizes: int | None) -> str:
        ones = [node(f"n{name}", loaded(name, size_bytes=size)) for name, size in sizes.items()]
        return served(COLD, *ones)

    assert among(tiny=GB, near=7 * GB, huge=80 * GB) == "near"
    assert among(half=4 * GB, double=16 * GB) == "double"
    assert among(b=8 * GB, a=8 * GB) == "a"
    assert among(unknown=None, huge=80 * GB) == "huge"
    assert among(unknown=None) == "unknown"


def test_it_can_be_sent_to_now_or_is_passed_over():
    near, far = loaded("near", size_bytes=8 * GB), loaded("far", size_bytes=80 * GB)
    assert served(COLD, node("a", near), node("b", far)) == "near"
    assert (
        served(COLD, node("a", near._replace(running=instance(running=1).running)), node("b", far)) == "far"
    )
    for fields in ({"paused": True}, {"status": "offline"}, {"status": "draining"}, {"heat": "critical"}):
        assert served(COLD, node("a", near, **fields)) == "m"
    assert served(COLD, node("a", near._replace(busy_until_s=NOW + 1))) == "m"


def test_it_is_never_loaded_anew_or_cut_for_it():
    narrow = node("hot", loaded("x", context_tokens=200))
    assert served(COLD, narrow, request=ask(tokens=40)) == "x"
    assert served(COLD, narrow, request=ask(tokens=4000)) == "m"
    assert served(COLD, narrow, request=ask(tokens=40, wanted_context_tokens=4096)) == "m"


def test_what_says_how_to_load_a_model_is_not_said_to_another():
    hot = node("hot", loaded("x", context_tokens=8192))
    for asked in (ask(wanted_context_tokens=2048), ask(load_options=(("num_gpu", 1),))):
        assert served(COLD, hot, request=asked) == "x"  # taken out of the request: context protection
        for mode in ("warn", "passthrough"):
            policy = Policy(vram_fallback=True, context_protection=mode)
            assert served(COLD, hot, request=asked, policy=policy) == "m"


def test_a_loaded_model_of_its_own_chain_goes_first():
    asked = ask("m", "n", "o")
    mine = node("b", loaded("o", SEES))
    assert (
        served(COLD, node("a", loaded("x")), node("c", instance("n", state="cold")), mine, request=asked)
        == "o"
    )
    step = step_of(fleet(COLD, node("a", loaded("x")), mine), asked)
    assert isinstance(step, Attempt)
    assert (step.model_index, step.stand_in) == (2, None)


def test_what_a_pinned_node_has_loaded_is_all_there_is():
    asked = ask(only="cold")
    assert served(COLD, node("hot", loaded("x")), request=asked) == "m"
    here = COLD._replace(instances=(*COLD.instances, loaded("x")._replace(node_id="cold")))
    assert served(here, node("hot", loaded("near", size_bytes=8 * GB)), request=asked) == "x"


def test_the_attempt_names_it_as_its_node_does():
    shown = loaded("x")
    shown = shown._replace(names=(replace(shown.names[0], shown="X:latest"),))
    step = step_of(fleet(COLD, node("hot", shown)), ask("m", "n"))
    assert isinstance(step, Attempt)
    assert (step.model, step.model_index, step.stand_in, step.node_id) == ("x", 0, "X:latest", "hot")


def test_a_node_that_failed_is_not_asked_for_a_stand_in():
    history = History(tried=frozenset({"hot"}), attempts=1)
    step = next_step(ask(), fleet(COLD, node("hot", loaded("x"))), history, ON, NOW)
    assert isinstance(step, Attempt)
    assert step.model == "m"


@st.composite
def cold_starts(draw: st.DrawFn) -> tuple[FleetSnapshot, InferenceRequest]:
    """Fleets whose models say what they can; most often the requested one is loaded nowhere."""
    snapshot, request = draw(strategies.fleets()), draw(strategies.requests())
    words = st.sampled_from((CALLS, CALLS, CALLS, THINKS, SEES, EVERYTHING, frozenset[str]()))
    told = {name: draw(words) for name in strategies.MODELS}
    everywhere = draw(st.integers(0, 3)) > 0

    def changed(x: InstanceView) -> InstanceView:
        names = tuple([replace(name, capabilities=told[name.canonical]) for name in x.names])
        if everywhere:
            state = "cold" if x.key == request.chain[0] else "hot"
            running = x.running[: x.slots - 1] if state == "hot" else ()
            x = x._replace(state=state, running=running, loading_since_s=None, settling_until_s=())
        return x._replace(names=names)

    views = [view._replace(instances=tuple(map(changed, view.instances))) for view in snapshot.nodes.values()]
    return fleet(*views, stats=snapshot.stats), request._replace(
        chain=request.chain[: draw(st.integers(1, 2))]
    )


def told_of(snapshot: FleetSnapshot, model: str) -> list[ModelName]:
    return [
        name for _, one in snapshot.holders.get(model, ()) for name in one.names if name.canonical == model
    ]


@given(cold_starts())
def test_a_stand_in_is_loaded_of_the_same_kind_and_only_instead_of_a_load(
    given: tuple[FleetSnapshot, InferenceRequest],
):
    snapshot, request = given
    plain, step = step_of(snapshot, request, DEFAULT_POLICY), step_of(snapshot, request, ON)
    assert not isinstance(plain, Attempt) or plain.stand_in is None
    if not isinstance(step, Attempt):
        assert step == plain
        return
    where = {x.key: x for x in snapshot.nodes[step.node_id].instances}[step.instance_key]
    if step.stand_in is None:
        assert step.model in request.chain
        return
    assert step.model not in request.chain
    assert (where.state, step.evicts, step.cost.load) == ("hot", (), 0.0)
    assert where.taken < where.slots
    assert isinstance(plain, Attempt | Wait)
    for asked in told_of(snapshot, request.chain[step.model_index]):
        for stand_in in told_of(snapshot, step.model):
            assert category_of(asked) == category_of(stand_in) is not None
            assert asked.capabilities <= stand_in.capabilities
