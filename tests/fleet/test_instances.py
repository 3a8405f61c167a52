"""From the models of a beat to instances: merged by weights, shared by backends, remembered over silence."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.fleet.held import NOTHING_HELD, PromptCache
from herd.fleet.instance import arrived, merge
from herd.fleet.registry import AttemptResult
from herd.fleet.snapshot import ArrivalRate
from herd.request import PrefixMark
from herd_node.protocol import wire
from tests.fleet.build import KEY, OLLAMA, backend, beat, fresh, join, marks, model, online, start


def only(reports):
    (report,) = reports.values()
    return report


def test_names_made_from_one_weights_file_are_one_instance_and_hot_when_one_is():
    reports = merge(
        beat(
            "n",
            model("llama3:8b", "cold", context_tokens=None),
            model("Tools:latest", "hot", context_tokens=4096),
        )
    )
    report = only(reports)
    assert report.state == "hot"
    assert report.facts.context_tokens == 4096
    assert [(name.canonical, name.shown) for name in report.facts.names] == [
        ("llama3:8b", "llama3:8b"),
        ("tools", "Tools:latest"),
    ]


def test_what_a_backend_offers_all_its_models_can_be_asked_for():
    backends = (backend(endpoints=("/v1/messages",)), backend("x", "openai"))
    models = (model("a"), model("b", weights="b", capabilities=()), model("c", weights="c", backend="x"))
    reports = merge(beat("n", *models, backends=backends))
    words = {name.canonical: name.capabilities for one in reports.values() for name in one.facts.names}
    assert words == {"a": {"completion", "/v1/messages"}, "b": frozenset(), "c": {"completion"}}


def test_each_name_keeps_its_own_capabilities():
    report = only(merge(beat("n", model("a"), model("b", capabilities=("completion", "tools")))))
    assert [name.capabilities for name in report.facts.names] == [{"completion"}, {"completion", "tools"}]


def test_without_weights_the_name_stands_alone():
    reports = merge(beat("n", model("a", weights=None), model("b", weights=None)))
    assert [[name.canonical for name in one.facts.names] for one in reports.values()] == [["a"], ["b"]]


def test_the_same_weights_on_two_backends_are_two_instances():
    hb = beat(
        "n",
        model("a"),
        model("b", backend="llama-8080"),
        backends=(backend(), backend("llama-8080", "llama-server")),
    )
    assert [one.facts.backend_kind for one in merge(hb).values()] == ["ollama", "llama-server"]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_name_of_two_backends_goes_to_the_first_backend_whatever_the_models_order(order):
    models = (model("phi:latest", backend="second", weights="w2"), model("phi", weights="w1"))
    hb = beat(
        "n", *(models[place] for place in order), backends=(backend(), backend("second", "llama-server"))
    )
    assert only(merge(hb)).facts.backend_id == OLLAMA


def test_aliases_are_names_too():
    report = only(merge(beat("n", model("smollm", aliases=("gpt-4o", "SmolLM")))))
    assert [name.canonical for name in report.facts.names] == ["smollm", "gpt-4o"]


@pytest.mark.parametrize(
    ("said", "ago", "state"),
    [
        ("hot", None, "hot"),
        ("loading", None, "loading"),
        ("warm", None, "warm"),
        ("warm", 1800.0, "warm"),
        ("warm", 1800.1, "cold"),
        ("cold", 5.0, "warm"),
        ("cold", None, "cold"),
    ],
)
def test_warm_is_what_was_unloaded_within_half_an_hour(said, ago, state):
    assert only(merge(beat("n", model(state=said, unloaded_s_ago=ago)))).state == state


def test_a_size_of_zero_is_no_size():
    report = only(
        merge(beat("n", model("a", size_bytes=0, parameters=0, slots=0), model("b", "cold", size_bytes=7)))
    )
    assert report.facts.size_bytes == 7


@pytest.mark.parametrize(
    ("state", "kind", "slots", "expected"),
    [
        ("hot", "ollama", 4, 4),
        ("hot", "ollama", None, 1),
        ("hot", "openai", None, 4),
        ("hot", "llama-server", None, 1),
        ("cold", "ollama", 4, 1),
        ("warm", "ollama", 4, 1),
        ("loading", "ollama", 4, 1),
    ],
)
def test_a_model_has_the_slots_that_its_backend_gives_it_and_one_until_it_is_loaded(
    state, kind, slots, expected
):
    registry = online(model(state=state, slots=slots), backends=(backend(kind=kind),))
    assert registry.instance("attic", KEY).slots == expected


def test_a_model_that_the_node_no_longer_lists_is_gone():
    registry = online(model(), model("b", weights="w"))
    registry.on_beat(beat("attic", model("b", weights="w")), "10.0.0.5", 5.0)
    snapshot = registry.snapshot(5.0)
    assert set(snapshot.holders) == {"b"}
    assert [one.key for one in snapshot.nodes["attic"].instances] == [f"{OLLAMA}|w"]


def test_work_in_a_model_that_is_gone_is_seen_until_it_ends():
    registry = online(model(), model("b", weights="w"))
    token = start(registry, 1.0)
    registry.on_beat(beat("attic", model("b", weights="w")), "10.0.0.5", 5.0)
    snapshot = registry.snapshot(5.0)
    assert "llama3:8b" not in snapshot.holders
    ghost = snapshot.nodes["attic"].instances[0]
    assert (ghost.key, ghost.names, len(ghost.running)) == (KEY, (), 1)
    registry.end_attempt(token, 6.0, AttemptResult(ok=True))
    assert [one.key for one in registry.snapshot(6.0).nodes["attic"].instances] == [f"{OLLAMA}|w"]


def test_a_backend_that_is_down_keeps_its_models_for_the_callers_who_may_wait():
    registry = online(
        model(), model("c", backend="x", weights="w"), backends=(backend(), backend("x", "openai"))
    )
    down = beat(
        "attic", model("c", backend="x", weights="w"), backends=(backend(ready=False), backend("x", "openai"))
    )
    registry.on_beat(down, "10.0.0.5", 10.0)
    snapshot = registry.snapshot(10.0)
    assert [one.state for _, one in snapshot.holders["llama3:8b"]] == ["cold"]
    assert snapshot.nodes["attic"].backends_ready == {OLLAMA: False, "x": True}
    registry.on_beat(beat("attic", backends=(backend(),)), "10.0.0.5", 15.0)
    assert not registry.snapshot(15.0).holders


def test_a_delisted_name_is_back_with_the_next_beat():
    registry = online(model("A"), model("b"))
    registry.delist("attic", "a:latest")
    assert set(registry.snapshot(0.0).holders) == {"b"}
    registry.on_beat(beat("attic", model("A"), model("b")), "10.0.0.5", 5.0)
    assert set(registry.snapshot(5.0).holders) == {"a", "b"}


def test_an_embedding_model_is_known_to_answer_with_one_token():
    registry = online(model("nomic", capabilities=("embedding",)))
    assert registry.snapshot(0.0).stats["nomic"].out_tokens == 1.0


def test_gpu_memory_is_summed_and_unified_memory_gives_72_percent():
    gib = 1 << 30
    gpus = (
        wire.Gpu(memory_total_bytes=24 * gib, memory_used_bytes=4 * gib),
        wire.Gpu(memory_total_bytes=8 * gib, memory_used_bytes=None),
    )
    view = online(model(), gpus=gpus).snapshot(0.0).nodes["attic"]
    assert (view.gpu_total_bytes, view.gpu_used_bytes, view.max_loaded) == (32 * gib, 4 * gib, 6)
    mac = wire.Hardware(unified_memory=True, memory_bytes=100 * gib)
    view = online(model(), hardware=mac).snapshot(0.0).nodes["attic"]
    assert (view.gpu_total_bytes, view.gpu_used_bytes) == (72 * gib, None)
    memory = wire.Memory(total_bytes=100 * gib, available_bytes=50 * gib)
    view = online(model(), hardware=mac, memory=memory).snapshot(0.0).nodes["attic"]
    assert view.gpu_used_bytes == 22 * gib
    view = online(model()).snapshot(0.0).nodes["attic"]
    assert (view.gpu_total_bytes, view.gpu_used_bytes, view.max_loaded) == (None, None, 3)


def test_rates_start_from_the_machine_and_follow_it_when_it_changes():
    registry = online(model())
    slow = registry.instance("attic", KEY).rates
    registry.on_beat(
        beat("attic", model(), gpus=(wire.Gpu(name="NVIDIA GeForce RTX 4090"),)), "10.0.0.5", 5.0
    )
    fast = registry.instance("attic", KEY).rates
    assert fast.step_s < slow.step_s / 5
    assert fast.prefill_tokens_per_s > slow.prefill_tokens_per_s * 50


def test_what_a_node_lists_is_told_for_the_database_and_remembered_nodes_are_dropped_once_they_speak():
    registry = fresh()
    registry.set_remembered({"llama3:8b": ["attic", "den"], "Old:latest": {"attic"}})
    assert registry.snapshot(0.0).remembered == {"llama3:8b": {"attic", "den"}, "old": {"attic"}}
    registry.on_beat(beat("attic", backends=(backend(ready=False),)), "10.0.0.5", 0.0)
    assert registry.snapshot(0.0).remembered["old"] == {"attic"}, "its backend has not spoken yet"
    assert registry.listed() == {}, "what it listed before must not be overwritten with nothing"
    join(registry, beat("attic", model()), 1.0)
    assert registry.snapshot(1.0).remembered == {"llama3:8b": {"den"}}
    assert registry.listed() == {"attic": ("llama3:8b",)}


# ---- held sequences and arrivals ------------------------------------------------------------------------


def cache(*sequences: tuple[PrefixMark, ...], slots: int = 2) -> PromptCache:
    here = PromptCache()
    for sequence in sequences:
        here.add(sequence, slots)
    return here


prompts = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(lambda words: marks(*words))


def common_tokens(one: tuple[PrefixMark, ...], other: tuple[PrefixMark, ...]) -> float:
    same = [mine.tokens for mine, theirs in zip(one, other, strict=False) if mine.digest == theirs.digest]
    return max(same, default=0.0)


@given(st.lists(st.tuples(prompts, st.booleans()), max_size=12), prompts, st.integers(1, 4))
def test_what_is_held_is_found_whatever_came_and_went(history, asked, slots):
    here, plain = PromptCache(), []
    for prompt, failed in history:
        before = here.held, dict(here.held.digests)
        here.add(prompt, slots)
        plain = [old for old in plain if prompt[: len(old)] != old]
        plain = [*plain, prompt][-slots:]
        if failed:
            here.remove(prompt)
            plain.remove(prompt)
        assert before[0].digests == before[1], "a value that was handed out changed"
        assert here.held is here.held
        assert here.sequences == tuple(plain)
        longest = max((common_tokens(asked, old) for old in plain), default=0.0)
        assert here.held.prefix_tokens(asked) == longest
        assert here.starts_like(asked) == any(old[0].digest == asked[0].digest for old in plain)


def test_an_equal_sequence_that_came_later_is_not_forgotten():
    first, again = marks("s", "a"), marks("s", "a")
    both, one = cache(first, again), cache(first)
    both.remove(first)
    one.remove(())
    assert both.sequences == (again,)
    assert one.sequences == (first,)


def test_a_new_sequence_replaces_the_one_it_extends_and_the_last_slots_stay():
    one, two = marks("s", "a"), marks("s", "b")
    longer = marks("s", "a", "answer", "c")
    assert cache(one, two, longer).sequences == (two, longer)
    assert cache(one, two, marks("s", "c")).sequences == (two, marks("s", "c"))
    assert cache(longer, one).sequences == (longer, one)
    assert cache(one, one).sequences == (one,)


def test_a_sequence_is_held_from_the_start_and_forgotten_at_unload():
    registry = online(model())
    prompt = marks("s", "a")
    token = start(registry, 1.0, prefixes=prompt)
    assert set(registry.instance("attic", KEY).held.digests) == {mark.digest for mark in prompt}
    registry.end_attempt(token, 2.0, AttemptResult(ok=True))
    registry.on_beat(beat("attic", model(state="warm", unloaded_s_ago=1.0)), "10.0.0.5", 10.0)
    assert registry.instance("attic", KEY).held == NOTHING_HELD


def test_a_request_that_failed_before_its_first_record_leaves_no_sequence():
    registry = online(model())
    token = start(registry, 1.0, prefixes=marks("s"))
    registry.end_attempt(token, 2.0, AttemptResult(ok=False))
    assert registry.instance("attic", KEY).held == NOTHING_HELD


@given(st.floats(0.2, 20), st.integers(1, 5))
def test_a_steady_stream_of_requests_has_its_own_rate(gap_s, minutes):
    rate = ArrivalRate(0.0, 0.0)
    now_s = 0.0
    while now_s < 1500 + 60 * minutes:
        now_s += gap_s
        rate = arrived(rate, now_s)
    assert rate.per_s == pytest.approx(1 / gap_s, rel=0.08)


def test_a_load_that_we_caused_is_not_over_because_a_beat_still_tells_of_the_old_context():
    registry = online(model(context_tokens=4096, slots=4))
    registry.reload("attic", KEY, 8192, 1.0)
    start(registry, 1.0)

    def seen(now_s: float) -> tuple[str, int | None]:
        view = registry.instance("attic", KEY)
        assert registry.snapshot(now_s).nodes["attic"].instances[0] == view
        return view.state, view.context_tokens

    assert seen(1.0) == ("loading", 8192)
    join(registry, beat("attic", model(context_tokens=4096, slots=4)), 2.0)
    assert seen(2.0) == ("loading", 8192)
    join(registry, beat("attic", model(context_tokens=8192, slots=4)), 3.0)
    assert seen(3.0) == ("hot", 8192)
    join(registry, beat("attic", model(context_tokens=4096, slots=4)), 4.0)
    assert seen(4.0) == ("hot", 4096)  # somebody else had it loaded anew


def test_a_load_that_we_caused_and_that_never_came_is_forgotten_with_its_request():
    registry = online(model(context_tokens=4096))
    registry.reload("attic", KEY, 8192, 1.0)
    registry.abandon_attempt(start(registry, 1.0), 1.0)
    assert registry.instance("attic", KEY).state == "warm"
    join(registry, beat("attic", model(context_tokens=4096)), 2.0)
    view = registry.instance("attic", KEY)
    assert (view.state, view.context_tokens) == ("hot", 4096)


def test_the_first_word_ends_a_load_that_we_caused():
    registry = online(model(context_tokens=4096))
    registry.reload("attic", KEY, 8192, 1.0)
    registry.first_record(start(registry, 1.0), 2.0)
    view = registry.instance("attic", KEY)
    assert (view.state, view.context_tokens) == ("hot", 8192)
