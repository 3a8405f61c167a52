import copy
import json
import time
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herd_node.protocol import wire
from herd_node.protocol.names import is_model_name
from herd_node.protocol.wire import (
    Backend,
    BeatReply,
    Cpu,
    Disk,
    Gateway,
    Gpu,
    Hardware,
    Heartbeat,
    Heat,
    Memory,
    Model,
    Power,
    WireError,
    parse_heartbeat,
    parse_reply,
    render_heartbeat,
    render_reply,
)

quick = settings(deadline=None, max_examples=60)

GOLDEN = Path(__file__).parents[1] / "golden" / "heartbeat"
FULL = json.loads((GOLDEN / "v1_full.json").read_bytes())
LEAST = json.loads((GOLDEN / "v1_least.json").read_bytes())

FULL_BEAT = Heartbeat(
    node_id="mac-studio.2",
    agent_id="00112233445566aa",
    boot="8899aabbccddeeff",
    seq=4711,
    interval_s=5.0,
    agent_version="0.1.0",
    draining=False,
    gateway=Gateway(port=11436, addresses=("192.168.1.21", "fd00::21")),
    hardware=Hardware(
        os="Linux",
        os_version="6.12.48",
        arch="x86_64",
        cpu_model="AMD Ryzen 9 7950X",
        cores_physical=16,
        cores_logical=32,
        memory_bytes=68_719_476_736,
        unified_memory=False,
        mac_addresses=("02:00:00:00:00:21",),
    ),
    cpu=Cpu(percent=12.5, load_1m=1.75),
    memory=Memory(
        total_bytes=68_719_476_736,
        used_bytes=21_474_836_480,
        available_bytes=45_097_156_608,
        swap_used_bytes=0,
        pressure="normal",
        source="psi",
    ),
    disk=Disk(total_bytes=2_000_398_934_016, free_bytes=812_345_678_901),
    heat=Heat(state="fair", cpu_c=71.25, throttled=False, source="hwmon:k10temp"),
    power=Power(on_battery=False, battery_percent=100.0),
    gpus=(
        Gpu(
            name="NVIDIA GeForce RTX 4090",
            vendor="nvidia",
            memory_total_bytes=25_757_220_864,
            memory_used_bytes=9_663_676_416,
            utilisation_percent=37.0,
            temperature_c=64.0,
            power_w=211.5,
            throttle=("sw_power_cap",),
        ),
    ),
    backends=(
        Backend(
            id="ollama-11434",
            kind="ollama",
            version="0.17.1",
            ready=True,
            reason=None,
            max_loaded=3,
            endpoints=("/v1/messages", "/v1/responses"),
            manages=("pull", "push", "create", "copy", "delete", "blobs", "load", "unload"),
            disk_free_bytes=421_000_000_000,
        ),
        Backend(
            id="llama-server-8080",
            kind="llama-server",
            version="b7836",
            ready=False,
            reason="It is still loading its model.",
            max_loaded=1,
        ),
    ),
    models=(
        Model(
            name="llama3.2:3b",
            aliases=("llama3.2:latest",),
            weights="sha256-dde5aa3fc5ffc17176b5e8bdc82f587b24b2678c6c66101bf7da77af9f7ccdff",
            backend="ollama-11434",
            capabilities=("completion", "tools"),
            state="hot",
            unloaded_s_ago=None,
            size_bytes=2_019_393_189,
            vram_bytes=3_400_000_000,
            quantisation="Q4_K_M",
            parameters=3_212_749_888,
            kv_bytes_per_token=114_688,
            context_train_tokens=131_072,
            context_tokens=8192,
            context_fixed=False,
            slots=2,
            slots_taken=1,
            expires_in_s=271.5,
            members=("mac-studio.2",),
            digest="a80c4f17acd55265feec403c7aef86be0c25983ab279d83f3bcd3abbcb5b8b72",
            modified_s=1_760_000_000.25,
            family="llama",
            embedding_length=3072,
        ),
        Model(
            name="модель:7b",
            aliases=(),
            weights="modell-7b.gguf",
            backend="llama-server-8080",
            capabilities=("completion",),
            state="warm",
            unloaded_s_ago=93.5,
            size_bytes=4_109_854_720,
            vram_bytes=0,
            quantisation="Q4_0",
            parameters=7_241_732_096,
            kv_bytes_per_token=131_072,
            context_train_tokens=32_768,
            context_tokens=None,
            context_fixed=True,
            slots=4,
            slots_taken=0,
            expires_in_s=None,
            members=("mac-studio.2",),
            digest=None,
            modified_s=None,
            family="llama",
            embedding_length=4096,
        ),
    ),
    in_flight={"llama3.2:3b": 1},
)

LEAST_BEAT = Heartbeat(
    node_id="attic",
    agent_id="00000000000000aa",
    boot="00000000000000bb",
    seq=1,
    interval_s=5.0,
    agent_version="0.1.0",
    gateway=Gateway(port=11436),
)


def changed(path, value, beat=FULL):
    """The golden beat with one value replaced; `path` holds keys and indices."""
    beat = copy.deepcopy(beat)
    place = beat
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return beat


def places(value, path=()):
    """Every path in a decoded JSON value, inner ones included, the root not."""
    rows = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, item in rows:
        yield (*path, step)
        yield from places(item, (*path, step))


def shown(path):
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).lstrip(".")


def problem_of(message):
    with pytest.raises(WireError) as caught:
        parse_heartbeat(message)
    return caught.value


# --- golden


def test_the_full_golden_beat_reads_as_this_value():
    assert parse_heartbeat(FULL) == FULL_BEAT


def test_this_value_is_written_as_the_full_golden_beat_key_for_key_in_order():
    assert json.dumps(render_heartbeat(FULL_BEAT)) == json.dumps(FULL)


def test_a_beat_with_the_required_fields_alone_is_enough():
    assert parse_heartbeat(LEAST) == LEAST_BEAT


def test_what_is_not_known_is_written_as_null():
    rendered = render_heartbeat(LEAST_BEAT)
    assert rendered["cpu"] == {"percent": None, "load_1m": None}
    assert rendered["capacity"] is None
    assert (rendered["v"], rendered["models"], rendered["in_flight"]) == (1, [], {})


# --- properties


def words(pattern):
    return st.from_regex(pattern, fullmatch=True)


TEXT = st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
NAME = words(r"[a-z0-9]{1,6}(:[0-9]b)?") | st.sampled_from(["模型", "hf.co/a/B:Q4"])
NUMBER = st.floats(-1e6, 1e6) | st.integers(-1000, 1000)
NARROW = {
    (Heartbeat, "node_id"): words(r"[A-Za-z0-9_-]{1,64}"),
    (Heartbeat, "agent_id"): words("[0-9a-f]{16}"),
    (Heartbeat, "boot"): words("[0-9a-f]{16}"),
    (Heartbeat, "seq"): st.integers(1, 2**53 - 1),
    (Heartbeat, "interval_s"): st.floats(0.01, 3600),
    (Heartbeat, "in_flight"): st.dictionaries(NAME, st.integers(0, 9), max_size=3),
    (Gateway, "port"): st.integers(1024, 65535),
    (Model, "name"): NAME,
    (Model, "aliases"): st.lists(NAME, max_size=2).map(tuple),
    (Model, "members"): st.lists(words("[a-z]{1,5}"), max_size=2).map(tuple),
    (BeatReply, "boot"): words("[0-9a-f]{16}"),
    (BeatReply, "interval_s"): st.none() | st.floats(0.01, 3600),
}


def by_hint(hint):
    if hint is type(None):
        return st.none()
    if get_origin(hint) is tuple:
        return st.lists(by_hint(get_args(hint)[0]), max_size=3).map(tuple)
    if is_dataclass(hint):
        return values_of(hint)
    if hint in (str, bool, int, float):
        return {str: TEXT, bool: st.booleans(), int: st.integers(0, 2**63 - 1), float: NUMBER}[hint]
    if str(get_origin(hint)) == "typing.Literal":
        return st.sampled_from(get_args(hint))
    return st.one_of(*map(by_hint, get_args(hint)))  # X | None


def values_of(cls):
    """Any value of a wire dataclass that keeps to the protocol, made from its type hints."""
    hints = get_type_hints(cls)
    return st.builds(
        cls,
        **{
            f.name: NARROW[cls, f.name] if (cls, f.name) in NARROW else by_hint(hints[f.name])
            for f in fields(cls)
        },
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@quick
@given(values_of(Heartbeat))
def test_every_beat_survives_the_wire(beat):
    assert parse_heartbeat(json.loads(json.dumps(render_heartbeat(beat)))) == beat


@quick
@given(values_of(BeatReply))
def test_every_reply_survives_the_wire(reply):
    assert parse_reply(json.loads(json.dumps(render_reply(reply)))) == reply


OBJECTS = [
    (),
    *((name,) for name in ("gateway", "hardware", "cpu", "memory", "disk", "heat", "power")),
    *((name, 0) for name in ("gpus", "backends", "models")),
]


@quick
@given(st.data(), JSON)
def test_unknown_fields_are_harmless_at_any_depth(data, value):
    beat = copy.deepcopy(FULL)
    place = beat
    for step in data.draw(st.sampled_from(OBJECTS)):
        place = place[step]
    place["a_field_of_version_1.9"] = value
    assert parse_heartbeat(beat) == FULL_BEAT


@quick
@given(st.sampled_from([*places(FULL)]), JSON)
def test_a_wrong_value_anywhere_is_a_wire_error_and_no_other(path, value):
    try:
        beat = parse_heartbeat(changed(path, value))
    except WireError:
        return
    json.dumps(render_heartbeat(beat), allow_nan=False)


@quick
@given(JSON)
def test_no_json_raises_anything_but_wire_error(value):
    for parse in (parse_heartbeat, parse_reply):
        with pytest.raises(WireError):
            parse(value)


# --- each field


@pytest.mark.parametrize("path", [path for path in places(FULL) if path != ("capacity",)], ids=shown)
def test_a_value_of_the_wrong_type_is_refused_and_named(path):
    value = FULL
    for step in path:
        value = value[step]
    wrong = 7 if isinstance(value, str | list | dict | bool) or value is None else "7"
    if value is None:  # of the golden beat's nulls some are numbers: a list fits none of them
        wrong = []
    error = problem_of(changed(path, wrong))
    assert error.status == 400
    assert error.path == (shown(path) if path[0] != "in_flight" else "in_flight")
    assert " expected " in str(error)
    assert ", got a" in str(error)


def test_the_sentence_names_the_place_and_both_kinds():
    beat = changed(("models",), [FULL["models"][0]] * 3 + [FULL["models"][0] | {"size_bytes": "3 GB"}])
    assert str(problem_of(beat)) == "models[3].size_bytes: expected a whole number, got a string"
    assert str(problem_of([])) == "body: expected an object, got a list"
    assert str(problem_of(changed(("gpus", 0, "throttle", 0), None))) == (
        "gpus[0].throttle[0]: expected a string, got null"
    )


@pytest.mark.parametrize(
    "path", [("seq",), ("models", 0, "slots"), ("cpu", "percent"), ("interval_s",), ("gateway", "port")]
)
def test_true_is_not_a_number(path):
    assert "got true or false" in str(problem_of(changed(path, True)))


@pytest.mark.parametrize("value", [0, 1, "true"])
def test_a_number_is_not_a_truth(value):
    problem_of(changed(("draining",), value))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 10**400, -(10**400), 1e301])
def test_numbers_are_finite(value):
    assert str(problem_of(changed(("heat", "cpu_c"), value))) == "heat.cpu_c: expected a finite number"


@pytest.mark.parametrize("value", [-1, 2**63, 10**400, 5.0, 5.5, float("nan")])
def test_counts_and_bytes_are_whole_and_not_negative(value):
    problem_of(changed(("disk", "free_bytes"), value))


def test_a_temperature_may_be_below_zero_and_a_whole_number():
    beat = parse_heartbeat(changed(("heat", "cpu_c"), -5))
    assert beat.heat.cpu_c == -5.0
    assert type(beat.heat.cpu_c) is float


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("node_id",), ""),
        (("node_id",), "a b"),
        (("node_id",), ".."),
        (("node_id",), "<b>"),
        (("node_id",), "x" * 65),
        (("agent_id",), "00112233445566AA"),
        (("agent_id",), "00112233445566a"),
        (("boot",), "00112233445566aaa"),
        (("boot",), "0011 2233445566a"),
        (("seq",), 0),
        (("seq",), 2**53),
        (("interval_s",), 0),
        (("interval_s",), -5),
        (("interval_s",), 3601),
        (("gateway", "port"), 1023),
        (("gateway", "port"), 65536),
        (("memory", "pressure"), "fine"),
        (("heat", "state"), "Nominal"),
        (("models", 0, "state"), ""),
        (("backends", 0, "kind"), "vllm"),
        (("models", 0, "members", 0), "a/b"),
    ],
)
def test_a_value_outside_its_range_is_refused_and_named(path, value):
    error = problem_of(changed(path, value))
    assert (error.status, error.path) == (400, shown(path))


@pytest.mark.parametrize(
    "path", [("node_id",), ("agent_id",), ("boot",), ("seq",), ("interval_s",), ("agent_version",)]
)
def test_a_required_field_can_be_neither_absent_nor_null(path):
    assert (
        str(problem_of({key: value for key, value in FULL.items() if key != path[0]}))
        == f"{path[0]}: missing"
    )
    assert str(problem_of(changed(path, None))) == f"{path[0]}: null, but it is required"


def test_required_fields_inside_are_named_with_their_place():
    assert str(problem_of(changed(("gateway",), {}))) == "gateway.port: missing"
    assert (
        str(problem_of(changed(("models", 1, "backend"), None)))
        == "models[1].backend: null, but it is required"
    )


@pytest.mark.parametrize("name", [name for name in FULL if name not in LEAST])
def test_null_is_allowed_wherever_a_value_may_be_unknown(name):
    assert parse_heartbeat(LEAST | {name: None}) == LEAST_BEAT


def test_null_inside_takes_the_default():
    model = {key: None for key in FULL["models"][0]} | {"name": "a", "backend": "b"}
    assert parse_heartbeat(LEAST | {"models": [model]}).models == (Model(name="a", backend="b"),)


def test_another_version_is_answered_426_before_anything_else_is_looked_at():
    error = problem_of({"v": 2, "node_id": 7})
    assert error.status == 426
    assert str(error) == "v: this program speaks version 1 of the heartbeat"


@pytest.mark.parametrize("version", [None, "1", 1.0, True, []])
def test_a_version_that_is_no_number_is_answered_400(version):
    assert problem_of(FULL | {"v": version}).status == 400


# --- limits


@pytest.mark.parametrize("text", ["x" * 257, "a\0b", "\ud800", "ok\udfff"])
def test_strings_are_short_and_real_text(text):
    for path in (
        ("agent_version",),
        ("hardware", "cpu_model"),
        ("models", 0, "name"),
        ("gateway", "addresses", 0),
    ):
        assert problem_of(changed(path, text)).path == shown(path)
    assert problem_of(changed(("in_flight",), {text: 1})).path == "in_flight"


def test_256_characters_of_any_script_are_a_string():
    text = "模" * 256
    assert parse_heartbeat(changed(("hardware", "cpu_model"), text)).hardware.cpu_model == text


def test_at_most_512_models():
    model = {"name": "m", "backend": "b"}
    assert len(parse_heartbeat(LEAST | {"models": [model] * 512}).models) == 512
    assert str(problem_of(LEAST | {"models": [model] * 513})) == "models: more than 512 entries"
    assert problem_of(LEAST | {"in_flight": {f"m{number}": 1 for number in range(513)}}).path == "in_flight"


def test_a_full_beat_of_512_models_is_read_in_under_20_ms():
    model = FULL["models"][0]
    beat = LEAST | {"models": [model | {"name": f"m{number}"} for number in range(512)]}
    best_s = min(timed(beat) for _ in range(5))
    assert best_s < 0.020


def timed(beat):
    began_s = time.perf_counter()
    parse_heartbeat(beat)
    return time.perf_counter() - began_s


# --- names


ILLEGAL = ["<img src=x>", "a b", "../x", "a{{7*7}}", "a\u202eb", "x" * 201, ""]


@pytest.mark.parametrize("name", ILLEGAL)
def test_a_model_with_a_name_that_could_be_markup_is_left_out_and_the_beat_stays(name):
    beat = parse_heartbeat(changed(("models", 0, "name"), name))
    assert [model.name for model in beat.models] == ["модель:7b"]


@pytest.mark.parametrize("name", ILLEGAL)
def test_such_aliases_and_counts_are_left_out_too(name):
    beat = parse_heartbeat(changed(("models", 0, "aliases"), ["good", name, "fine"]))
    assert beat.models[0].aliases == ("good", "fine")
    assert parse_heartbeat(changed(("in_flight",), {name: 3, "good": 2})).in_flight == {"good": 2}


@quick
@given(st.lists(st.text(max_size=8), max_size=5))
def test_no_other_name_ever_gets_in(names):
    models = [{"name": name, "aliases": names, "backend": "b"} for name in names if "\0" not in name]
    try:
        beat = parse_heartbeat(LEAST | {"models": models, "in_flight": dict.fromkeys(names, 1)})
    except WireError:
        return
    for name in (*beat.in_flight, *(name for model in beat.models for name in (model.name, *model.aliases))):
        assert is_model_name(name)


# --- replies


REPLY = {
    "router_id": "5ca1ab1e",
    "boot": "00000000000000cc",
    "state": "online",
    "reason": None,
    "interval_s": None,
}


def test_a_reply_reads_as_it_was_written():
    reply = BeatReply(router_id="5ca1ab1e", boot="00000000000000cc", state="online")
    assert parse_reply(REPLY | {"later": 1}) == reply
    assert json.dumps(render_reply(reply)) == json.dumps(REPLY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("router_id", None),
        ("router_id", 7),
        ("boot", "CC"),
        ("boot", None),
        ("state", "offline"),
        ("state", None),
        ("reason", 7),
        ("interval_s", 0),
        ("interval_s", "5"),
        ("interval_s", float("nan")),
    ],
)
def test_a_wrong_reply_is_refused_and_the_field_named(name, value):
    with pytest.raises(WireError) as caught:
        parse_reply(REPLY | {name: value})
    assert caught.value.path == name


def test_the_limits_are_those_of_the_protocol():
    assert (wire.VERSION, wire.MAX_BEAT_BYTES, wire.MAX_ITEMS, wire.MAX_STRING_CHARS) == (
        1,
        262_144,
        512,
        256,
    )
