"""The servers that the contract tests talk to, and how."""

from __future__ import annotations

import httpx

from tests.fakes.backend import FakeBackend
from tests.fakes.model import FakeModel

API_KEY = "contract-key"


def client(url: str) -> httpx.AsyncClient:
    """No connection is used twice: llama-server closes it after a stream, although it announces otherwise."""
    return httpx.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {API_KEY}"},
        limits=httpx.Limits(max_keepalive_connections=0),
        timeout=60,
        trust_env=False,
    )


def fake_llama() -> FakeBackend:
    model = FakeModel("smollm2:135m", context_tokens=1024, loaded=True)
    return FakeBackend(kind="llama-server", models=[model], slots=2, api_key=API_KEY)


def fake_ollama() -> FakeBackend:
    models = [FakeModel("smollm2:135m"), FakeModel("smol-embed:latest", capabilities=("embedding",))]
    return FakeBackend(kind="ollama", models=models)
