"""The servers that the contract tests talk to, and how."""

from __future__ import annotations

import httpx

from tests.fakes.backend import FakeBackend
from tests.fakes.model import FakeModel

API_KEY = "contract-key"


def client(url: str) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {API_KEY}"}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=60, trust_env=False)


def fake_llama() -> FakeBackend:
    model = FakeModel("smollm2:135m", context_tokens=1024, loaded=True)
    return FakeBackend(kind="llama-server", models=[model], slots=2, api_key=API_KEY)


def fake_ollama() -> FakeBackend:
    models = [FakeModel("smollm2:135m"), FakeModel("smol-embed:latest", capabilities=("embedding",))]
    return FakeBackend(kind="ollama", models=models)
