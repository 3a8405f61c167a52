"""A llama-server in router mode: what is polled, what is remembered, how models are loaded and unloaded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from herd_node.backends.base import LoadFailed
from herd_node.backends.detect import Watched
from herd_node.backends.llama_router import LlamaRouter
from herd_node.models.downloads import Downloads
from herd_node.models.folder import ModelsFolder
from herd_node.models.outward import Outward
from herd_node.runtime.clock import ManualClock, SystemClock
from herd_node.runtime.tasks import Tasks
from herd_node.settings import Proxy
from tests.backends.replaying import Answer, Asked, Replaying, means
from tests.fakes.llama_router import FakeLlamaRouter


@asynccontextmanager
async def serving(fake: FakeLlamaRouter) -> AsyncIterator[Replaying]:
    async def answer(asked: Asked) -> Answer:
        return Answer(*fake.answer(asked.method, asked.path, asked.body))

    server = Replaying({}, answer)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


@asynccontextmanager
async def polled(
    fake: FakeLlamaRouter, folder: Path | None = None, *, named: bool = False, clock: object = None
) -> AsyncIterator[LlamaRouter]:
    tasks = Tasks("downloads")
    downloads = None
    if folder is not None:
        outward = Outward(Proxy(), agent="test")
        downloads = Downloads(ModelsFolder(folder, named=named), outward, tasks, SystemClock(), hub="")
    more = {"clock": clock or SystemClock(), "downloads": downloads}
    async with serving(fake) as server, means(**more) as given:
        backend = LlamaRouter(server.origin, given)
        await backend.poll(0.0)
        yield backend
    await tasks.close()


def states(backend: LlamaRouter) -> dict[str, str]:
    return {model.name: model.state for model in backend.reading.models}


async def test_it_is_found_and_lists_its_models_cold_without_loading_any() -> None:
    fake = FakeLlamaRouter()
    async with serving(fake) as server, means() as given:
        backend = Watched(server.url, given)
        reading = await backend.poll(0.0)
    assert (reading.kind, reading.ready, reading.version) == ("llama-router", True, "b1-7e4c0a9")
    assert reading.max_loaded == 1
    assert [(model.name, model.state) for model in reading.models] == [
        ("alpha-f16", "cold"),
        ("beta-f16", "cold"),
        ("broken", "cold"),
    ]
    alpha = reading.models[0]
    assert (alpha.context_tokens, alpha.slots, alpha.context_fixed) == (1024, 1, True)
    assert not any("/opt" in str(model) for model in reading.models), "paths are for this agent alone"
    assert {asked for asked in fake.asked if asked.startswith("POST")} == set()


async def test_a_load_is_waited_for_and_what_the_model_tells_then_is_remembered() -> None:
    fake = FakeLlamaRouter()
    async with polled(fake) as backend:
        await backend.ensure_loaded("alpha-f16", {"num_ctx": 4096})
        assert states(backend)["alpha-f16"] == "hot"
        model = backend.model("alpha-f16")
        assert model is not None
        assert (model.size_bytes, model.context_train_tokens, model.slots) == (269100288, 8192, 1)
        assert model.capabilities == ("completion",)
        facts = backend.facts("alpha-f16")
        assert facts is not None
        assert (facts.upstream_id, facts.supports_tools) == ("alpha-f16", False)
        await backend.unload("alpha-f16")
        assert states(backend)["alpha-f16"] == "cold"
        again = backend.model("alpha-f16")
        assert again is not None
        assert again.capabilities == ("completion",)


async def test_two_who_want_the_same_model_cause_one_load() -> None:
    fake = FakeLlamaRouter()
    async with polled(fake) as backend:
        await asyncio.gather(*(backend.ensure_loaded("alpha-f16", {}) for _ in range(3)))
    assert fake.asked.count("POST /models/load") == 1


async def test_whoever_leaves_does_not_end_the_load() -> None:
    fake = FakeLlamaRouter(looks=3)
    clock = ManualClock()
    async with polled(fake, clock=clock) as backend:
        waiting = asyncio.ensure_future(backend.ensure_loaded("alpha-f16", {}))
        await clock.until_sleeping()
        waiting.cancel()
        await asyncio.wait([waiting])
        again = asyncio.ensure_future(backend.ensure_loaded("alpha-f16", {}))
        while not again.done():
            clock.advance(0.25)
            await asyncio.sleep(0.001)
        again.result()
    assert fake.asked.count("POST /models/load") == 1


async def test_a_load_that_fails_says_so() -> None:
    async with polled(FakeLlamaRouter()) as backend:
        with pytest.raises(LoadFailed, match=r"model 'broken' failed to load \(exit code 1\)"):
            await backend.ensure_loaded("broken", {})
        assert states(backend)["broken"] == "cold"
        with pytest.raises(LoadFailed) as unknown:
            await backend.ensure_loaded("nope", {})
        assert unknown.value.status == 404


async def test_what_somebody_else_loads_already_is_waited_for() -> None:
    fake = FakeLlamaRouter()
    async with polled(fake) as backend:
        fake.answer("POST", "/models/load", {"model": "beta-f16"})
        await backend.ensure_loaded("beta-f16", {})
        assert states(backend)["beta-f16"] == "hot"


async def test_a_sleeping_model_needs_no_load_the_request_wakes_it() -> None:
    fake = FakeLlamaRouter()
    async with polled(fake) as backend:
        await backend.ensure_loaded("alpha-f16", {})
        fake.entries["alpha-f16"]["status"]["value"] = "sleeping"
        await backend.poll(1.0)
        assert states(backend)["alpha-f16"] == "warm"
        await backend.ensure_loaded("alpha-f16", {})
    assert fake.asked.count("POST /models/load") == 1


async def test_unloading_what_is_not_loaded_is_done_at_once() -> None:
    async with polled(FakeLlamaRouter()) as backend:
        await backend.unload("alpha-f16")
        with pytest.raises(LoadFailed) as unknown:
            await backend.unload("nope")
        assert unknown.value.status == 404


async def test_it_manages_files_only_where_it_serves_the_agents_folder(tmp_path: Path) -> None:
    ours = tmp_path / "models"
    ours.mkdir()
    (ours / "one.gguf").write_bytes(b"GGUF one")
    async with polled(FakeLlamaRouter(), ours) as elsewhere:
        assert elsewhere.manager.offers == {"load", "unload"}
        assert elsewhere.manager.free_bytes is None
    async with polled(FakeLlamaRouter(ours), ours) as here:
        assert here.manager.offers == {"pull-gguf", "delete", "load", "unload"}
        assert (here.manager.free_bytes or 0) > 0
        assert here.reading.models[0].size_bytes == 8


async def test_a_folder_without_models_is_believed_to_be_its_own_only_if_the_user_named_it(
    tmp_path: Path,
) -> None:
    async with polled(FakeLlamaRouter(tmp_path), tmp_path) as guessed:
        assert "pull-gguf" not in guessed.manager.offers
    async with polled(FakeLlamaRouter(tmp_path), tmp_path, named=True) as named:
        assert "pull-gguf" in named.manager.offers


async def test_when_the_folder_changed_the_server_is_told_to_look_at_it_again(tmp_path: Path) -> None:
    (tmp_path / "one.gguf").write_bytes(b"GGUF one")
    fake = FakeLlamaRouter(tmp_path)
    async with polled(fake, tmp_path) as backend:
        (tmp_path / "two.gguf").write_bytes(b"GGUF two")
        (tmp_path / "two.gguf.json").write_text('{"asked_as": "hf.co/org/two:Q4_K_M", "sha256": "ab"}')
        await backend.poll(1.0)
        assert set(states(backend)) == {"one"}
        backend.folder_changed()
        await backend.poll(2.0)
        await backend.poll(3.0)
        assert set(states(backend)) == {"one", "two"}
        assert fake.asked.count("GET /models?reload=1") == 1
        named = backend.model("hf.co/org/two:q4_k_m")
        assert named is not None
        assert (named.name, backend.upstream_model("hf.co/org/two:q4_k_m")) == ("two", "two")
