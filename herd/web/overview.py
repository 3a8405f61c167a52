"""The fleet in summary, from the answer of /fleet/status: one reading for the page and the terminal.

Pure. Values that an agent does not know are None there and dashes here; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from herd.web import human

#: The best state that a model has anywhere stands for the model.
STATES: Final = ("hot", "loading", "warm", "cold")
LOADED: Final = ("hot", "loading")
GONE: Final = ("offline", "pending")

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSummary:
    """One node, as text; `memory_ratio` (0-1) is None when not known."""

    node_id: str
    status: str
    reason: str
    seen: str
    agent_version: str
    cpu: str
    memory: str
    memory_ratio: float | None
    pressure: str
    heat: str
    gpu: str
    backends: str
    troubles: tuple[str, ...]
    """A sentence for whatever is wrong: the node's own reason first, then backends that are not ready."""
    hot: tuple[str, ...]
    models_total: int
    in_flight: int
    slots: int
    waiting: int
    settling: int

    @property
    def gone(self) -> bool:
        """Nothing can be sent there."""
        return self.status in GONE

    @property
    def busy(self) -> str:
        return human.busy(self.in_flight, self.slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSummary:
    """One model over all nodes that are there. `where` has a (node id, state) for each of them."""

    name: str
    state: str
    size: str
    context: str
    in_flight: int
    slots: int
    waiting: int
    where: tuple[tuple[str, str], ...]

    @property
    def busy(self) -> str:
        return human.busy(self.in_flight, self.slots)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """One model on one node, in memory or on its way there."""

    name: str
    node_id: str
    state: str
    size: str
    context: str
    busy: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSummary:
    """One attempt, as text."""

    request_id: str
    attempt: int
    time: str
    """ISO 8601, UTC."""
    age: str
    model: str
    asked: str
    """What the caller asked for, when something else served it."""
    node: str
    status: str
    score: str
    queue: str
    first_token: str
    latency: str
    rate: str
    error: str


def nodes(status: Json) -> tuple[NodeSummary, ...]:
    return tuple(_node(node) for node in status["nodes"])


def models(status: Json) -> tuple[ModelSummary, ...]:
    """By name. Models that only nodes which are gone have are left out, as in the lists for clients."""
    entries: dict[str, list[tuple[str, Json]]] = {}
    for node in status["nodes"]:
        if node["status"] not in GONE:
            for model in node["models"]:
                entries.setdefault(model["name"], []).append((node["node_id"], model))
    queues = status.get("queues", {})
    return tuple(_merged(name, entries[name], queues.get(name, {})) for name in sorted(entries))


def loaded(status: Json) -> tuple[LoadedModel, ...]:
    """What is in memory or being loaded, on nodes that are there, by name."""
    found = [
        LoadedModel(
            name=model["name"],
            node_id=node["node_id"],
            state=model["state"],
            size=human.size(model.get("size_bytes")),
            context=human.text(model.get("context")),
            busy=human.busy(model.get("in_flight") or 0, model.get("slots") or 0),
        )
        for node in status["nodes"]
        if node["status"] not in GONE
        for model in node["models"]
        if model["state"] in LOADED
    ]
    return tuple(sorted(found, key=lambda model: (model.name, model.node_id)))


def traces(rows: Iterable[Json], now_wall_s: float) -> tuple[TraceSummary, ...]:
    """In the order given; ages are counted from `now_wall_s`."""
    return tuple(_trace(row, now_wall_s) for row in rows)


def totals(status: Json) -> str:
    """One line: 2 of 3 nodes online, 4 models loaded, 1 request active, 0 waiting."""
    fleet = status["fleet"]
    return ", ".join(
        (
            f"{fleet['nodes_online']} of {human.count(fleet['nodes_total'], 'node')} online",
            f"{human.count(fleet['models_loaded'], 'model')} loaded",
            f"{human.count(fleet['requests_active'], 'request')} active",
            f"{fleet['requests_waiting']} waiting",
        )
    )


def tokens_per_s(row: Json) -> float | None:
    """Completion tokens over the whole attempt, as the SQL of docs/traces.md counts them."""
    tokens, latency_ms = row.get("completion_tokens"), row.get("latency_ms")
    return tokens * 1000 / latency_ms if tokens and latency_ms else None


def utc(wall_s: float) -> str:
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _node(node: Json) -> NodeSummary:
    memory = node.get("memory") or {}
    used_bytes, total_bytes = _used_bytes(memory), memory.get("total_bytes")
    listed: Sequence[Json] = node["models"]
    return NodeSummary(
        node_id=node["node_id"],
        status=node["status"],
        reason=node.get("reason") or "",
        seen=human.ago(node.get("last_seen_s")),
        agent_version=human.text(node.get("agent_version")),
        cpu=human.percent((node.get("cpu") or {}).get("percent")),
        memory=human.memory_share(used_bytes, total_bytes),
        memory_ratio=min(1.0, used_bytes / total_bytes) if used_bytes is not None and total_bytes else None,
        pressure=human.text(memory.get("pressure")),
        heat=_heat(node.get("heat") or {}),
        gpu=", ".join(map(_gpu, node.get("gpus") or ())) or human.UNKNOWN,
        backends=", ".join(map(_backend, node.get("backends") or ())) or "none",
        troubles=(*([node["reason"]] if node.get("reason") else []), *_backend_troubles(node)),
        hot=tuple(sorted(model["name"] for model in listed if model["state"] == "hot")),
        models_total=len(listed),
        in_flight=node.get("in_flight") or 0,
        slots=sum(model.get("slots") or 0 for model in listed if model["state"] in LOADED),
        waiting=node.get("waiting") or 0,
        settling=node.get("settling") or 0,
    )


def _used_bytes(memory: Json) -> float | None:
    """What is not available is used; the agent's own `used` leaves out what cannot be given back."""
    total, available = memory.get("total_bytes"), memory.get("available_bytes")
    used: float | None = memory.get("used_bytes")
    return used if total is None or available is None else total - available


def _heat(heat: Json) -> str:
    state, degrees = heat.get("state"), heat.get("cpu_c")
    words = [state or "", f"{degrees:.0f} °C" if degrees is not None else ""]
    return " ".join(word for word in words if word) or human.UNKNOWN


def _gpu(gpu: Json) -> str:
    used, total = gpu.get("memory_used_bytes"), gpu.get("memory_total_bytes")
    name = gpu.get("name") or "GPU"
    return f"{name} {human.memory_share(used, total)}" if total else str(name)


def _backend_troubles(node: Json) -> tuple[str, ...]:
    broken = [backend for backend in node.get("backends") or () if not backend.get("ready")]
    return tuple(f"Backend {_backend(backend)}." for backend in broken)


def _backend(backend: Json) -> str:
    name = " ".join(word for word in (backend.get("kind"), backend.get("version")) if word)
    if backend.get("ready"):
        return name or "ready"
    trouble = f"not ready: {backend['reason']}" if backend.get("reason") else "not ready"
    return f"{name} ({trouble})" if name else trouble


def _merged(name: str, entries: Sequence[tuple[str, Json]], queue: Json) -> ModelSummary:
    by_state = sorted(entries, key=lambda entry: (STATES.index(entry[1]["state"]), entry[0]))
    best = by_state[0][1]
    live = [model for _, model in entries if model["state"] in LOADED]
    return ModelSummary(
        name=name,
        state=best["state"],
        size=human.size(best.get("size_bytes")),
        context=human.text(best.get("context")),
        in_flight=sum(model.get("in_flight") or 0 for _, model in entries),
        slots=sum(model.get("slots") or 0 for model in live),
        waiting=queue.get("waiting") or 0,
        where=tuple((node_id, model["state"]) for node_id, model in by_state),
    )


def _trace(row: Json, now_wall_s: float) -> TraceSummary:
    model, asked = row["model"], row["original_model"]
    return TraceSummary(
        request_id=row["request_id"],
        attempt=row["attempt"],
        time=utc(row["timestamp"]),
        age=human.ago(now_wall_s - row["timestamp"]),
        model=model,
        asked=asked if row.get("fallback_used") else "",
        node=human.text(row.get("node_id")),
        status=row["status"],
        score=human.number(row.get("score")),
        queue=human.duration_ms(row.get("queue_ms")),
        first_token=human.duration_ms(row.get("time_to_first_token_ms")),
        latency=human.duration_ms(row.get("latency_ms")),
        rate=human.number(tokens_per_s(row)),
        error=row.get("error_message") or "",
    )
