"""Heartbeats and registries in one line each, for the tests of the fleet."""

from __future__ import annotations

from typing import Any

from herd.fleet.registry import AttemptToken, Registry
from herd.request import PrefixMark
from herd_node.protocol import wire

AGENT = "a" * 16
BOOT = "b" * 16
HOST = "10.0.0.5"
OLLAMA = "ollama-11434"
KEY = f"{OLLAMA}|sha256-one"


def model(name: str = "llama3:8b", state: wire.ModelState = "hot", **fields: Any) -> wire.Model:
    defaults: dict[str, Any] = {
        "weights": "sha256-one",
        "backend": OLLAMA,
        "capabilities": ("completion",),
        "size_bytes": 5_000_000_000,
        "parameters": 8_000_000_000,
        "slots": 2,
    }
    return wire.Model(name=name, state=state, **{**defaults, **fields})


def backend(
    id: str = OLLAMA, kind: wire.BackendKind = "ollama", ready: bool = True, **fields: Any
) -> wire.Backend:
    return wire.Backend(id=id, kind=kind, ready=ready, **fields)


def beat(node_id: str = "attic", *models: wire.Model, **fields: Any) -> wire.Heartbeat:
    defaults: dict[str, Any] = {
        "agent_id": AGENT,
        "boot": BOOT,
        "seq": 1,
        "interval_s": 5.0,
        "agent_version": "0.1.0",
        "gateway": wire.Gateway(port=11436, addresses=(HOST, "fd00::5")),
        "backends": (backend(),),
        "models": models,
    }
    return wire.Heartbeat(node_id=node_id, **{**defaults, **fields})


def fresh(**fields: Any) -> Registry:
    return Registry(router_id="router", **fields)


def online(*models: wire.Model, now_s: float = 0.0, node_id: str = "attic", **fields: Any) -> Registry:
    """A registry with one node that beat and answered its probe."""
    registry = fresh()
    join(registry, beat(node_id, *models, **fields), now_s)
    registry.drain_events()
    return registry


def join(registry: Registry, hb: wire.Heartbeat, now_s: float, host: str = HOST) -> None:
    registry.on_beat(hb, host, now_s)
    for target in registry.probes_due(now_s):
        registry.on_probe(target.node_id, True, now_s, target=target)


def status(registry: Registry, node_id: str = "attic", now_s: float = 0.0) -> str:
    return registry.snapshot(now_s).nodes[node_id].status


def start(
    registry: Registry,
    now_s: float,
    *,
    key: str = KEY,
    node_id: str = "attic",
    request_id: str = "r",
    name: str = "llama3:8b",
    prefixes: tuple[PrefixMark, ...] = (),
) -> AttemptToken:
    return registry.start_attempt(node_id, key, request_id, name, 1.0, 100.0, prefixes, now_s)


def marks(*messages: str) -> tuple[PrefixMark, ...]:
    """A prompt of these messages: each digest stands for everything before it."""
    return tuple(
        PrefixMark("/".join(messages[: count + 1]).encode(), 100.0 * (count + 1))
        for count in range(len(messages))
    )
