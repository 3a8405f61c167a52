"""What listens at a URL: the order of the questions, and everything that must not be taken for an answer."""

from __future__ import annotations

import pytest

from herd_node.backends.base import backend_id, base_url, origin_of
from herd_node.backends.detect import Watched, detect, look
from herd_node.net.pool import Origin
from tests.backends.replaying import NOT_FOUND, Answer, Replaying, made, means, recorded, replaying

OLLAMA = {
    "/api/version": recorded("ollama/version"),
    "/api/tags": recorded("ollama/tags-empty"),
    "/api/ps": recorded("ollama/ps-empty"),
    "/": recorded("ollama/root"),
}
LLAMA = {
    "/api/version": NOT_FOUND,
    "/health": recorded("llamacpp/health-ok"),
    "/props": recorded("llamacpp/props"),
    "/v1/models": recorded("llamacpp/models"),
    "/v1/embeddings": recorded("llamacpp/embeddings-not-enabled"),
}
LOADING = recorded("llamacpp/props-loading")
ALL_LOADING = {path: LOADING for path in (*LLAMA, *OLLAMA)}
ROUTER = {
    "/props": recorded("llamacpp/router-props-nomodel"),
    "/v1/models": recorded("llamacpp/router-v1-models-unloaded"),
}
VLLM = {"/v1/models": made({"object": "list", "data": [{"id": "Qwen/Qwen3-8B", "max_model_len": 40960}]})}


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        pytest.param(OLLAMA, "ollama", id="ollama"),
        pytest.param(LLAMA, "llama-server", id="llama-server"),
        pytest.param(ROUTER, "llama-router", id="router mode"),
        pytest.param(VLLM, "openai", id="vllm"),
        pytest.param({**OLLAMA, **VLLM}, "ollama", id="ollama goes before its own /v1/models"),
        pytest.param({**LLAMA, **VLLM}, "llama-server", id="llama-server goes before its own /v1/models"),
        pytest.param({"/": recorded("ollama/root")}, None, id="the text of / is no evidence"),
        pytest.param(
            {**OLLAMA, "/api/version": made({"version": 1})}, None, id="a version that is no string"
        ),
        pytest.param({**OLLAMA, "/api/tags": made({"models": {}})}, None, id="tags without a list"),
        pytest.param({"/v1/models": made({"data": {}})}, None, id="models without a list"),
        pytest.param({"/v1/models": Answer(200, b"<html>")}, None, id="a web page"),
        pytest.param({"/v1/models": made([1, 2])}, None, id="a list"),
        pytest.param({"/v1/models": made({"data": []}, 401)}, None, id="not with a 401"),
        pytest.param(ALL_LOADING, None, id="a llama-server that loads"),
        pytest.param({**OLLAMA, **VLLM, "/api/version": LOADING}, None, id="a 503 leaves it open"),
        pytest.param({**VLLM, "/props": LOADING}, None, id="a 503 on the way leaves it open"),
    ],
)
async def test_the_first_answer_that_fits_names_the_kind(answers, kind) -> None:
    async with replaying(answers) as server, means() as given:
        assert await detect(server.url, given.http) == kind


async def test_a_silent_port_is_named_in_the_reason() -> None:
    async with means() as given:
        found = await look("http://127.0.0.1:1", given.http)
    assert found.kind is None
    assert found.reason == "nothing answers at http://127.0.0.1:1"


async def test_a_redirect_is_not_followed() -> None:
    async with replaying(OLLAMA) as ollama, means() as given:

        async def elsewhere(asked):
            return Answer(307, b"")

        async with replaying({"/api/version": elsewhere}) as server:
            assert await detect(server.url, given.http) is None
        assert ollama.asked == []


async def test_a_llama_server_is_found_when_it_has_loaded() -> None:
    async with replaying(ALL_LOADING) as server, means() as given:
        backend = Watched(server.url, given)
        first = await backend.poll(0.0)
        assert (first.kind, first.ready) == (None, False)
        assert first.reason == f"{server.url} is not ready yet (503: Loading model)"
        assert backend.model("smollm2:135m") is None

        server.answers = dict(LLAMA)
        second = await backend.poll(5.0)
        assert (second.kind, second.ready) == ("llama-server", True)
        assert backend.native == {"openai"}
        assert backend.upstream_model("smollm2:135m") == "smollm2:135m"


async def test_after_a_503_it_is_asked_anew_what_it_is() -> None:
    async with replaying(LLAMA) as server, means() as given:
        backend = Watched(server.url, given)
        assert (await backend.poll(0.0)).kind == "llama-server"
        server.answers = dict(ALL_LOADING)
        loading = await backend.poll(5.0)
        assert (loading.kind, loading.ready) == ("llama-server", False)
        assert [(model.name, model.state) for model in loading.models] == [("smollm2:135m", "loading")]
        server.answers = dict(OLLAMA)
        assert (await backend.poll(10.0)).kind == "ollama"
        assert backend.id == f"ollama-{server.origin.port}"
        assert backend.native == {"openai", "ollama"}


async def test_a_backend_that_goes_away_keeps_its_models_and_comes_back() -> None:
    server = Replaying(LLAMA)
    await server.start()
    origin = server.origin
    async with means() as given:
        backend = Watched(server.url, given)
        await backend.poll(0.0)
        await server.stop()
        gone = await backend.poll(5.0)
        assert not gone.ready
        assert gone.reason == f"nothing answers at {base_url(origin)}"
        assert [(model.name, model.state) for model in gone.models] == [("smollm2:135m", "cold")]
        await server.start(origin.port)
        back = await backend.poll(10.0)
        await server.stop()
        assert back.ready
        assert back.models[0].state == "hot"


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://127.0.0.1:11434", Origin("127.0.0.1", 11434)),
        ("http://127.0.0.1:11434/", Origin("127.0.0.1", 11434)),
        ("127.0.0.1:8080", Origin("127.0.0.1", 8080)),
        ("http://[::1]:8080", Origin("::1", 8080)),
        ("http://box.local", Origin("box.local", 80)),
    ],
)
def test_a_backend_url_names_host_and_port(url: str, origin: Origin) -> None:
    assert origin_of(url) == origin
    assert origin_of(base_url(origin)) == origin


@pytest.mark.parametrize(
    "url", ["https://a:1", "http://", "http://a:1/v1", "ftp://a", "http://a:99999", "", "http://a:1?x=1"]
)
def test_a_url_that_names_no_backend_is_refused_with_a_sentence(url: str) -> None:
    with pytest.raises(ValueError, match="a backend is given as http://HOST:PORT"):
        origin_of(url)


def test_the_id_is_kind_and_port_and_names_a_host_elsewhere() -> None:
    assert backend_id("ollama", Origin("127.0.0.1", 11434)) == "ollama-11434"
    assert backend_id("openai", Origin("10.0.0.7", 8000)) == "openai-10.0.0.7-8000"
