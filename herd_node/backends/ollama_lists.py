"""Ollama's lists (tags, ps, show) and the command line of a runner, read as values. Pure.

What these lists say is not always what it seems; each trap is named where it is avoided (docs/backends.md).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from herd_node.backends.calls import mapping, objects, text, whole, words
from herd_node.protocol.names import canonical, is_model_name
from herd_node.protocol.wire import Model, ModelState

#: An Ollama whose lists have no capabilities yet: not known, so nothing is excluded.
UNKNOWN_CAPABILITIES = ("completion", "embedding", "insert", "thinking", "tools", "vision")
#: Ollama forces one slot for these families, whatever OLLAMA_NUM_PARALLEL says.
ONE_SLOT_FAMILIES = ("qwen35", "qwen3vl", "lfm2", "nemotron_h")

_FROM_BLOB = re.compile(r"^FROM\s+(?:\"?)(?:.*[\\/])?(sha256-[0-9a-f]{64})\"?\s*$", re.MULTILINE)
_BLOB = re.compile(r"sha256-[0-9a-f]{64}")
_QUANTITY = re.compile(r"^([0-9]+(?:\.[0-9]+)?)\s*([KMBT]?)$")
_FACTOR = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_FRACTION = re.compile(r"\.(\d{6})\d+")


class Tag(NamedTuple):
    """One entry of /api/tags."""

    name: str
    digest: str
    size_bytes: int | None
    capabilities: tuple[str, ...]
    context_train_tokens: int | None
    embedding_length: int | None
    parameters: int | None
    quantisation: str | None
    family: str
    modified_wall_s: float | None = None


class Shown(NamedTuple):
    """What /api/show says of one digest. All None: it was asked and could not say."""

    weights: str | None = None
    capabilities: tuple[str, ...] = ()
    context_train_tokens: int | None = None
    embedding_length: int | None = None
    kv_bytes_per_token: int | None = None
    parameters: int | None = None
    quantisation: str | None = None


class Loaded(NamedTuple):
    """One entry of /api/ps."""

    name: str
    digest: str
    vram_bytes: int | None
    context_tokens: int | None
    expires_wall_s: float | None


class Runner(NamedTuple):
    """A child process of Ollama, read from its command line."""

    weights: str
    slots: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """All that one poll saw, for `models_of`. `runners` is None when the process tree cannot be seen."""

    tags: tuple[Tag, ...]
    loaded: tuple[Loaded, ...]
    shown: Mapping[str, Shown]
    runners: tuple[Runner, ...] | None = None
    loading: Collection[str] = ()
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRule:
    """`forced` is FLEET_NODE_SLOTS, `num_parallel` OLLAMA_NUM_PARALLEL of the agent's own environment."""

    forced: int | None = None
    num_parallel: int | None = None


def parse_tags(fields: Mapping[str, object]) -> tuple[Tag, ...]:
    """Without cloud stubs: they run elsewhere, under an account of their own."""
    return tuple(
        _tag(entry)
        for entry in objects(fields.get("models"))
        if not entry.get("remote_model") and not entry.get("remote_host") and is_model_name(_name(entry))
    )


def _tag(entry: dict[str, object]) -> Tag:
    details = mapping(entry.get("details"))
    return Tag(
        name=_name(entry),
        digest=text(entry.get("digest")) or "",
        size_bytes=whole(entry.get("size")) or None,
        capabilities=words(entry.get("capabilities")),
        context_train_tokens=whole(details.get("context_length")) or None,
        embedding_length=whole(details.get("embedding_length")) or None,
        parameters=parameters_of(text(details.get("parameter_size"))),
        quantisation=text(details.get("quantization_level")),
        family=text(details.get("family")) or "",
        modified_wall_s=wall_of(text(entry.get("modified_at"))),
    )


def _name(entry: Mapping[str, object]) -> str:
    return text(entry.get("name")) or text(entry.get("model")) or ""


def parse_ps(fields: Mapping[str, object]) -> tuple[Loaded, ...]:
    """`size` is left out: on a machine without GPU it is 0, whatever the model takes."""
    return tuple(
        Loaded(
            name=_name(entry),
            digest=text(entry.get("digest")) or "",
            vram_bytes=whole(entry.get("size_vram")),
            context_tokens=whole(entry.get("context_length")) or None,
            expires_wall_s=wall_of(text(entry.get("expires_at"))),
        )
        for entry in objects(fields.get("models"))
    )


def parse_show(fields: Mapping[str, object]) -> Shown:
    """Capabilities from here, not from tags: tags stops reading the GGUF before its own Jinja template."""
    info = mapping(fields.get("model_info"))
    architecture = text(info.get("general.architecture")) or ""
    details = mapping(fields.get("details"))
    return Shown(
        weights=weights_of(text(fields.get("modelfile")) or ""),
        capabilities=words(fields.get("capabilities")),
        context_train_tokens=whole(info.get(f"{architecture}.context_length")) or None,
        embedding_length=whole(info.get(f"{architecture}.embedding_length")) or None,
        kv_bytes_per_token=kv_bytes_per_token(info, architecture),
        parameters=whole(info.get("general.parameter_count")) or None,
        quantisation=text(details.get("quantization_level")),
    )


def weights_of(modelfile: str) -> str | None:
    """The blob in the first FROM line that names a file (a commented one names a model)."""
    found = _FROM_BLOB.search(modelfile)
    return None if found is None else found.group(1)


def kv_bytes_per_token(info: Mapping[str, object], architecture: str) -> int | None:
    """Layers × KV heads × (key + value length) × 2 bytes (f16). Head counts may be given a layer."""
    layers = whole(info.get(f"{architecture}.block_count"))
    heads = _positive(info.get(f"{architecture}.attention.head_count"))
    kv_heads = info.get(f"{architecture}.attention.head_count_kv")
    embedding = whole(info.get(f"{architecture}.embedding_length"))
    # 1. the length of a key and a value: given, or the embedding shared out over the heads
    shared = embedding // heads if embedding and heads else None
    key = whole(info.get(f"{architecture}.attention.key_length")) or shared
    value = whole(info.get(f"{architecture}.attention.value_length")) or shared
    # 2. KV heads over all layers: a number, a list with one a layer, or (absent) as many as heads
    if isinstance(kv_heads, list):
        counts = [count for count in map(whole, kv_heads) if count is not None]
        all_heads = sum(counts) or None
    else:
        each = whole(kv_heads) or heads
        all_heads = layers * each if layers and each else None
    if all_heads is None or key is None or value is None:
        return None
    return all_heads * (key + value) * 2


def _positive(value: object) -> int | None:
    if isinstance(value, list):
        return max((count for count in map(whole, value) if count is not None), default=None)
    return whole(value) or None


def parameters_of(size: str | None) -> int | None:
    """`134.52M` → 134520000."""
    found = _QUANTITY.match(size or "")
    return None if found is None else round(float(found.group(1)) * _FACTOR[found.group(2)])


def wall_of(moment: str | None) -> float | None:
    """Unix seconds of an RFC 3339 time with nanoseconds."""
    if moment is None:
        return None
    try:
        parsed = datetime.fromisoformat(_FRACTION.sub(r".\1", moment))
    except ValueError:
        return None
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def parse_runner(command_line: Sequence[str]) -> Runner | None:
    """`… --model …/blobs/sha256-… -np 4 …` → its weights and slots; None for any other process."""
    weights = _value_of(command_line, ("--model", "-m"))
    blob = None if weights is None else _BLOB.search(weights)
    if blob is None:
        return None
    slots = _value_of(command_line, ("-np", "--parallel"))
    return Runner(
        blob.group(), int(slots) if slots is not None and slots.isascii() and slots.isdigit() else None
    )


def _value_of(command_line: Sequence[str], flags: tuple[str, ...]) -> str | None:
    for position, word in enumerate(command_line):
        if word in flags and position + 1 < len(command_line):
            return command_line[position + 1]
        for flag in flags:
            if word.startswith(f"{flag}="):
                return word[len(flag) + 1 :]
    return None


def models_of(backend: str, seen: Seen, rule: SlotRule, *, has_gpu: bool) -> tuple[Model, ...]:
    """The heartbeat's entries, in tags' order. State by weights: all names of a file share one runner."""
    loaded = _loaded_by_weights(seen)
    runners = {runner.weights: runner for runner in seen.runners or ()}
    return tuple(
        _entry(backend, tag, seen.shown.get(tag.digest, Shown()), seen, loaded, runners, rule, has_gpu)
        for tag in seen.tags
    )


def _loaded_by_weights(seen: Seen) -> dict[str, Loaded]:
    """Weights (or, where unknown, name) → the ps entry that stands for its runner.

    Listed does not mean alive: a runner that was killed stays in ps until the next request. So where the
    process tree can be seen, an entry without a child of its weights is left out.
    """
    alive = None if seen.runners is None else {runner.weights for runner in seen.runners}
    loaded: dict[str, Loaded] = {}
    for entry in seen.loaded:
        weights = seen.shown.get(entry.digest, Shown()).weights
        if alive is not None and weights is not None and weights not in alive:
            continue
        loaded.setdefault(weights or canonical(entry.name), entry)
    return loaded


def residency_key(tag: Tag, shown: Shown) -> str:
    """What is loaded and unloaded: the weights file; the name alone where that is not known."""
    return shown.weights or canonical(tag.name)


def _entry(
    backend: str,
    tag: Tag,
    shown: Shown,
    seen: Seen,
    loaded: Mapping[str, Loaded],
    runners: Mapping[str, Runner],
    rule: SlotRule,
    has_gpu: bool,
) -> Model:
    key = residency_key(tag, shown)
    entry = loaded.get(key)
    capabilities = tuple(sorted(shown.capabilities or tag.capabilities or UNKNOWN_CAPABILITIES))
    model = Model(
        name=tag.name,
        weights=shown.weights,
        backend=backend,
        capabilities=capabilities,
        state=_state(key, entry, seen, runners),
        size_bytes=tag.size_bytes,
        quantisation=shown.quantisation or tag.quantisation,
        parameters=shown.parameters or tag.parameters,
        kv_bytes_per_token=shown.kv_bytes_per_token,
        context_train_tokens=shown.context_train_tokens or tag.context_train_tokens,
        context_tokens=None if entry is None else entry.context_tokens,
        vram_bytes=None if entry is None else _vram(entry, has_gpu),
        expires_in_s=_expires_in(entry, seen.wall_s),
        slots=slots_of(capabilities, tag.family, runners.get(key), rule),
        digest=tag.digest or None,
        modified_s=tag.modified_wall_s,
        family=tag.family or None,
        embedding_length=shown.embedding_length or tag.embedding_length,
    )
    return model


def _state(key: str, entry: Loaded | None, seen: Seen, runners: Mapping[str, Runner]) -> ModelState:
    # 1. listed and alive: hot   2. our own load, or a child that ps does not list yet: loading   3. cold
    if entry is not None:
        return "hot"
    return "loading" if key in seen.loading or key in runners else "cold"


def _vram(entry: Loaded, has_gpu: bool) -> int | None:
    """0 without a GPU means that Ollama's log said nothing, not that the model takes nothing."""
    return entry.vram_bytes if entry.vram_bytes or has_gpu else None


def _expires_in(entry: Loaded | None, wall_s: float) -> float | None:
    """A busy model may show a moment that has passed; it is not unloaded for that."""
    if entry is None or entry.expires_wall_s is None:
        return None
    return max(0.0, entry.expires_wall_s - wall_s)


def is_embedding_model(capabilities: Collection[str]) -> bool:
    return "embedding" in capabilities and "completion" not in capabilities


def slots_of(capabilities: Collection[str], family: str, runner: Runner | None, rule: SlotRule) -> int:
    # 1. Ollama gives embedding models one slot, always: a second request would wait there in silence
    if is_embedding_model(capabilities):
        return 1
    # 2. the user knows better   3. the running child says it   4. the environment   5. Ollama's default
    if rule.forced is not None:
        return rule.forced
    if runner is not None and runner.slots:
        return runner.slots
    if rule.num_parallel and not family.startswith(ONE_SLOT_FAMILIES):
        return rule.num_parallel
    return 1
