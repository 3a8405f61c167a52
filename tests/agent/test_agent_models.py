"""The whole agent manages models: what its beats say of it, and a model that comes, answers and goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd_node.protocol import wire
from tests.agent.agent_kit import Answer, Line
from tests.agent.test_agent import RunningAgent, router
from tests.agent.tiny_router import TinyRouter
from tests.fakes.backend import FakeBackend
from tests.fakes.file_host import FileHost

pytestmark = pytest.mark.slow

__all__ = ["router"]  # the fixture


def names(beat: wire.Heartbeat) -> set[str]:
    return {name for model in beat.models for name in (model.name, *model.aliases)}


async def answer(line: Line) -> Answer:
    try:
        return await line.answer()
    finally:
        await line.close()


async def test_a_beat_says_what_each_backend_can_do_with_its_models(
    tmp_path: Path, router: TinyRouter
) -> None:
    async with (
        FakeBackend(kind="ollama") as ollama,
        FakeBackend(kind="llama-server") as llama,
        RunningAgent(tmp_path, router, [ollama.url, llama.url]) as running,
    ):
        beat = await running.until_beat(lambda beat: sum(one.ready for one in beat.backends) == 2)
        assert {backend.kind: backend.manages for backend in beat.backends} == {
            "ollama": ("pull", "push", "create", "copy", "delete", "blobs", "load", "unload"),
            "llama-server": (),
        }
        assert all(backend.disk_free_bytes is None for backend in beat.backends)


async def test_a_model_that_was_pulled_is_in_the_beats_at_once(tmp_path: Path, router: TinyRouter) -> None:
    tiny = "127.0.0.1:5999/library/tiny"
    async with (
        FakeBackend(kind="ollama") as fake,
        RunningAgent(tmp_path, router, [fake.url], heartbeat_interval=60) as running,
    ):
        await running.until_beat(lambda beat: bool(beat.models))
        pulled = await answer(await running.call("/api/pull", json.dumps({"model": tiny}).encode()))
        assert json.loads(pulled.body.splitlines()[-1]) == {"status": "success"}
        await running.until_beat(lambda beat: f"{tiny}:latest" in names(beat))


@pytest.mark.llama
async def test_an_embedded_node_pulls_a_model_answers_with_it_and_gives_the_other_up(
    tmp_path: Path, router: TinyRouter, small_model_path: Path
) -> None:
    body = small_model_path.read_bytes()
    flags = {"embedded": True, "model": small_model_path, "embedded_threads": 1, "heartbeat_interval": 1}
    async with FileHost() as host, RunningAgent(tmp_path, router, ["127.0.0.1:1"], **flags) as running:
        host.put("/twin.gguf", body)
        url = f"{host.url}/twin.gguf"
        beat = await running.until_beat(lambda beat: any(model.state == "hot" for model in beat.models))
        (embedded,) = [backend for backend in beat.backends if backend.id == "embedded"]
        assert embedded.manages == ("pull-gguf", "delete", "load", "unload")
        assert (embedded.disk_free_bytes or 0) > 0
        pulled = await answer(await running.call("/api/pull", json.dumps({"model": url}).encode()))
        assert json.loads(pulled.body.splitlines()[-1]) == {"status": "success"}
        beat = await running.until_beat(lambda beat: url in names(beat))
        assert {model.name: model.state for model in beat.models} == {
            beat.models[0].name: "hot",
            "twin": "cold",
        }
        chat = {"model": url, "messages": [{"role": "user", "content": "Say hello."}], "stream": False}
        chat["options"] = {"num_predict": 4}
        said = await answer(await running.call("/api/chat", json.dumps(chat).encode()))
        assert (said.status, said.json()["model"]) == (200, url)  # type: ignore[index]
        assert said.json()["message"]["content"]  # type: ignore[index]
        beat = await running.until_beat(
            lambda beat: {model.name: model.state for model in beat.models}.get("twin") == "hot"
        )
        assert beat.models[0].state == "cold"
