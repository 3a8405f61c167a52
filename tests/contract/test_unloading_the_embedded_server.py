"""An Ollama caller loads and unloads the model of a node with --embedded: a real child comes and goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from herd_node.backends import small_model
from herd_node.backends.embedded import EmbeddedConfig, EmbeddedServer
from tests.agent.agent_kit import House

pytestmark = [pytest.mark.llama, pytest.mark.slow]

NAME = small_model.MODEL_NAME
ASK = {"model": NAME, "prompt": "The sky is", "raw": True, "stream": False, "options": {"num_predict": 2}}


async def until(server: EmbeddedServer, condition: Callable[[], bool]) -> None:
    """As the agent does: it asks its backend now and then."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.05)
            await server.poll(0.0)


async def test_it_is_unloaded_by_keep_alive_and_loaded_again_by_the_next_request(
    small_model_path: Path, tmp_path: Path
) -> None:
    house = House()
    house.start()
    log_file = tmp_path / "log"
    config = EmbeddedConfig(
        model_file=small_model_path, log_file=log_file, threads=1, slots=1, context_tokens=512
    )
    server = EmbeddedServer(config, house.means)
    server.start()
    house.backends.append(server)
    try:
        await until(server, lambda: server.reading.ready)
        assert "unload" in server.manager.offers
        # 1. an empty request with keep_alive 0 unloads
        said = await house.call("/api/generate", {"model": NAME, "keep_alive": 0})
        assert (said.status, json.loads(said.body)["done_reason"]) == (200, "unload")
        await until(server, lambda: server.reading.models[0].state != "hot")
        # 2. the next request loads it, and says how long that took
        answer = await house.call("/api/generate", ASK)
        assert answer.status == 200, answer.body
        assert json.loads(answer.body)["load_duration"] > 0
        # 3. loaded, an empty request is answered at once
        said = await house.call("/api/chat", {"model": NAME})
        assert json.loads(said.body)["done_reason"] == "load"
        # 4. keep_alive 0 with a prompt: the answer first, then the model goes
        answer = await house.call("/api/generate", ASK | {"keep_alive": 0})
        assert (answer.status, json.loads(answer.body)["done"]) == (200, True)
        await until(server, lambda: server.reading.models[0].state != "hot")
    finally:
        await house.close()
        await server.stop()
