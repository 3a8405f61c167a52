"""Heartbeat v1: the values, and the only parser and renderer of them (docs/protocol.md §3).

A value that is not known is None, never 0 and never invented. Unknown fields are ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from herd_node.protocol.auth import MAX_SEQ, is_boot
from herd_node.protocol.names import is_model_name, is_node_id

VERSION = 1
MAX_BEAT_BYTES = 256 * 1024
#: Of every list and table in a beat; models are the one that comes near it.
MAX_ITEMS = 512
MAX_STRING_CHARS = 256
MAX_INTEGER = 2**63 - 1
MAX_NUMBER = 1e300
MAX_INTERVAL_S = 3600.0

PressureWord = Literal["normal", "warn", "critical"]
HeatWord = Literal["nominal", "fair", "serious", "critical"]
BackendKind = Literal["ollama", "llama-server", "llama-router", "openai"]
ModelState = Literal["hot", "loading", "warm", "cold"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    port: int
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    os: str | None = None
    os_version: str | None = None
    arch: str | None = None
    cpu_model: str | None = None
    cores_physical: int | None = None
    cores_logical: int | None = None
    memory_bytes: int | None = None
    unified_memory: bool | None = None
    mac_addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    percent: float | None = None
    load_1m: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    total_bytes: int | None = None
    used_bytes: int | None = None
    available_bytes: int | None = None
    swap_used_bytes: int | None = None
    pressure: PressureWord | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    total_bytes: int | None = None
    free_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    state: HeatWord | None = None
    cpu_c: float | None = None
    throttled: bool | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    on_battery: bool | None = None
    battery_percent: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    name: str | None = None
    vendor: str | None = None
    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    utilisation_percent: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    throttle: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    id: str
    kind: BackendKind | None = None
    version: str | None = None
    ready: bool = False
    reason: str | None = None
    max_loaded: int | None = None
    endpoints: tuple[str, ...] = ()
    """Of those that not every backend has (`routes.OFFERED_BY`), the ones that this one offers."""
    manages: tuple[str, ...] = ()
    """What it can do with its models when it is told: `pull`, `pull-gguf`, `push`, `create`, …"""
    disk_free_bytes: int | None = None
    """Of the folder that its pulls go to, where that is another than the node's `disk`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    name: str
    aliases: tuple[str, ...] = ()
    weights: str | None = None
    backend: str
    capabilities: tuple[str, ...] = ()
    state: ModelState = "cold"
    unloaded_s_ago: float | None = None
    size_bytes: int | None = None
    vram_bytes: int | None = None
    quantisation: str | None = None
    parameters: int | None = None
    kv_bytes_per_token: int | None = None
    context_train_tokens: int | None = None
    context_tokens: int | None = None
    context_fixed: bool = False
    slots: int | None = None
    slots_taken: int | None = None
    expires_in_s: float | None = None
    members: tuple[str, ...] = ()
    digest: str | None = None
    """What the backend's own list calls the model's digest; for lists only, never for identity."""
    modified_s: float | None = None
    family: str | None = None
    embedding_length: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """One beat, parsed and validated."""

    node_id: str
    agent_id: str
    boot: str
    seq: int
    interval_s: float
    agent_version: str
    draining: bool = False
    gateway: Gateway
    hardware: Hardware = field(default_factory=Hardware)
    cpu: Cpu = field(default_factory=Cpu)
    memory: Memory = field(default_factory=Memory)
    disk: Disk = field(default_factory=Disk)
    heat: Heat = field(default_factory=Heat)
    power: Power = field(default_factory=Power)
    gpus: tuple[Gpu, ...] = ()
    backends: tuple[Backend, ...] = ()
    models: tuple[Model, ...] = ()
    in_flight: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class BeatReply:
    """The router's answer to an accepted beat."""

    router_id: str
    boot: str
    state: Literal["online", "draining", "pending", "unreachable"]
    reason: str | None = None
    interval_s: float | None = None


class WireError(ValueError):
    """A message against the protocol; `str()` names the field, `status` (400 or 426) is the answer to it."""

    def __init__(self, problem: str, *, path: str = "", status: int = 400) -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.problem = problem
        self.path = path
        self.status = status

    def inside(self, outer: str) -> WireError:
        """The same error seen from one level further out; paths are only built when something is wrong."""
        if not self.path:
            path = outer
        elif self.path.startswith("["):
            path = outer + self.path
        else:
            path = f"{outer}.{self.path}"
        return WireError(self.problem, path=path, status=self.status)


def parse_heartbeat(message: object) -> Heartbeat:
    """A beat from decoded JSON, every value checked. Raises WireError and nothing else.

    Models, aliases and counts under a name that `names.is_model_name` refuses are left out; the beat stays.
    """
    if not isinstance(message, dict):
        raise _unexpected("an object", message).inside("body")
    version = message.get("v")
    if type(version) is not int:
        raise _unexpected("a whole number", version).inside("v")
    if version != VERSION:
        raise WireError(f"this program speaks version {VERSION} of the heartbeat", path="v", status=426)
    return cast(Heartbeat, _HEARTBEAT.parse(message))


def render_heartbeat(beat: Heartbeat) -> dict[str, object]:
    """The beat as what a JSON encoder takes; `parse_heartbeat` gives back an equal one."""
    return {"v": VERSION, **_HEARTBEAT.render(beat), "capacity": None}


def parse_reply(message: object) -> BeatReply:
    """The router's answer to a beat. Raises WireError and nothing else."""
    return cast(BeatReply, _BEAT_REPLY.parse(message))


def render_reply(reply: BeatReply) -> dict[str, object]:
    return _BEAT_REPLY.render(reply)


# How it works: each dataclass above is compiled once into a `_Shape`, a table of its fields with parser and
# renderer, made from the type hints; `_PARSERS` names the fields whose values are narrower than their type.

_Parser = Callable[[object], object]
_Renderer = Callable[[Any], object]


def _unexpected(wanted: str, value: object) -> WireError:
    return WireError(f"expected {wanted}, got {_kind_of(value)}")


def _kind_of(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int():
            return "a whole number"
        case float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return "something that is not JSON"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _unexpected("a string", value)
    if len(value) > MAX_STRING_CHARS:
        raise WireError(f"longer than {MAX_STRING_CHARS} characters")
    if "\0" in value:
        raise WireError("has a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise WireError("has half of a surrogate pair") from None
    return value


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise _unexpected("true or false", value)
    return value


def _whole(value: object) -> int:
    if type(value) is not int:
        raise _unexpected("a whole number", value)
    if not 0 <= value <= MAX_INTEGER:
        raise WireError("expected a whole number from 0 to 2^63 - 1")
    return value


def _number(value: object) -> float:
    if type(value) is not float and type(value) is not int:
        raise _unexpected("a number", value)
    # A comparison that NaN fails, as infinities and whole numbers too large for a float do.
    if not -MAX_NUMBER <= value <= MAX_NUMBER:
        raise WireError("expected a finite number")
    return float(value)


def _whole_between(least: int, most: int) -> _Parser:
    def parse(value: object) -> int:
        number = _whole(value)
        if not least <= number <= most:
            raise WireError(f"expected a whole number from {least} to {most}")
        return number

    return parse


def _interval(value: object) -> float:
    seconds = _number(value)
    if not 0 < seconds <= MAX_INTERVAL_S:
        raise WireError(f"expected more than 0 and at most {MAX_INTERVAL_S:.0f} seconds")
    return seconds


def _text_like(fits: Callable[[object], bool], wanted: str) -> _Parser:
    def parse(value: object) -> str:
        text = _text(value)
        if not fits(text):
            raise WireError(f"expected {wanted}")
        return text

    return parse


def _one_of(words: tuple[str, ...]) -> _Parser:
    allowed = frozenset(words)
    problem = "expected one of " + ", ".join(words)

    def parse(value: object) -> str:
        if not isinstance(value, str):
            raise _unexpected("a string", value)
        if value not in allowed:
            raise WireError(problem)
        return value

    return parse


def _many(parse_one: _Parser, keep: Callable[[Any], bool] | None = None) -> _Parser:
    """A list of at most MAX_ITEMS; each is checked, and those that `keep` refuses are left out."""

    def parse(value: object) -> tuple[object, ...]:
        if not isinstance(value, list):
            raise _unexpected("a list", value)
        if len(value) > MAX_ITEMS:
            raise WireError(f"more than {MAX_ITEMS} entries")
        made = []
        for index, item in enumerate(value):
            try:
                one = parse_one(item)
            except WireError as error:
                raise error.inside(f"[{index}]") from None
            if keep is None or keep(one):
                made.append(one)
        return tuple(made)

    return parse


def _counts(value: object) -> dict[str, int]:
    """Model name -> whole number."""
    if not isinstance(value, dict):
        raise _unexpected("an object", value)
    if len(value) > MAX_ITEMS:
        raise WireError(f"more than {MAX_ITEMS} entries")
    counts = {}
    for name, count in value.items():
        number = _whole(count)
        if is_model_name(_text(name)):
            counts[name] = number
    return counts


class _Shape:
    """One dataclass, ready to be read from decoded JSON and to be turned into it."""

    def __init__(self, cls: type[Any]) -> None:
        hints = get_type_hints(cls)
        self._make = cls
        self._rows: list[tuple[str, _Parser, _Renderer | None, bool]] = []
        for item in fields(cls):
            parse, render = _by_hint(hints[item.name])
            required = item.default is MISSING and item.default_factory is MISSING
            self._rows.append((item.name, _PARSERS.get((cls, item.name), parse), render, required))

    def parse(self, value: object) -> object:
        """Unknown fields are ignored; one that is absent or null takes its default, if it has one."""
        if not isinstance(value, dict):
            raise _unexpected("an object", value)
        found = {}
        for name, parse, _, required in self._rows:
            item = value.get(name)
            if item is None:
                if required:
                    raise WireError("null, but it is required" if name in value else "missing", path=name)
                continue
            try:
                found[name] = parse(item)
            except WireError as error:
                raise error.inside(name) from None
        return self._make(**found)

    def render(self, value: object) -> dict[str, object]:
        rendered = {}
        for name, _, render, _ in self._rows:
            item = getattr(value, name)
            rendered[name] = item if render is None or item is None else render(item)
        return rendered


def _by_hint(hint: Any) -> tuple[_Parser, _Renderer | None]:  # noqa: ANN401 - hints have no common type
    """Parser and renderer of a type hint; no renderer means that the value is JSON as it is."""
    if get_origin(hint) in (UnionType, Union):  # X | None: null never gets as far as the parser
        (hint,) = (arm for arm in get_args(hint) if arm is not NoneType)
    if get_origin(hint) is Literal:
        return _one_of(get_args(hint)), None
    if get_origin(hint) is tuple:
        parse, render = _by_hint(get_args(hint)[0])
        return _many(parse), list if render is None else lambda items: [render(item) for item in items]
    if get_origin(hint) is dict:
        return _counts, dict
    if is_dataclass(hint):
        shape = _Shape(cast(type[Any], hint))
        return shape.parse, shape.render
    return _SCALARS[hint], None


_SCALARS: dict[type, _Parser] = {str: _text, bool: _truth, int: _whole, float: _number}

_HEX16 = _text_like(is_boot, "16 lower-case hex digits")
_NODE_ID = _text_like(is_node_id, "a node id: 1 to 64 of A-Z a-z 0-9 . _ -")

_PARSERS: dict[tuple[type, str], _Parser] = {
    (Heartbeat, "node_id"): _NODE_ID,
    (Heartbeat, "agent_id"): _HEX16,
    (Heartbeat, "boot"): _HEX16,
    (Heartbeat, "seq"): _whole_between(1, MAX_SEQ),
    (Heartbeat, "interval_s"): _interval,
    (Gateway, "port"): _whole_between(1024, 65535),
    (Model, "aliases"): _many(_text, keep=is_model_name),
    (Model, "members"): _many(_NODE_ID),
    (BeatReply, "boot"): _HEX16,
    (BeatReply, "interval_s"): _interval,
}
_PARSERS[Heartbeat, "models"] = _many(_Shape(Model).parse, keep=lambda model: is_model_name(model.name))

_HEARTBEAT = _Shape(Heartbeat)
_BEAT_REPLY = _Shape(BeatReply)
