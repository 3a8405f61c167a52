"""The whole agent in this process: it comes up alone, finds what appears, tells changes, drains."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from herd_node.agent import Agent, Start
from herd_node.membership import Membership
from herd_node.net.server import bind
from herd_node.protocol import auth, wire
from herd_node.runtime.clock import SystemClock
from herd_node.runtime.paths import DataDir, write_private
from herd_node.settings import Surroundings, load
from tests.agent.agent_kit import SECRET, Line
from tests.agent.tiny_router import TinyRouter
from tests.fakes.backend import FakeBackend
from tests.fakes.faults import Fault
from tests.fakes.model import FakeModel

pytestmark = pytest.mark.slow


class RunningAgent:
    """`async with` it: everything it started has ended behind the block."""

    def __init__(self, folder: Path, router: TinyRouter, backends: list[str], **flags: object) -> None:
        data_dir = DataDir(folder)
        data_dir.ensure()
        data_dir.node("n").ensure()
        write_private(data_dir.join_file, SECRET)
        settings, _ = load(
            {"id": "n", "data_dir": folder, "router_url": router.url, "backend": tuple(backends), **flags}, {}
        )
        sockets = bind("127.0.0.1", 0)
        self.port = int(sockets[0].getsockname()[1])
        self.router = router
        self.agent = Agent(
            Start(
                settings=settings,
                surroundings=Surroundings(None, None, None),
                data_dir=data_dir,
                membership=Membership(data_dir, "n", None),
                sockets=sockets,
                clock=SystemClock(),
                owner_of=lambda _origin: None,  # a fake Ollama has no runners as children
            )
        )

    async def __aenter__(self) -> RunningAgent:
        self.serving = asyncio.get_running_loop().create_task(self.agent.serve())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.agent._server.force()
        await self.serving
        await self.agent.close()

    async def until_beat(
        self, fits: Callable[[wire.Heartbeat], bool], timeout_s: float = 5
    ) -> wire.Heartbeat:
        """The first beat from now on, or the last so far, that fits."""
        router = self.router
        start = max(0, len(router.beats) - 1)
        async with asyncio.timeout(5), router.arrived:
            await router.arrived.wait_for(lambda: any(map(fits, router.beats[start:])))
        return next(beat for beat in router.beats[start:] if fits(beat))

    async def call(self, path: str, body: bytes) -> Line:
        """A call signed as the router signs it."""
        header = self.router.headers[-1]
        line = await Line.open(self.port)
        signature = auth.sign(
            auth.node_key(SECRET, header.key_id),
            direction="call",
            method="POST",
            target=path,
            key_id=header.key_id,
            sender_boot=self.router.boot,
            receiver_boot=header.sender_boot,
            seq=len(self.router.headers) + 1000 * (1 + id(line) % 8),
            body_sha256=auth.body_hash(body),
        )
        line.send("POST", path, {"X-Herd-Auth": signature}, body)
        return line


@pytest.fixture
async def router() -> AsyncIterator[TinyRouter]:
    router = TinyRouter()
    await router.server.start()
    yield router
    await router.server.close()


def ready(beat: wire.Heartbeat) -> bool:
    return any(backend.ready for backend in beat.backends)


CHAT = b'{"model":"smollm2:135m","messages":[{"role":"user","content":"hi"}],"stream":true}'


async def test_its_beats_describe_backend_models_and_machine(tmp_path: Path, router: TinyRouter) -> None:
    async with (
        FakeBackend(kind="llama-server", slots=2) as fake,
        RunningAgent(tmp_path, router, [fake.url]) as running,
    ):
        beat = await running.until_beat(ready)
    assert beat.backends[0].kind == "llama-server"
    assert [(model.name, model.state, model.slots) for model in beat.models] == [("smollm2:135m", "hot", 2)]
    assert "127.0.0.1" in beat.gateway.addresses
    assert beat.gateway.port == running.port
    assert beat.memory.total_bytes
    assert beat.hardware.cores_logical


async def test_it_comes_up_without_a_backend_and_finds_it_when_it_appears(
    tmp_path: Path, router: TinyRouter
) -> None:
    async with FakeBackend(kind="llama-server") as fake:
        await fake.refuse()
        async with RunningAgent(tmp_path, router, [fake.url], heartbeat_interval=0.5) as running:
            beat = await running.until_beat(lambda beat: True)
            assert not ready(beat)
            assert beat.backends[0].reason
            await fake.listen()
            await running.until_beat(ready)


async def test_a_backend_that_a_call_found_dead_is_told_without_waiting_for_the_interval(
    tmp_path: Path, router: TinyRouter
) -> None:
    async with (
        FakeBackend(kind="llama-server") as fake,
        RunningAgent(tmp_path, router, [fake.url], heartbeat_interval=30) as running,
    ):
        await running.until_beat(ready)
        await fake.refuse()
        fake.cut_all()
        line = await running.call("/v1/chat/completions", CHAT)
        status, headers = await line.head()
        assert (status, headers["x-herd-error"]) == (503, "refused")
        await running.until_beat(lambda beat: not ready(beat))
        await line.close()


async def test_a_load_is_told_when_it_begins_and_when_it_ends(tmp_path: Path, router: TinyRouter) -> None:
    async with (
        FakeBackend(kind="ollama", models=[FakeModel("smollm2:135m")], load_s=0.4) as fake,
        RunningAgent(tmp_path, router, [fake.url], heartbeat_interval=30) as running,
    ):
        await running.until_beat(ready)
        line = await running.call("/api/chat", CHAT)
        await running.until_beat(lambda beat: [model.state for model in beat.models] == ["loading"])
        await running.until_beat(lambda beat: [model.state for model in beat.models] == ["hot"])
        assert (await line.answer()).whole
        await line.close()


async def test_sigterm_drains_what_runs_finishes_and_the_end_is_clean(
    tmp_path: Path, router: TinyRouter
) -> None:
    async with (
        FakeBackend(kind="llama-server", tokens=6, token_delay_s=0.1) as fake,
        RunningAgent(tmp_path, router, [fake.url], heartbeat_interval=30) as running,
    ):
        await running.until_beat(ready)
        line = await running.call("/v1/chat/completions", CHAT)
        await line.head()
        os.kill(os.getpid(), signal.SIGTERM)
        beat = await running.until_beat(lambda beat: beat.draining)
        assert beat.in_flight == {"smollm2:135m": 1}
        late = await running.call("/v1/chat/completions", CHAT)
        assert (await late.head())[1]["x-herd-error"] == "busy"
        body = b""
        while piece := await line.chunk():
            body += piece
        assert body.endswith(b"data: [DONE]\n\n")
        await asyncio.wait_for(asyncio.shield(running.serving), 3)
        for one in (line, late):
            await one.close()


async def test_what_does_not_finish_within_the_drain_is_cut(tmp_path: Path, router: TinyRouter) -> None:
    async with (
        FakeBackend(kind="llama-server") as fake,
        RunningAgent(tmp_path, router, [fake.url], drain_timeout_s=0.2) as running,
    ):
        await running.until_beat(ready)
        fake.faults.append(Fault(kind="stall_after_n", after=1))
        line = await running.call("/v1/chat/completions", CHAT)
        await line.head()
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(asyncio.shield(running.serving), 5)
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            while await line.chunk():
                pass
        await line.close()


async def test_a_second_signal_ends_at_once(tmp_path: Path, router: TinyRouter) -> None:
    async with (
        FakeBackend(kind="llama-server") as fake,
        RunningAgent(tmp_path, router, [fake.url]) as running,
    ):
        await running.until_beat(ready)
        fake.faults.append(Fault(kind="stall_after_n", after=1))
        line = await running.call("/v1/chat/completions", CHAT)
        await line.head()
        os.kill(os.getpid(), signal.SIGTERM)
        await running.until_beat(lambda beat: beat.draining)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.wait_for(asyncio.shield(running.serving), 2)
        await line.close()
