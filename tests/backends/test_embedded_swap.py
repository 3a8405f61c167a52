"""The embedded server with a folder of models: one is served, another is loaded in its place."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from herd_node.backends.base import LoadFailed
from herd_node.backends.calls import ask
from herd_node.backends.embedded import EmbeddedConfig, EmbeddedServer
from herd_node.models.downloads import Downloads
from herd_node.models.folder import ModelsFolder
from herd_node.models.manager import Refused
from herd_node.models.outward import Outward
from herd_node.runtime.clock import SystemClock
from herd_node.runtime.tasks import Tasks
from herd_node.settings import Proxy
from tests.backends.replaying import means
from tests.backends.test_embedded import chat, children


class Uses:
    """Who runs on which model, as the gateway would say."""

    def __init__(self) -> None:
        self.running: set[str] = set()
        self.free = asyncio.Event()
        self.waited_for: list[str] = []

    async def until_unused(self, backend: str, model: str) -> None:
        assert backend == "embedded"
        self.waited_for.append(model)
        while model in self.running:
            await self.free.wait()


@asynccontextmanager
async def started(
    small_model_path: Path, folder: Path, uses: Uses | None = None
) -> AsyncIterator[EmbeddedServer]:
    """The small model is served; the same bytes lie in the folder as `other`, and a file that is no model."""
    (folder / "other.gguf").symlink_to(small_model_path)
    (folder / "other.gguf.json").write_text('{"asked_as": "hf.co/org/other:Q4_1", "sha256": "ab"}')
    (folder / "broken.gguf").write_bytes(b"GGUF and no more")
    tasks = Tasks("downloads")
    downloads = Downloads(ModelsFolder(folder), Outward(Proxy(), agent="test"), tasks, SystemClock(), hub="")
    config = EmbeddedConfig(
        model_file=small_model_path, log_file=folder / "log", threads=1, slots=1, context_tokens=1024
    )
    async with means(SystemClock(), downloads=downloads) as given:
        given = replace(given, until_unused=(uses or Uses()).until_unused)
        server = EmbeddedServer(config, given)
        server.start()
        try:
            async with asyncio.timeout(30):
                while not (await server.poll(0.0)).ready:
                    await asyncio.sleep(0.05)
            yield server
        finally:
            await server.stop()
    await tasks.close()


def states(server: EmbeddedServer) -> dict[str, str]:
    return {model.name: model.state for model in server.reading.models}


async def says(server: EmbeddedServer, http: object, name: str) -> object:
    model = server.upstream_model(name)
    answer = await ask(
        http, f"{server.url}/v1/chat/completions", headers=server.headers,  # type: ignore[arg-type]
        payload=chat(max_tokens=4, model=model), read_timeout_s=30, whole_timeout_s=30,
    )  # fmt: skip
    return answer.fields["model"]


@pytest.mark.llama
@pytest.mark.slow
class TestSwap:
    async def test_another_model_is_loaded_in_place_of_the_first_and_the_first_again(
        self, small_model_path: Path, tmp_path: Path
    ) -> None:
        async with started(small_model_path, tmp_path) as server, means() as given:
            own = server.config.name
            assert states(server) == {own: "hot", "broken": "cold", "other": "cold"}
            assert server.reading.max_loaded == 1
            assert server.manager.offers == {"pull-gguf", "delete", "load", "unload"}
            await server.ensure_loaded("hf.co/org/other:q4_1", {})
            assert states(server) == {own: "cold", "broken": "cold", "other": "hot"}
            assert await says(server, given.http, "hf.co/org/other:q4_1") == "other"
            assert len(children()) == 1
            facts = server.facts("other")
            assert facts is not None
            assert facts.embedding_length == 576
            await server.ensure_loaded(own, {})
            assert states(server)[own] == "hot"
            assert await says(server, given.http, own) == own

    async def test_it_waits_until_nothing_runs_on_the_model_that_has_to_go(
        self, small_model_path: Path, tmp_path: Path
    ) -> None:
        uses = Uses()
        async with started(small_model_path, tmp_path, uses) as server:
            own = server.config.name
            uses.running.add(own)
            loading = asyncio.ensure_future(server.ensure_loaded("other", {}))
            while not uses.waited_for:
                await asyncio.sleep(0.01)
            assert server.reading.ready
            assert len(children()) == 1
            assert not loading.done()
            behind = asyncio.ensure_future(server.ensure_loaded(own, {}))
            uses.running.clear()
            uses.free.set()
            await loading
            await behind
            assert uses.waited_for == [own, "other"], "in the order in which they came"
            assert states(server)[own] == "hot"

    async def test_a_file_that_cannot_be_loaded_leaves_the_old_model_served(
        self, small_model_path: Path, tmp_path: Path
    ) -> None:
        async with started(small_model_path, tmp_path) as server, means() as given:
            with pytest.raises(LoadFailed, match="model 'broken' cannot be loaded: its server exited before"):
                await server.ensure_loaded("broken", {})
            async with asyncio.timeout(30):
                while not (await server.poll(0.0)).ready:
                    await asyncio.sleep(0.05)
            assert await says(server, given.http, server.config.name) == server.config.name
            with pytest.raises(LoadFailed) as unknown:
                await server.ensure_loaded("nope", {})
            assert unknown.value.status == 404

    async def test_unloaded_it_holds_no_memory_and_the_next_call_loads_it_again(
        self, small_model_path: Path, tmp_path: Path
    ) -> None:
        async with started(small_model_path, tmp_path) as server, means() as given:
            own = server.config.name
            await server.unload("other")
            assert states(server)[own] == "hot", "what is not loaded is unloaded already"
            await server.unload(own)
            assert children() == []
            reading = await server.poll(1.0)
            assert (reading.ready, set(states(server).values())) == (True, {"cold"})
            assert server.model(own) is not None
            await server.ensure_loaded(own, {})
            assert await says(server, given.http, own) == own

    async def test_what_it_was_started_with_stays_and_another_goes_with_its_child(
        self, small_model_path: Path, tmp_path: Path
    ) -> None:
        async with started(small_model_path, tmp_path) as server:
            downloads = server._means.downloads
            assert downloads is not None
            other = downloads.folder.find("other")
            assert other is not None
            await server.ensure_loaded("other", {})
            await server.before_removal(other)
            assert children() == []
            with pytest.raises(Refused, match="is the model that this node was started with"):
                await server.before_removal(other._replace(path=server.config.model_file))


async def test_without_a_folder_it_has_one_model_and_nothing_to_pull_into(tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    shutil.copyfile(__file__, file)
    async with means() as given:
        server = EmbeddedServer(EmbeddedConfig(model_file=file, log_file=tmp_path / "log"), given)
        await server.poll(0.0)
    assert server.manager.offers == {"load", "unload"}
    assert [model.name for model in server.reading.models] == ["mine"]
    assert not server.reading.ready
