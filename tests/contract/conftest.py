"""Targets of the contract tests: the fakes, the real llama.cpp server, and a real Ollama if there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from herd_node.backends import small_model
from tests.contract.targets import API_KEY, client, fake_llama, fake_ollama
from tests.fakes.contract import Target


@pytest.fixture(scope="session")
def real_llama_server(small_model_path: Path) -> Iterator[str]:
    """The URL of the server that agents embed: 2 slots of 1,024 tokens, one thread, key `API_KEY`."""
    with _real_server("herd_node.backends.embedded_server", small_model_path) as url:
        yield url


@pytest.fixture(scope="session")
def able_llama_server(small_model_path: Path) -> Iterator[str]:
    """The same with a template by which the small model calls tools and thinks."""
    template = str(Path(__file__).parents[1] / "fakes" / "templates" / "able.jinja")
    with _real_server("tests.fakes.templated_server", small_model_path, template=template) as url:
        yield url


@contextmanager
def _real_server(module: str, model: Path, **more: str) -> Iterator[str]:
    config = {
        "model": str(model),
        "alias": small_model.MODEL_NAME,
        "api_key": API_KEY,
        "threads": 1,
        "slots": 2,
        "context_tokens": 1024,
        "batch_tokens": 512,
    }
    child = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdin is not None
    assert child.stdout is not None
    with child:
        child.stdin.write(json.dumps(config | more).encode() + b"\n")
        child.stdin.flush()
        yield json.loads(child.stdout.readline())["url"]
        child.stdin.close()
        child.wait(10)


@pytest.fixture(params=["fake", pytest.param("real", marks=[pytest.mark.llama, pytest.mark.slow])])
async def llama(request: pytest.FixtureRequest) -> AsyncIterator[Target]:
    if request.param == "real":
        async with client(request.getfixturevalue("real_llama_server")) as http:
            yield Target(http, small_model.MODEL_NAME, small_model.MODEL_NAME)
        return
    async with fake_llama() as fake, client(fake.url) as http:
        yield Target(http, "smollm2:135m", "smollm2:135m")


@pytest.fixture(params=["fake", pytest.param("real", marks=pytest.mark.slow)])
async def ollama(request: pytest.FixtureRequest) -> AsyncIterator[Target]:
    if request.param == "real":
        host = os.environ.get("OLLAMA_HOST")
        if not host:
            pytest.skip("OLLAMA_HOST names no real Ollama")
        url = host if "://" in host else f"http://{host}"
        async with client(url) as http:
            yield await _real_ollama(http)
        return
    async with fake_ollama() as fake, client(fake.url) as http:
        yield Target(http, "smollm2:135m", "smol-embed:latest")


async def _real_ollama(http: httpx.AsyncClient) -> Target:
    listed = (await http.get("/api/tags")).json()["models"]
    able = {
        word: [model["name"] for model in listed if word in model["capabilities"]]
        for word in ("completion", "embedding")
    }
    if not able["completion"]:
        pytest.skip("the real Ollama has no model that completes")
    return Target(http, able["completion"][0], next(iter(able["embedding"]), None))
