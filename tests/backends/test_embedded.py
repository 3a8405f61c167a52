"""The embedded server: its pure parts, and a real llama.cpp child with the small real model."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from herd_node.backends import embedded, small_model
from herd_node.backends.calls import ask
from herd_node.backends.embedded import (
    MISSING_ENGINE,
    EmbeddedConfig,
    EmbeddedServer,
    LogFilter,
    batch_tokens,
    half_of_the_cores,
    how_it_ended,
    model_name,
)
from herd_node.runtime.clock import ManualClock
from tests.backends.replaying import means

GIB = 1024**3


@pytest.mark.parametrize(
    ("status", "listened", "sentence"),
    [
        (-4, False, "exited before ready, signal 4 (illegal instruction)"),
        (-9, True, "exited, signal 9 (killed, perhaps for want of memory)"),
        (-11, True, "exited, signal 11 (segmentation fault)"),
        (-29, False, "exited before ready, signal 29 (sigio)"),
        (1, False, "exited before ready, status 1: the last line"),
        (0, True, "exited, status 0"),
        (3, False, MISSING_ENGINE),
        (0xC000001D, False, "exited before ready, status 0xc000001d (illegal instruction)"),
    ],
)
def test_why_a_child_ended_is_a_sentence(status: int, listened: bool, sentence: str) -> None:
    assert how_it_ended(status, listened=listened, last_line="the last line") == sentence


def test_the_small_model_has_its_usual_name_and_any_other_its_stem() -> None:
    assert model_name(Path("/m") / small_model.FILE_NAME) == "smollm2:135m"
    assert model_name(Path("/m/My.Model.Q8_0.gguf")) == "My.Model.Q8_0"


def test_long_embedding_inputs_only_with_memory_to_spare() -> None:
    assert batch_tokens(GIB, 8 * GIB) == 2048
    assert batch_tokens(GIB, 5 * GIB) == 512


def test_at_least_one_thread() -> None:
    assert 1 <= half_of_the_cores() <= max(1, (psutil.cpu_count() or 1) // 2)


async def test_without_the_engine_it_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    clock = ManualClock()
    config = EmbeddedConfig(model_file=tmp_path / "a.gguf", log_file=tmp_path / "log")
    async with means(clock) as given:
        server = EmbeddedServer(config, given)
        server.start()
        await clock.until_sleeping()
        reading = await server.poll(0.0)
        assert reading.reason == f"{MISSING_ENGINE}; next try in 0.5 s"
        assert (reading.ready, [(model.name, model.state) for model in reading.models]) == (
            False,
            [("a", "cold")],
        )
        assert server.upstream_model("a") is None
        await server.stop()


async def until(server: EmbeddedServer, wanted, changed: asyncio.Event) -> None:
    async with asyncio.timeout(30):
        while not wanted(server):
            changed.clear()
            await changed.wait()
            await server.poll(0.0)


class Running:
    """A started server, and an event for its changes."""

    def __init__(self, config: EmbeddedConfig, given) -> None:
        self.changed = asyncio.Event()
        self.server = EmbeddedServer(config, replace(given, on_change=self.changed.set))

    async def __aenter__(self) -> Running:
        self.server.start()
        await self.until(lambda server: server.reading.ready)
        return self

    async def until(self, wanted) -> None:
        await until(self.server, wanted, self.changed)

    async def __aexit__(self, *error: object) -> None:
        await self.server.stop()


def children() -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process().children()
        if "herd_node.backends.embedded_server" in " ".join(child.cmdline())
    ]


def chat(**more: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": "Say hello."}], "temperature": 0, **more}


@pytest.fixture
def config(small_model_path: Path, tmp_path: Path) -> EmbeddedConfig:
    return EmbeddedConfig(model_file=small_model_path, log_file=tmp_path / "engine.log", threads=1)


@pytest.mark.llama
@pytest.mark.slow
class TestRealServer:
    async def test_it_is_a_backend_that_chats_and_embeds(self, config: EmbeddedConfig) -> None:
        config = replace(config, model_file=_named(config.model_file, config.log_file.parent))
        async with means() as given, Running(config, given) as running:
            server = running.server
            model = server.model("smollm2:135m")
            assert model is not None
            assert (model.backend, model.state, model.slots) == ("embedded", "hot", 2)
            assert (model.context_tokens, model.context_fixed) == (4096, True)
            assert set(model.capabilities) == {"completion", "embedding"}
            assert server.upstream_model("smollm2:135m") == "smollm2:135m"
            assert server.origin.host == "127.0.0.1"

            url, http = server.url, given.http
            said = await ask(
                http, f"{url}/v1/chat/completions", headers=server.headers, payload=chat(max_tokens=12),
                read_timeout_s=30, whole_timeout_s=30,
            )  # fmt: skip
            assert said.status == 200
            assert "Hello" in said.fields["choices"][0]["message"]["content"]  # type: ignore[index]
            vectors = await ask(
                http, f"{url}/v1/embeddings", headers=server.headers, payload={"input": ["one", "two"]}
            )
            assert [len(row["embedding"]) for row in vectors.fields["data"]] == [576, 576]  # type: ignore[index]
            assert await server.slots_taken() == 0

    async def test_nobody_without_the_key_may_ask_it(self, config: EmbeddedConfig) -> None:
        async with means() as given, Running(config, given) as running:
            url = running.server.url
            for path, payload in (("/v1/chat/completions", chat()), ("/v1/models", None), ("/slots", None)):
                assert (await ask(given.http, url + path, payload=payload)).status == 401
            allowed = await given.http.get(f"{url}/health", headers={"origin": "https://evil.example"})
            assert allowed.headers["access-control-allow-origin"] == "http://127.0.0.1"

    async def test_a_killed_child_is_started_again_and_the_reason_is_told(
        self, config: EmbeddedConfig
    ) -> None:
        async with means(ManualClock()) as given, Running(config, given) as running:
            server = running.server
            before = server.headers
            children()[0].kill()
            await running.until(lambda server: "signal 9" in (server.reading.reason or ""))
            assert server.reading.reason == (
                "exited, signal 9 (killed, perhaps for want of memory); next try in 0.5 s"
            )
            assert [model.state for model in server.reading.models] == ["cold"]
            assert server.model(server.config.name) is None
            given.clock.advance(0.5)
            await running.until(lambda server: server.reading.ready)
            assert server.headers != before

    async def test_stopping_leaves_nothing_behind(self, config: EmbeddedConfig) -> None:
        async with means() as given:
            async with Running(config, given):
                assert len(children()) == 1
            assert children() == []

    async def test_a_file_that_is_no_model_is_told_and_tried_again_ever_more_rarely(
        self, config: EmbeddedConfig
    ) -> None:
        broken = config.log_file.parent / "broken.gguf"
        broken.write_bytes(b"not a model")
        clock = ManualClock()
        async with means(clock) as given:
            server = EmbeddedServer(replace(config, model_file=broken), given)
            server.start()
            try:
                for delay_s in (0.5, 1.0):
                    await clock.until_sleeping()
                    reason = server.reading.reason or ""
                    assert reason.startswith("exited before ready, status 1: ")
                    assert reason.endswith(f"next try in {delay_s:g} s")
                    clock.advance(delay_s)
            finally:
                await server.stop()


class Child:
    """The child program alone, as a parent that dies would leave it."""

    def __init__(self, config: dict[str, object], log_file: Path) -> None:
        self._config, self._log_file = config, log_file

    async def __aenter__(self) -> asyncio.subprocess.Process:
        with self._log_file.open("wb") as log_file:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "herd_node.backends.embedded_server",
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log_file,
            )  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._config).encode() + b"\n")
        await self._process.stdin.drain()
        return self._process

    async def __aexit__(self, *error: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


@pytest.fixture
def child(small_model_path: Path, tmp_path: Path) -> Child:
    config = {"model": str(small_model_path), "alias": "m", "api_key": "k", "threads": 1, "slots": 1,
              "context_tokens": 1024, "batch_tokens": 512}  # fmt: skip
    return Child(config, tmp_path / "log")


@pytest.mark.llama
@pytest.mark.slow
class TestOrphan:
    async def test_it_ends_within_a_second_in_the_middle_of_an_answer(self, child: Child) -> None:
        async with child as process, means() as given:
            assert process.stdin is not None
            assert process.stdout is not None
            url = json.loads(await process.stdout.readline())["url"]
            payload = chat(max_tokens=900, ignore_eos=True, stream=True)
            request = given.http.build_request(
                "POST", f"{url}/v1/chat/completions", json=payload, headers={"authorization": "Bearer k"}
            )
            answer = await given.http.send(request, stream=True)
            lines = answer.aiter_lines()
            assert (await anext(lines)).startswith("data: ")
            process.stdin.close()
            async with asyncio.timeout(1.0):
                assert await process.wait() == 0
            await answer.aclose()

    @pytest.mark.skipif(sys.platform == "win32", reason="no SIGIO: it ends after the load there")
    async def test_it_ends_at_once_while_the_model_loads(self, child: Child) -> None:
        async with child as process:
            assert process.stdin is not None
            own = psutil.Process(process.pid)
            async with asyncio.timeout(10):
                while not _engine_is_loaded(own):
                    await asyncio.sleep(0)
            process.stdin.close()
            async with asyncio.timeout(1.0):
                assert await process.wait() in (-signal.SIGIO, 0)

    async def test_ctrl_c_in_the_terminal_is_left_to_the_parent(self, child: Child) -> None:
        async with child as process:
            assert process.stdout is not None
            assert await process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.stdin is not None
            process.stdin.close()
            assert await process.wait() == 0


def _engine_is_loaded(process: psutil.Process) -> bool:
    return any("xllamacpp" in mapped.path for mapped in process.memory_maps())


def _named(model_file: Path, folder: Path) -> Path:
    """The same file under the name that the fetched one has."""
    link = folder / small_model.FILE_NAME
    link.symlink_to(model_file)
    return link


class TestLogFilter:
    LINES = (
        b"0.1 W init: something\n"
        b'0.2 W srv operator(): got exception: {"message":"in message: my secret"}\n'
        b"0.3 E ggml: out of memory\n"
    )
    KEPT = (
        b"0.1 W init: something\n"
        b"0.2 W srv operator(): got exception (what it quotes of the request is left out)\n"
        b"0.3 E ggml: out of memory\n"
    )

    def test_what_a_line_quotes_of_a_request_is_left_out(self) -> None:
        assert LogFilter().feed(self.LINES) == self.KEPT

    def test_byte_by_byte_it_is_the_same(self) -> None:
        whole = LogFilter()
        assert b"".join(whole.feed(self.LINES[i : i + 1]) for i in range(len(self.LINES))) == self.KEPT
