"""Managing models through the router: Ollama's own calls, the dashboard's, and the commands."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.fakes.recordings import recording
from tests.router.kit import LLAMA, OLLAMA, Answer, Fleet, until

TINY = "127.0.0.1:5999/library/tiny"
NAMED = f"{TINY}:latest"


def lines(answer: Answer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in answer.body.splitlines() if line]


def events(answer: Answer) -> list[dict[str, Any]]:
    return [json.loads(part.removeprefix(b"data: ")) for part in answer.body.split(b"\n\n") if part]


def names_on(fleet: Fleet, node_id: str) -> set[str]:
    return {model.name for model in fleet.ollama[node_id].dialect.models}


async def listed(fleet: Fleet, name: str) -> list[str]:
    """The nodes that list a model, by the router's word."""
    models = (await fleet.get("/api/tags"))["models"]
    return next((model["nodes"] for model in models if model["name"] == name), [])


@pytest_asyncio.fixture(loop_scope="session")
async def managed(fleet: Fleet) -> AsyncIterator[Fleet]:
    """A fleet whose lists are as before once the test has ended."""
    before = {node_id: list(fake.dialect.models) for node_id, fake in fleet.ollama.items()}
    yield fleet
    for node_id, fake in fleet.ollama.items():
        fake.dialect.models[:] = before[node_id]
        fake.token_delay_s = 0.0


async def test_a_pull_streams_the_nodes_own_lines_and_the_model_is_there_afterwards(managed: Fleet):
    body = {"model": TINY, "insecure": True}
    answer = await managed.request("/api/pull?node=b", body)
    assert (answer.status, answer.headers["x-fleet-node"]) == (200, "b")
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.body == recording("ollama/pull").body
    assert answer.whole
    assert NAMED in names_on(managed, "b")
    async with asyncio.timeout(10):
        while await listed(managed, NAMED) != ["b"]:
            await asyncio.sleep(0.05)
    assert (await managed.status())["pulls"] == []


@pytest.mark.parametrize("model", ["nowhere", "127.0.0.1:5999/library/none", "127.0.0.1:5999/library/bad"])
async def test_a_pull_fails_as_ollama_fails(managed: Fleet, model: str):
    answer = await managed.request("/api/pull", {"model": model, "node_id": "a"})
    assert (answer.status, answer.whole) == (200, True)
    assert "error" in lines(answer)[-1]
    whole = await managed.request("/api/pull", {"model": model, "node_id": "a", "stream": False})
    assert (whole.status, "error" in whole.json()) == (500, True)


async def test_without_a_node_the_one_with_the_most_free_memory_pulls(managed: Fleet):
    answer = await managed.request("/api/pull", {"model": TINY})
    assert (answer.status, answer.headers["x-fleet-node"] in ("a", "b")) == (200, True)
    assert NAMED in names_on(managed, answer.headers["x-fleet-node"])


async def test_a_pull_that_runs_is_shown_and_ends_when_its_caller_leaves(managed: Fleet):
    managed.ollama["a"].token_delay_s = 0.05
    call = await managed.begin("/api/pull", {"model": TINY}, headers={"X-Fleet-Node": "a"})
    await call.head()
    for _ in range(8):
        await call.piece()
    [pull] = (await managed.status())["pulls"]
    assert (pull["node_id"], pull["model"], pull["total_bytes"]) == ("a", TINY, 12582912)
    assert 0 < pull["completed_bytes"] < pull["total_bytes"]
    assert pull["percent"] == 100 * pull["completed_bytes"] // pull["total_bytes"]
    call.hang_up()
    await until(lambda: not list(managed.router.models.pulls), "the router to notice", patience_s=1.0)
    await asyncio.sleep(0.2)
    assert NAMED not in names_on(managed, "a")


async def test_a_delete_without_a_node_is_one_on_every_holder(managed: Fleet):
    answer = await managed.request("/api/delete", {"model": "embed:1"}, method="DELETE")
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["x-fleet-node"] == "a,b"
    assert not any("embed:1" in names_on(managed, node_id) for node_id in ("a", "b"))


async def test_a_delete_with_a_node_touches_that_node_only(managed: Fleet):
    answer = await managed.request("/api/delete", {"name": "embed:1", "node_id": "b"}, method="DELETE")
    assert (answer.status, answer.headers["x-fleet-node"]) == (200, "b")
    assert [("embed:1" in names_on(managed, node_id)) for node_id in ("a", "b")] == [True, False]


async def test_what_nobody_has_cannot_be_deleted(managed: Fleet):
    answer = await managed.request("/api/delete", {"model": "nope"}, method="DELETE")
    assert (answer.status, answer.json()) == (404, recording_json("delete-unknown"))


def recording_json(name: str) -> Any:
    return json.loads(recording(f"ollama/{name}").body)


async def test_a_copy_is_made_where_its_source_lies(managed: Fleet):
    answer = await managed.request("/api/copy", {"source": "only-b:1", "destination": "mine"})
    assert (answer.status, answer.headers["x-fleet-node"], answer.body) == (200, "b", b"")
    assert "mine:latest" in names_on(managed, "b")
    unknown = await managed.request("/api/copy", {"source": "nope", "destination": "mine"})
    assert (unknown.status, unknown.json()) == (404, {"error": 'model "nope" not found'})


async def test_a_create_from_a_model_happens_where_that_lies(managed: Fleet):
    answer = await managed.request("/api/create", {"model": "made", "from": "only-b:1", "system": "be kind"})
    assert (answer.status, answer.headers["x-fleet-node"]) == (200, "b")
    assert lines(answer)[-1] == {"status": "success"}
    assert "made:latest" in names_on(managed, "b")


async def test_blobs_and_what_is_created_of_them_lie_on_one_node(managed: Fleet):
    files = {}
    nodes = set()
    for number in range(3):
        data = f"GGUF{number}".encode() * 700_000  # 3.5 MB: kept in a file on its way
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        files[f"{number}.gguf"] = digest
        head = await managed.request(f"/api/blobs/{digest}", method="HEAD")
        put = await managed.request(f"/api/blobs/{digest}", data)
        again = await managed.request(f"/api/blobs/{digest}", data)
        assert [head.status, put.status, again.status] == [404, 201, 200]
        nodes |= {answer.headers["x-fleet-node"] for answer in (head, put, again)}
    answer = await managed.request("/api/create", {"model": "packed", "files": files})
    assert lines(answer)[-1] == {"status": "success"}
    assert {answer.headers["x-fleet-node"]} == nodes
    assert "packed" in names_on(managed, nodes.pop())


async def test_a_blob_that_is_another_than_its_name_is_refused_by_the_node(managed: Fleet):
    digest = "sha256:" + "0" * 64
    answer = await managed.request(f"/api/blobs/{digest}", b"x")
    assert (answer.status, "digest mismatch" in answer.error) == (400, True)


async def test_a_push_says_what_the_node_says(managed: Fleet):
    answer = await managed.request("/api/push", {"model": OLLAMA})
    assert answer.status == 200
    assert lines(answer)[0] == {"status": "retrieving manifest"}
    assert "error" in lines(answer)[-1]


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/api/pull", b"", 400, "missing request body"),
        ("/api/pull", b"[]", 400, "must be a JSON object"),
        ("/api/pull", {}, 400, "model is required"),
        ("/api/pull", {"model": 3}, 400, "must be a string"),
        ("/api/pull", {"model": "a<b"}, 400, "invalid model name"),
        ("/api/pull", {"model": "m", "node_id": "nobody"}, 404, "not known"),
        ("/api/pull", {"model": "m", "node_id": 7}, 400, "must be a string"),
        ("/api/pull", {"model": "https://example.org/x.gguf"}, 501, "no node that is online can"),
        ("/api/copy", {"destination": "x"}, 400, "model is required"),
        ("/api/push", {"model": LLAMA, "node_id": "a"}, 501, "cannot push"),
        ("/api/create", b"{", 400, "not valid JSON"),
    ],
)
async def test_what_cannot_be_done_is_said_in_a_sentence(
    managed: Fleet, path: str, body: object, status: int, words: str
):
    answer = await managed.request(path, body)
    assert (answer.status, words in answer.error) == (status, True), answer


async def test_a_node_that_goes_in_the_middle_of_a_pull_is_an_error_line(managed: Fleet):
    managed.ollama["a"].token_delay_s = 0.02
    call = await managed.begin("/api/pull", {"model": TINY, "node_id": "a"})
    await call.head()
    for _ in range(3):
        await call.piece()
    managed.ollama["a"].cut_all()
    answer = await call.rest()
    assert (answer.status, answer.whole) == (200, True)
    assert "broke off" in lines(answer)[-1]["error"]
    assert NAMED not in names_on(managed, "a")


# -- the dashboard's calls


async def test_the_inventory_says_what_lies_where(managed: Fleet):
    await managed.request(
        "/v1/chat/completions", {"model": "only-a:1", "messages": [{"role": "user", "content": "x"}]}
    )
    found = await managed.get("/dashboard/api/model-management")
    by_name = {model["model"]: model["nodes"] for model in found["models"]}
    assert [row["node_id"] for row in by_name[OLLAMA]] == ["a", "b"]
    [row] = by_name["only-a:1"]
    assert (row["node_id"], row["loaded"], row["state"], row["backend_kind"]) == ("a", True, "hot", "ollama")
    assert row["size_bytes"] > 0
    assert abs(row["last_used"] - managed.router.clock.wall_s()) < 30
    assert "pull" in found["nodes"][0]["offers"]


async def test_the_dashboards_pull_is_told_as_events(managed: Fleet):
    answer = await managed.request("/dashboard/api/pull", {"model": TINY, "node_id": "b"})
    assert (answer.status, answer.headers["content-type"]) == (200, "text/event-stream")
    assert events(answer)[-1] == {"status": "success"}
    assert events(answer) == [json.loads(line) for line in recording("ollama/pull").body.splitlines()]
    failed = await managed.request("/dashboard/api/pull", {"model": "nowhere", "node_id": "b"})
    assert "error" in events(failed)[-1]


async def test_a_model_is_unloaded_loaded_and_deleted_by_the_dashboard(managed: Fleet):
    def loaded() -> list[bool]:
        fakes = (managed.ollama[node_id] for node_id in ("a", "b"))
        return [model.loaded for fake in fakes for model in fake.dialect.models if model.name == OLLAMA]

    unloaded = await managed.request("/dashboard/api/unload", {"model": OLLAMA})
    assert (unloaded.status, unloaded.json(), loaded()) == (200, {"unloaded": ["a", "b"]}, [False, False])
    one = await managed.request("/dashboard/api/load", {"model": OLLAMA, "node_id": "b"})
    assert (one.status, one.json(), loaded()) == (200, {"loaded": ["b"]}, [False, True])
    gone = await managed.request("/dashboard/api/delete", {"model": OLLAMA, "node_id": "a"})
    assert (gone.status, gone.json()) == (200, {"deleted": ["a"]})
    assert OLLAMA not in names_on(managed, "a")


async def test_a_node_that_cannot_is_named_and_the_others_are_done(managed: Fleet):
    answer = await managed.request("/dashboard/api/delete", {"model": LLAMA})
    assert answer.status == 502
    assert all(word in answer.error for word in ("a: ", "b: ", "cannot delete"))


# -- the commands


async def herd(fleet: Fleet, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "herd",
        *arguments,
        "--host",
        "127.0.0.1",
        "--port",
        str(fleet.router.port),
    ]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=60, check=False
    )


async def test_herd_pull_load_unload_and_rm(managed: Fleet):
    pulled = await herd(managed, "pull", TINY, "--node", "a")
    assert (pulled.returncode, pulled.stdout) == (0, "")
    said = pulled.stderr.splitlines()
    assert said[0] == "pulling manifest"
    assert said[-1] == "success"
    assert any("90 % of 13 MB" in line for line in said)
    for deed, words in (
        ("unload", f"{NAMED} unloaded from a"),
        ("load", f"{NAMED} loaded on a"),
        ("rm", f"{NAMED} deleted from a"),
    ):
        async with asyncio.timeout(10):
            while deed == "unload" and await listed(managed, NAMED) != ["a"]:
                await asyncio.sleep(0.05)
        done = await herd(managed, deed, NAMED)
        assert (done.returncode, done.stdout.strip()) == (0, words), done.stderr
    assert NAMED not in names_on(managed, "a")


async def test_a_command_that_fails_says_why_and_exits_with_1(managed: Fleet):
    pulled = await herd(managed, "pull", "nowhere", "--node", "a")
    assert (pulled.returncode, "The pull failed: pull model manifest" in pulled.stderr) == (1, True)
    gone = await herd(managed, "rm", "nowhere")
    assert (gone.returncode, "model 'nowhere' not found" in gone.stderr) == (1, True)
    unknown = await herd(managed, "load", OLLAMA, "--node", "cellar")
    assert (unknown.returncode, "node 'cellar' is not known" in unknown.stderr) == (1, True)


async def test_commands_print_json_on_demand(managed: Fleet):
    pulled = await herd(managed, "pull", TINY, "--node", "b", "--json")
    assert json.loads(pulled.stdout) == {"model": TINY, "status": "success"}
    done = await herd(managed, "rm", "embed:1", "--json")
    assert json.loads(done.stdout) == {"deleted": ["a", "b"]}
