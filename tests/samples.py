"""A fleet as /fleet/status tells it, and traces as they are made: for tests of store, console and page."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from typing import Any

from herd.store.traces import as_listed, row_of, write_rows
from herd.trace import Exclusion, ScoreCard, Trace

WALL_S = 1_790_000_000.0


def trace(request_id: str = "a" * 24, attempt: int = 1, **fields: Any) -> Trace:
    """A completed attempt, unless told otherwise."""
    card = ScoreCard("den", 106.5, (50.0, 20.0, 0.0, -3.5, 15.0, 10.0, 15.0))
    other = ScoreCard("attic", 69.0, (20.0, 20.0, -1.0, -2.0, 7.0, 10.0, 15.0))
    made = Trace(
        request_id=request_id,
        attempt=attempt,
        status="completed",
        timestamp=WALL_S - 12,
        model="llama3.2:3b",
        original_model="llama3.2:3b",
        original_format="openai",
        kind="chat",
        router_id="0123456789abcdef",
        node_id="den",
        score=card.total,
        card=card,
        candidates=(card, other),
        excluded=(Exclusion("laptop", "offline"),),
        latency_ms=2_000.0,
        time_to_first_token_ms=250.0,
        queue_ms=3.0,
        prompt_tokens=120,
        cached_tokens=0,
        completion_tokens=80,
        client_ip="127.0.0.1",
        principal="loopback",
        finish_reason="stop",
        estimated_tokens=110.4,
        tags=("home",),
        agent_version="0.1.0",
    )
    return made._replace(**fields)


def started(request_id: str = "a" * 24, attempt: int = 1, **fields: Any) -> Trace:
    """The same attempt before anything came back."""
    row = trace(
        request_id,
        attempt,
        status="started",
        latency_ms=None,
        time_to_first_token_ms=None,
        prompt_tokens=None,
        cached_tokens=None,
        completion_tokens=None,
        finish_reason=None,
    )
    return row._replace(**fields)


def as_row(made: Trace) -> dict[str, object]:
    """What `list_traces` gives for it."""
    return as_listed(row_of(made))


def write_batch(connection: sqlite3.Connection, made: Iterable[Trace]) -> None:
    """What the trace writer does with a batch."""
    write_rows(connection, [row_of(one) for one in made])


def model(name: str, state: str = "cold", **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "state": state,
        "size_bytes": 2_019_393_189,
        "context": 4096 if state == "hot" else None,
        "slots": 1,
        "in_flight": 0,
        **fields,
    }


def node(node_id: str, status: str = "online", **fields: Any) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "status": status,
        "reason": None,
        "agent_version": "0.1.0",
        "last_seen_s": 1.4,
        "hardware": {"os": "Linux", "arch": "x86_64", "cores_physical": 8, "memory_bytes": 34_359_738_368},
        "cpu": {"percent": 23.4, "load_1m": 1.8},
        "memory": {
            "total_bytes": 34_359_738_368,
            "used_bytes": 14_000_000_000,
            "available_bytes": 19_327_352_832,
            "swap_used_bytes": 0,
            "pressure": "normal",
            "source": "psi",
        },
        "disk": {"total_bytes": 10**12, "free_bytes": 4 * 10**11},
        "heat": {"state": "nominal", "cpu_c": 54.0, "throttled": False, "source": "hwmon"},
        "gpus": [],
        "backends": [{"kind": "ollama", "version": "0.11.4", "ready": True, "reason": None}],
        "models": [model("llama3.2:3b", "hot", slots=2, in_flight=1), model("qwen3:8b")],
        "in_flight": 1,
        "waiting": 0,
        "settling": 0,
        "reported": {"in_flight_by_agent": {"llama3.2:3b": 1}, "slots_taken": 1},
        **fields,
    }


def fleet_status() -> dict[str, Any]:
    """A good node, one with a GPU and trouble, one that is gone, and one of which nothing is known."""
    nothing = {"total_bytes": None, "used_bytes": None, "available_bytes": None, "pressure": None}
    gpu = {
        "name": "RTX 3090",
        "memory_total_bytes": 25_769_803_776,
        "memory_used_bytes": 21_474_836_480,
        "utilisation_percent": 91.0,
    }
    return {
        "fleet": {
            "nodes_total": 4,
            "nodes_online": 3,
            "models_loaded": 2,
            "requests_active": 1,
            "requests_waiting": 2,
        },
        "nodes": [
            node("den"),
            node(
                "attic",
                cpu={"percent": 88.0},
                memory={"total_bytes": 17_179_869_184, "available_bytes": 1_288_490_188, "pressure": "warn"},
                heat={"state": "serious", "cpu_c": 91.0},
                gpus=[gpu],
                models=[
                    model("llama3.2:3b", "warm"),
                    model("qwen3:8b", "loading", size_bytes=5_200_000_000),
                    model("nomic-embed-text", size_bytes=274_302_450),
                ],
                in_flight=0,
                waiting=2,
                settling=1,
            ),
            node(
                "laptop",
                "offline",
                reason="Nothing was heard from it for 3 min.",
                last_seen_s=184.0,
                models=[model("gemma3:27b", "hot")],
                in_flight=0,
            ),
            node(
                "pi",
                agent_version=None,
                cpu={"percent": None},
                memory=nothing,
                heat={"state": None, "cpu_c": None},
                backends=[
                    {"kind": None, "version": None, "ready": False, "reason": "nothing answers on 11434"}
                ],
                models=[],
                in_flight=0,
            ),
        ],
        "queues": {"qwen3:8b": {"waiting": 2, "oldest_wait_s": 4.25}},
        "timestamp": WALL_S,
    }
