"""A caller that leaves frees the slot of a real llama.cpp server at once, stream or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from herd_node.backends import small_model
from herd_node.backends.detect import Watched
from tests.agent.agent_kit import House
from tests.contract.targets import API_KEY, client

pytestmark = [pytest.mark.llama, pytest.mark.slow]

WITHIN_S = 1.0
NAME = small_model.MODEL_NAME
TALK = [{"role": "user", "content": "Count from one to a thousand, one number a line."}]
STORY = [{"role": "user", "content": "Write a very long story about a dragon."}]
LONG = {"max_tokens": 900, "ignore_eos": True}
#: A stop that never comes, since Ollama's dialect cannot forbid the end: the schema cannot be closed early.
NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 500}


@pytest.fixture
async def house(real_llama_server: str) -> AsyncIterator[House]:
    house = House()
    house.start()
    headers = ((b"authorization", f"Bearer {API_KEY}".encode()),)
    backend = Watched(real_llama_server, house.means, headers=headers)
    await backend.poll(house.clock.now_s())
    house.backends.append(backend)
    yield house
    await house.close()


async def busy(http: httpx.AsyncClient) -> bool:
    return any(slot["is_processing"] for slot in (await http.get("/slots")).json())


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": TALK, **LONG}),
        ("/v1/chat/completions", {"messages": TALK, **LONG, "stream": True}),
        ("/v1/completions", {"prompt": "One, two, three,", **LONG}),
        ("/v1/responses", {"input": "Count.", "max_output_tokens": 900, "ignore_eos": True}),
        ("/v1/messages", {"messages": STORY, "max_tokens": 900, "temperature": 0}),
        ("/api/chat", {"messages": TALK, "stream": False, "format": NUMBERS}),
        ("/api/generate", {"prompt": "One, two, three,", "raw": True, "stream": False, "format": NUMBERS}),
    ],
)
async def test_the_slot_is_free_within_a_second(
    house: House, real_llama_server: str, path: str, asked: dict[str, Any]
) -> None:
    async with client(real_llama_server) as http, asyncio.timeout(30):
        line = await house.begin(path, {"model": NAME, **asked})
        while not await busy(http):  # asked more often it grows deaf to hang-ups (docs/backends.md)
            await asyncio.sleep(0.8)
        assert len(house.gateway.calls) == 1
        await line.close()
        left_s = house.clock.now_s()
        while await busy(http):
            await asyncio.sleep(0.1)
        assert house.clock.now_s() - left_s < WITHIN_S
        await house.gateway.calls.until_idle()
