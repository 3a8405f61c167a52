"""What clients ask before they chat, over a fleet that is known by its beats."""

from __future__ import annotations

import re
from typing import Any

import pytest

from herd_node.protocol import wire
from tests.fleet.build import backend, beat, model
from tests.web.kit import Lonely

pytestmark = pytest.mark.asyncio(loop_scope="module")

LLAMA = backend("llama-server-8080", "llama-server", version="b1")
MODELS = ("/api/tags", "/api/ps")


async def names(lonely: Lonely, path: str) -> list[str]:
    return [entry["name"] for entry in (await lonely.get(path))["models"]]


async def test_the_story_of_a_fleet_as_its_lists_tell_it(lonely: Lonely):
    """One story, because the registry remembers: empty, filled, hot here and there, offline."""
    await empty(lonely)
    fill(lonely)
    await merged(lonely)
    await loaded(lonely)
    await in_openai_words(lonely)
    await versions(lonely)
    await offline(lonely)


async def empty(lonely: Lonely) -> None:
    for path in MODELS:
        assert await lonely.get(path) == {"models": []}
    assert await lonely.get("/v1/models") == {"object": "list", "data": []}
    assert await lonely.get("/api/version") == {"version": "0.99.0"}
    answer = await lonely.request("/v1/models/any/thing", method="GET")
    assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert answer.headers["x-should-retry"] == "false"
    for path in ("/", "/api/version", "/api/tags", "/healthz", "/readyz"):
        head = await lonely.request(path, method="HEAD")
        assert (head.status, head.body) == (200, b"")
    root = await lonely.request("/", method="GET")
    assert (root.body, root.headers["content-type"]) == (b"Ollama is running", "text/plain; charset=utf-8")


def fill(lonely: Lonely) -> None:
    old = backend(version="0.12.3-rc1")
    lonely.believe(
        beat(
            "b",
            model("Llama3:8B", "cold", digest="b" * 64, size_bytes=1, modified_s=86400.0, family="llama"),
            model(
                "hf.co/org/model-GGUF:Q4",
                "hot",
                weights="w2",
                parameters=134_515_008,
                quantisation="Q4_1",
                context_tokens=2048,
                context_train_tokens=8192,
                embedding_length=576,
                expires_in_s=60.0,
            ),
            backends=(old,),
            boot="1" * 16,
        ),
        beat(
            "a",
            model("llama3:8b", "cold", digest="a" * 64, size_bytes=2),
            model("smollm2:135m", "hot", weights="w3", aliases=("small",), backend=LLAMA.id, digest=None),
            backends=(backend(version="0.13.0"), LLAMA),
            boot="2" * 16,
        ),
        beat(
            "c",
            model("llama3:8b", "hot", digest="c" * 64, size_bytes=3),
            backends=(backend(version="0.9.10"),),
            boot="3" * 16,
        ),
    )


async def merged(lonely: Lonely) -> None:
    entries = {entry["name"]: entry for entry in (await lonely.get("/api/tags"))["models"]}
    assert list(entries) == ["Llama3:8B", "hf.co/org/model-GGUF:Q4", "small", "smollm2:135m"]
    llama = entries["Llama3:8B"]
    # shown as the first spelling; size and digest of the node that has it hot
    assert (llama["nodes"], llama["size"], llama["digest"]) == (["a", "b", "c"], 3, "c" * 64)
    assert llama["model"] == llama["name"]
    org = entries["hf.co/org/model-GGUF:Q4"]
    assert org["details"] == {
        "parent_model": "",
        "format": "gguf",
        "family": "",
        "families": None,
        "parameter_size": "134.52M",
        "quantization_level": "Q4_1",
        "context_length": 8192,
        "embedding_length": 576,
    }
    assert org["capabilities"] == ["completion"]
    small, alias = entries["smollm2:135m"], entries["small"]
    assert small["nodes"] == alias["nodes"] == ["a"]
    for entry in entries.values():
        assert re.fullmatch("[0-9a-f]{64}", entry["digest"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", entry["modified_at"])
    assert len({small["digest"], alias["digest"], llama["digest"], org["digest"]}) >= 3
    again = {entry["name"]: entry["digest"] for entry in (await lonely.get("/api/tags"))["models"]}
    assert again == {name: entry["digest"] for name, entry in entries.items()}


async def loaded(lonely: Lonely) -> None:
    entries = {entry["name"]: entry for entry in (await lonely.get("/api/ps"))["models"]}
    assert list(entries) == ["Llama3:8B", "hf.co/org/model-GGUF:Q4", "small", "smollm2:135m"]
    assert entries["Llama3:8B"]["nodes"] == ["c"]
    assert entries["hf.co/org/model-GGUF:Q4"]["context_length"] == 2048
    assert entries["smollm2:135m"]["expires_at"] > "2200"
    for entry in entries.values():
        assert {"name", "model", "size", "digest", "details", "expires_at", "size_vram"} <= entry.keys()


async def in_openai_words(lonely: Lonely) -> None:
    listed = await lonely.get("/v1/models")
    assert [entry["id"] for entry in listed["data"]] == await names(lonely, "/api/tags")
    for entry in listed["data"]:
        assert (entry["object"], isinstance(entry["created"], int)) == ("model", True)
    asked = {
        "Llama3:8B": ["a", "b", "c"],
        "llama3:8b": ["a", "b", "c"],
        "library/LLAMA3:8b": ["a", "b", "c"],
        "registry.ollama.ai/library/llama3:8b": ["a", "b", "c"],
        "hf.co/org/model-GGUF:Q4": ["b"],
        "hf.co%2Forg%2Fmodel-GGUF%3AQ4": ["b"],
        "small": ["a"],
        "small:latest": ["a"],
    }
    for name, nodes in asked.items():
        entry = await lonely.get(f"/v1/models/{name}")
        assert (entry["object"], entry["nodes"]) == ("model", nodes), name
    for name in ("nowhere", "hf.co/org", "llama3", "", "%00", "x" * 5000):
        answer = await lonely.request(f"/v1/models/{name}", method="GET")
        assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found"), name


async def versions(lonely: Lonely) -> None:
    """The lowest as a number, not as a text; llama-servers have none."""
    assert await lonely.get("/api/version") == {"version": "0.9.10"}


async def offline(lonely: Lonely) -> None:
    registry, now_s = lonely.router.registry, lonely.router.clock.now_s()
    registry.on_connect_failed("c", now_s, "refused")
    assert await lonely.get("/api/version") == {"version": "0.12.3-rc1"}
    entries: dict[str, Any] = {entry["name"]: entry for entry in (await lonely.get("/api/tags"))["models"]}
    llama = entries["Llama3:8B"]
    assert (llama["nodes"], llama["size"], llama["digest"]) == (["a", "b"], 2, "a" * 64)
    assert "Llama3:8B" not in await names(lonely, "/api/ps")
    registry.on_connect_failed("a", now_s, "refused")
    registry.on_connect_failed("b", now_s, "refused")
    assert (await names(lonely, "/api/tags"), await names(lonely, "/api/ps")) == ([], [])
    assert (await lonely.get("/v1/models"))["data"] == []
    ready = await lonely.request("/readyz", method="GET")
    assert (ready.status, ready.json()["nodes_online"]) == (200, 0)


async def test_the_state_of_the_fleet_has_the_fields_of_the_contract(lonely: Lonely):
    lonely.believe(beat("a", model(), boot="9" * 16, memory=wire.Memory(total_bytes=5)))
    status = await lonely.status()
    fleet = {"nodes_total", "nodes_online", "models_loaded", "requests_active", "requests_waiting"}
    assert set(status) >= {"fleet", "nodes", "queues", "timestamp"}
    assert set(status["fleet"]) == fleet
    node = next(node for node in status["nodes"] if node["node_id"] == "a")
    assert set(node) >= {
        *("node_id", "status", "reason", "agent_version", "last_seen_s", "hardware", "cpu", "memory", "disk"),
        *("heat", "gpus", "backends", "models", "in_flight", "waiting", "settling", "reported"),
    }
    assert set(node["backends"][0]) >= {"kind", "version", "ready", "reason"}
    assert set(node["models"][0]) >= {"name", "state", "size_bytes", "context", "slots", "in_flight"}
    assert set(node["reported"]) == {"in_flight_by_agent", "slots_taken"}
    assert node["memory"]["total_bytes"] == 5
    assert (node["status"], status["fleet"]["nodes_online"]) == ("online", 1)
