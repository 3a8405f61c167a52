"""Ollama's lists as values: recorded ones, and the traps that they hold."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd_node.backends.ollama_lists import (
    Loaded,
    Runner,
    Seen,
    Shown,
    SlotRule,
    Tag,
    kv_bytes_per_token,
    models_of,
    parameters_of,
    parse_ps,
    parse_runner,
    parse_show,
    parse_tags,
    slots_of,
    wall_of,
    weights_of,
)
from tests.fakes.recordings import recording

SMOL = "sha256-b18569bab4327d6f48e8619aedb5d6150ff69b16f0f923f10b79427307a16072"
EMBED = "sha256-83687ba0dbcba8f42f8a08f9544a15d1a8c3732563732a8b17990948c19e0625"
JINJA = "sha256-e4a217f7b42fe97f32bf4c1b7e7b35ca880480213c064c2dbfb5a4b78fd5ac11"


def body(name: str) -> dict[str, object]:
    return orjson.loads(recording(f"ollama/{name}").body)


TAGS = parse_tags(body("tags"))
BY_NAME = {tag.name: tag for tag in TAGS}
SHOWN = {
    BY_NAME["smollm2:135m"].digest: parse_show(body("show")),
    BY_NAME["smol-tools:latest"].digest: parse_show(body("show-tools")),
    BY_NAME["smol-think:latest"].digest: parse_show(body("show-think")),
    BY_NAME["smol-fim:latest"].digest: parse_show(body("show-fim")),
    BY_NAME["smol-jinja:latest"].digest: parse_show(body("show-jinja")),
    BY_NAME["smol-embed:latest"].digest: parse_show(body("show-embed")),
}


def entries(ps: str, *, shown=SHOWN, runners=None, loading=(), has_gpu=False, wall_s=0.0):
    seen = Seen(
        tags=TAGS, loaded=parse_ps(body(ps)), shown=shown, runners=runners, loading=loading, wall_s=wall_s
    )
    return {model.name: model for model in models_of("ollama-11434", seen, SlotRule(), has_gpu=has_gpu)}


def test_the_recorded_tags_give_names_sizes_and_contexts() -> None:
    assert [tag.name for tag in TAGS] == [
        "smol-embed:latest", "smol-fim:latest", "smol-think:latest",
        "smol-tools:latest", "smol-jinja:latest", "smollm2:135m",
    ]  # fmt: skip
    assert BY_NAME["smollm2:135m"] == Tag(
        name="smollm2:135m",
        digest="b1d9b48b0bb876cf6d0dd3268f3aa6f2f7077be88c25bbccc036d82e24a9a1ee",
        size_bytes=270886232,
        capabilities=("completion",),
        context_train_tokens=8192,
        embedding_length=576,
        parameters=134_520_000,
        quantisation="F16",
        family="llama",
        modified_wall_s=1795402844.610614,
    )


def test_cloud_stubs_and_illegal_names_are_left_out() -> None:
    listed = [
        {"name": "gpt-oss:120b-cloud", "remote_model": "gpt-oss:120b", "remote_host": "https://ollama.com"},
        {"name": "../../etc/passwd"},
        {"name": 7},
        "nonsense",
        {"name": "real:latest", "digest": "d", "size": 5},
    ]
    assert [tag.name for tag in parse_tags({"models": listed})] == ["real:latest"]


def test_show_gives_weights_kv_size_and_what_tags_does_not_know() -> None:
    shown = parse_show(body("show-jinja"))
    assert shown.weights == JINJA
    assert set(shown.capabilities) == {"completion", "tools", "thinking"}
    assert BY_NAME["smol-jinja:latest"].capabilities == ("completion",)
    assert shown.kv_bytes_per_token == 30 * 3 * (64 + 64) * 2
    assert (shown.context_train_tokens, shown.embedding_length, shown.parameters) == (8192, 576, 134515008)


def test_names_made_from_one_file_have_the_same_weights() -> None:
    shared = {SHOWN[BY_NAME[name].digest].weights for name in ("smollm2:135m", "smol-tools:latest")}
    assert shared == {SMOL}


@pytest.mark.parametrize(
    ("modelfile", "weights"),
    [
        (f"# FROM smol:latest\n\nFROM /srv/models/blobs/{SMOL}\nTEMPLATE x\n", SMOL),
        (f"FROM C:\\Users\\a b\\.ollama\\models\\blobs\\{SMOL}\r\n", SMOL),
        (f'FROM "/a b/blobs/{SMOL}"\n', SMOL),
        (f"FROM /a/blobs/{SMOL}\nADAPTER /a/blobs/{EMBED}\n", SMOL),
        (f"# FROM /a/blobs/{SMOL}\n", None),
        ("FROM llama3\n", None),
        ("", None),
    ],
)
def test_weights_are_the_blob_of_the_from_line(modelfile: str, weights: str | None) -> None:
    assert weights_of(modelfile) == weights


@pytest.mark.parametrize(
    ("info", "kv_bytes"),
    [
        ({"block_count": 32, "head_count": 32, "head_count_kv": 8, "embedding_length": 4096}, 131072),
        ({"block_count": 2, "head_count": 4, "embedding_length": 64}, 2 * 4 * 32 * 2),
        ({"block_count": 3, "head_count": 4, "head_count_kv": [1, 0, 2], "embedding_length": 64}, 3 * 32 * 2),
        ({"block_count": 1, "head_count_kv": 1, "key_length": 256, "value_length": 128}, 384 * 2),
        ({"block_count": 1, "head_count_kv": 1}, None),
        ({}, None),
    ],
)
def test_kv_bytes_per_token_from_the_metadata(info: dict[str, object], kv_bytes: int | None) -> None:
    names = {"block_count": "block_count", "embedding_length": "embedding_length"}
    full = {f"llama.{names.get(name, f'attention.{name}')}": value for name, value in info.items()}
    assert kv_bytes_per_token(full, "llama") == kv_bytes


@pytest.mark.parametrize(
    ("size", "number"),
    [
        ("134.52M", 134_520_000),
        ("8.0B", 8_000_000_000),
        ("70B", 70_000_000_000),
        ("", None),
        (None, None),
        ("?", None),
    ],
)
def test_parameter_sizes(size: str | None, number: int | None) -> None:
    assert parameters_of(size) == number


def test_all_names_of_a_loaded_file_are_hot_and_the_others_cold() -> None:
    states = {name: model.state for name, model in entries("ps-shared-runner").items()}
    assert states == {
        "smollm2:135m": "hot",
        "smol-tools:latest": "hot",
        "smol-think:latest": "hot",
        "smol-fim:latest": "hot",
        "smol-jinja:latest": "cold",
        "smol-embed:latest": "cold",
    }


def test_without_show_only_the_listed_name_is_hot() -> None:
    states = [name for name, model in entries("ps-one", shown={}).items() if model.state == "hot"]
    assert states == ["smollm2:135m"]


def test_hot_models_carry_the_context_of_ps_and_cold_ones_none() -> None:
    models = entries("ps-one")
    assert models["smol-tools:latest"].context_tokens == 2048
    assert models["smol-jinja:latest"].context_tokens is None


def test_size_comes_from_tags_and_never_from_a_zero_in_ps() -> None:
    assert entries("ps-one")["smollm2:135m"].size_bytes == 270886232


def test_no_video_memory_is_unknown_without_a_gpu_and_nothing_with_one() -> None:
    assert entries("ps-one")["smollm2:135m"].vram_bytes is None
    assert entries("ps-one", has_gpu=True)["smollm2:135m"].vram_bytes == 0


def test_expiry_counts_from_the_wall_clock_and_is_never_negative() -> None:
    expires_s = wall_of("2026-11-23T03:14:15.225666401Z")
    assert expires_s == pytest.approx(1795403655.225666)
    assert entries("ps-one", wall_s=expires_s - 60)["smollm2:135m"].expires_in_s == pytest.approx(60.0)
    past = entries("ps-one", wall_s=expires_s + 60)["smollm2:135m"]
    assert (past.state, past.expires_in_s) == ("hot", 0.0)
    assert (entries("keepalive-forever-ps")["smollm2:135m"].expires_in_s or 0) > 290 * 365 * 86400


@pytest.mark.parametrize("moment", [None, "", "soon", "2026-13-01T00:00:00Z"])
def test_a_moment_that_is_none_is_unknown(moment: str | None) -> None:
    assert wall_of(moment) is None


def test_a_listed_model_without_its_child_process_is_not_hot() -> None:
    assert entries("kill9-child-idle-ps")["smollm2:135m"].state == "hot"  # not visible: believed
    assert entries("kill9-child-idle-ps", runners=())["smollm2:135m"].state == "cold"
    assert entries("ps-one", runners=(Runner(SMOL, 1),))["smollm2:135m"].state == "hot"


def test_a_child_that_ps_does_not_list_yet_is_loading() -> None:
    models = entries("ps-empty", runners=(Runner(SMOL, 1),))
    assert models["smol-tools:latest"].state == "loading"
    assert models["smol-jinja:latest"].state == "cold"


def test_what_the_agent_loads_itself_is_loading() -> None:
    assert entries("ps-empty", loading={SMOL})["smol-think:latest"].state == "loading"


def test_without_capabilities_anywhere_nothing_is_excluded() -> None:
    old = Tag("old:latest", "d", 1, (), None, None, None, None, "llama")
    (model,) = models_of("o", Seen(tags=(old,), loaded=(), shown={}), SlotRule(), has_gpu=False)
    assert {"completion", "embedding", "tools", "vision"} <= set(model.capabilities)


@pytest.mark.parametrize(
    ("line", "runner"),
    [
        (("ollama", "runner", "--model", f"/m/blobs/{SMOL}", "-c", "8192", "-np", "4"), Runner(SMOL, 4)),
        (("llama-server", f"--model=/m/{SMOL}", "--parallel=2"), Runner(SMOL, 2)),
        (("llama-server", "--model", f"C:\\m\\{SMOL}"), Runner(SMOL, None)),
        (("llama-server", "--model", f"/m/{SMOL}", "-np", "many"), Runner(SMOL, None)),
        (("llama-server", "--model"), None),
        (("llama-server", "--model", "/m/file.gguf"), None),
        (("nvidia-smi",), None),
        ((), None),
    ],
)
def test_a_runner_is_read_from_its_command_line(line: tuple[str, ...], runner: Runner | None) -> None:
    assert parse_runner(line) == runner


CHAT, EMBEDDING = ("completion",), ("embedding",)


@pytest.mark.parametrize(
    ("capabilities", "family", "runner", "rule", "slots"),
    [
        (CHAT, "llama", None, SlotRule(), 1),
        (CHAT, "llama", None, SlotRule(num_parallel=3), 3),
        (CHAT, "llama", Runner(SMOL, 4), SlotRule(num_parallel=3), 4),
        (CHAT, "llama", Runner(SMOL, None), SlotRule(num_parallel=3), 3),
        (CHAT, "llama", Runner(SMOL, 4), SlotRule(forced=2, num_parallel=3), 2),
        (CHAT, "qwen35moe", None, SlotRule(num_parallel=3), 1),
        (CHAT, "qwen3vl", Runner(SMOL, 1), SlotRule(num_parallel=3), 1),
        (EMBEDDING, "bert", Runner(SMOL, 4), SlotRule(forced=2, num_parallel=3), 1),
        (("completion", "embedding"), "llama", None, SlotRule(num_parallel=3), 3),
    ],
)
def test_slots_in_the_order_of_who_knows_best(capabilities, family, runner, rule, slots) -> None:
    assert slots_of(capabilities, family, runner, rule) == slots


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(
    entry=st.dictionaries(
        st.sampled_from(["name", "model", "digest", "size", "size_vram", "details", "expires_at",
                         "context_length", "capabilities", "modelfile", "model_info"]),
        json_values,
    )
)  # fmt: skip
def test_no_shape_of_the_lists_raises(entry: dict[str, object]) -> None:
    listed = {"models": [entry]}
    tags, loaded = parse_tags(listed), parse_ps(listed)
    shown = {tag.digest: parse_show(entry) for tag in tags}
    models_of("o", Seen(tags=tags, loaded=loaded, shown=shown), SlotRule(), has_gpu=False)


def test_two_entries_of_ps_for_one_file_count_as_one_runner() -> None:
    digest = BY_NAME["smollm2:135m"].digest
    twice = (Loaded("smollm2:135m", digest, 0, 2048, None), Loaded("x", digest, 0, 4096, None))
    seen = Seen(tags=TAGS, loaded=twice, shown=SHOWN)
    contexts = {model.context_tokens for model in models_of("o", seen, SlotRule(), has_gpu=False)}
    assert contexts == {2048, None}


def test_a_digest_that_cannot_be_shown_falls_back_on_tags() -> None:
    digest = BY_NAME["smol-embed:latest"].digest
    models = entries("ps-empty", shown={digest: Shown()})
    assert models["smol-embed:latest"].capabilities == ("embedding",)
    assert models["smol-embed:latest"].parameters == 134_520_000
