"""A llama.cpp node with the agent's models folder: pulled, loaded, unloaded, deleted by signed calls."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from herd_node.backends.llama_router import LlamaRouter
from herd_node.models.downloads import Downloads
from herd_node.models.folder import ModelsFolder
from herd_node.models.outward import Outward
from herd_node.settings import Proxy
from tests.agent.agent_kit import House, until
from tests.agent.test_management import begin, call
from tests.backends.replaying import Answer as Replayed
from tests.backends.replaying import Asked, Replaying
from tests.fakes.file_host import FileHost, gguf, sha256
from tests.fakes.llama_router import FakeLlamaRouter

BODY = gguf(600_000)


class Node(NamedTuple):
    house: House
    host: FileHost
    fake: FakeLlamaRouter
    backend: LlamaRouter
    folder: Path


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    house = House()
    fake = FakeLlamaRouter(tmp_path)

    async def answer(asked: Asked) -> Replayed:
        return Replayed(*fake.answer(asked.method, asked.path, asked.body))

    server = Replaying({}, answer)
    await server.start()
    async with FileHost() as host:
        folder = ModelsFolder(tmp_path, named=True)
        outward = Outward(Proxy(), agent="test")
        downloads = Downloads(folder, outward, house.tasks, house.clock, hub=host.url)
        backend = LlamaRouter(server.origin, replace(house.means, downloads=downloads))
        await backend.poll(0.0)
        house.backends.append(backend)
        house.start()
        yield Node(house, host, fake, backend, tmp_path)
        await house.close()
    await server.stop()


async def test_a_model_is_pulled_loaded_by_the_name_it_was_pulled_by_and_deleted(node: Node) -> None:
    node.host.put_repo("org/tiny", {"tiny-Q4_K_M.gguf": BODY})
    pulled = await call(node.house, "POST", "/api/pull", {"model": "hf.co/org/tiny:Q4_K_M"})
    lines = [json.loads(line) for line in pulled.body.splitlines()]
    assert (pulled.status, pulled.headers["content-type"]) == (200, "application/x-ndjson")
    assert (lines[0], lines[-1]) == ({"status": "pulling manifest"}, {"status": "success"})
    assert {line["digest"] for line in lines if "digest" in line} == {f"sha256:{sha256(BODY)}"}
    await node.backend.poll(1.0)
    assert [model.name for model in node.backend.reading.models] == ["tiny-Q4_K_M"]

    loaded = await call(node.house, "POST", "/herd/v1/load", {"model": "hf.co/org/tiny:Q4_K_M"})
    assert (loaded.status, loaded.json()) == (200, {"status": "success"})
    assert node.fake.status("tiny-Q4_K_M") == "loaded"

    deleted = await call(node.house, "DELETE", "/api/delete", {"model": "tiny-q4_k_m"})
    assert (deleted.status, deleted.body) == (200, b"")
    assert node.fake.asked.count("POST /models/unload") == 1, "its child holds the file"
    assert [path.name for path in node.folder.iterdir() if not path.name.startswith(".")] == []
    await node.backend.poll(2.0)
    assert node.backend.reading.models == ()


async def test_unloading_waits_until_it_is_done(node: Node) -> None:
    (node.folder / "tiny.gguf").write_bytes(BODY)
    node.backend.folder_changed()
    await node.backend.poll(1.0)
    await call(node.house, "POST", "/herd/v1/load", {"model": "tiny"})
    answer = await call(node.house, "POST", "/herd/v1/unload", {"model": "tiny"})
    assert (answer.status, node.fake.status("tiny")) == (200, "unloaded")


async def test_without_a_stream_a_failure_has_a_status(node: Node) -> None:
    body = {"model": "hf.co/no/body", "stream": False}
    answer = await call(node.house, "POST", "/api/pull", body)
    assert (answer.status, answer.json()) == (
        500,
        {"error": "pull model: there is no public repository no/body on Hugging Face"},
    )
    node.host.put("/tiny.gguf", BODY)
    body = {"model": f"{node.host.url}/tiny.gguf", "stream": False}
    answer = await call(node.house, "POST", "/api/pull", body)
    assert (answer.status, answer.json()) == (200, {"status": "success"})


async def test_a_caller_who_leaves_ends_a_download_that_is_only_his(node: Node) -> None:
    go_on = asyncio.Event()
    served = node.host.put("/tiny.gguf", BODY, wait=go_on)
    body = {"model": f"{node.host.url}/tiny.gguf"}
    both = [await begin(node.house, "POST", "/api/pull", body) for _ in range(2)]
    for line in both:
        await line.head()
        while b"completed" not in await line.chunk():
            pass
    await both[0].close()
    assert len(node.host.asked) == 1
    assert node.host.left == 0
    await both[1].close()
    await until(lambda: node.host.left == 1)
    served.wait = None
    answer = await call(node.house, "POST", "/api/pull", body | {"stream": False})
    assert answer.status == 200
    assert node.host.ranges("/tiny.gguf")[-1] is not None


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("llama3:8b", 501),
        ("https://host/x.bin", 400),
        ("https://user:pw@host/x.gguf", 400),
        ("hf.co/only-org", 400),
        ("", 501),
    ],
)
async def test_what_a_llama_cpp_node_cannot_pull_is_said_at_once(node: Node, name: str, status: int) -> None:
    answer = await call(node.house, "POST", "/api/pull", {"model": name})
    assert answer.status == status
    assert isinstance(answer.json()["error"], str)  # type: ignore[index]
    assert node.host.asked == []


@pytest.mark.parametrize("path", ["/api/push", "/api/create", "/api/copy"])
async def test_what_only_ollama_can_is_501_with_who_can(node: Node, path: str) -> None:
    (node.folder / "tiny.gguf").write_bytes(BODY)
    node.backend.folder_changed()
    await node.backend.poll(1.0)
    body = {"model": "tiny", "source": "tiny", "destination": "b"}
    answer = await call(node.house, "POST", path, body)
    assert answer.status == 501
    assert answer.json()["error"].endswith("; Ollama nodes can")  # type: ignore[index]


async def test_deleting_what_is_not_there_is_ollamas_404(node: Node) -> None:
    for name in ("nope", "../nope", "/etc/passwd", "..", "tiny.gguf"):
        answer = await call(node.house, "DELETE", "/api/delete", {"model": name})
        assert (answer.status, answer.json()) == (404, {"error": f"model '{name}' not found"})
