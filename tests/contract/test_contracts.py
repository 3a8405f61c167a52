"""The contract of each backend kind, checked on the fake and on the real server alike."""

from __future__ import annotations

import httpx
import pytest

from tests.contract.targets import API_KEY, client, fake_llama, fake_ollama
from tests.fakes import contract, contract_managing
from tests.fakes.contract import Check, Target
from tests.fakes.recordings import recording


def name_of(check: Check) -> str:
    return check.__name__


@pytest.mark.parametrize("check", contract.OLLAMA, ids=name_of)
async def test_ollama_keeps_its_contract(ollama: Target, check: Check) -> None:
    await check(ollama)


@pytest.mark.parametrize("check", contract_managing.MANAGING, ids=name_of)
async def test_ollama_keeps_its_contract_about_managing_models(ollama: Target, check: Check) -> None:
    await check(ollama)


async def test_the_fake_pulls_as_the_real_one_did() -> None:
    async with fake_ollama() as fake, client(fake.url) as http:
        await contract_managing.tiny_is_pulled_with_progress(Target(http, "smollm2:135m", None))


@pytest.mark.parametrize("check", contract.LLAMA, ids=name_of)
async def test_llama_server_keeps_its_contract(llama: Target, check: Check) -> None:
    await check(llama)


async def test_without_the_key_only_health_is_public(llama: Target) -> None:
    async with httpx.AsyncClient(base_url=llama.http.base_url, trust_env=False) as stranger:
        refused = await stranger.post("/v1/chat/completions", json={"messages": contract.MESSAGES})
        assert (refused.status_code, refused.content) == (401, recording("llamacpp/apikey-missing").body)
        assert (await stranger.get("/health")).status_code == 200
        for path in ("/props", "/slots"):
            assert (await stranger.get(path)).status_code == 401


@pytest.mark.parametrize(
    "name", ["models-loading", "props-loading", "health-loading-503", "chat-loading-503"]
)
async def test_a_llama_server_that_loads_says_so_on_every_path(name: str) -> None:
    recorded = recording(f"llamacpp/{name}")
    method, path = recorded.request_head.decode().split()[:2]
    async with fake_llama() as fake, httpx.AsyncClient(base_url=fake.url, trust_env=False) as http:
        await fake.control({"loading": True})
        headers = {"authorization": f"Bearer {API_KEY}"}
        answer = await http.request(method, path, content=recorded.request_body, headers=headers)
        assert (answer.status_code, answer.content) == (503, recorded.body)
        await fake.control({"loading": False})
        assert (await http.get("/health")).status_code == 200
