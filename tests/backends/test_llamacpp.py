"""The llama-server backend against recordings of a real one."""

from __future__ import annotations

import orjson
import pytest

from herd_node.backends.llamacpp import (
    PROBE_INTERVAL_S,
    LlamaCpp,
    busy_slots,
    capabilities_of,
    file_stem,
    names_of,
)
from herd_node.backends.openai_compatible import OpenAICompatible
from herd_node.runtime.clock import ManualClock
from tests.backends.replaying import NOT_FOUND, Answer, made, means, recorded, replaying

LOADING = recorded("llamacpp/health-loading-503")
READY = {
    "/health": recorded("llamacpp/health-ok"),
    "/props": recorded("llamacpp/props"),
    "/v1/models": recorded("llamacpp/models"),
    "/v1/embeddings": recorded("llamacpp/embeddings-not-enabled"),
    "/slots": recorded("llamacpp/busy-slots"),
}
ASLEEP = {
    **READY,
    "/health": recorded("llamacpp/sleeping-health"),
    "/props": recorded("llamacpp/sleeping-props"),
    "/v1/models": recorded("llamacpp/sleeping-models"),
}


async def test_a_ready_server_is_one_hot_model() -> None:
    async with replaying(READY) as server, means() as given:
        backend = LlamaCpp(server.origin, given, headers=((b"authorization", b"Bearer k"),))
        reading = await backend.poll(0.0)
        assert all(asked.headers["authorization"] == "Bearer k" for asked in server.asked)
    assert (reading.ready, reading.version, len(reading.models)) == (True, "b1-7e4c0a9", 1)
    model = backend.model("smollm2:135m")
    assert model is not None
    assert (model.state, model.slots, model.context_tokens, model.context_fixed) == ("hot", 2, 1024, True)
    assert (model.size_bytes, model.parameters, model.quantisation) == (269100288, 134515008, "F16")
    assert (model.context_train_tokens, model.capabilities) == (8192, ("completion",))
    assert (model.vram_bytes, model.expires_in_s, model.weights) == (None, None, None)


async def test_the_translator_is_told_the_backends_own_id_and_template() -> None:
    async with replaying(READY) as server, means() as given:
        backend = LlamaCpp(server.origin, given)
        await backend.poll(0.0)
    facts = backend.facts("smollm2:135m")
    assert facts is not None
    assert (facts.upstream_id, facts.embedding_length, facts.created_s) == ("smollm2:135m", 576, 1795302044.0)
    assert (facts.supports_tools, facts.supports_thinking, facts.supports_vision) == (False, False, False)
    assert (facts.chat_template or "").startswith("{% for message in messages %}")
    assert len(facts.digest) == 64
    assert backend.facts("other") is None
    assert backend.upstream_model("other") is None


@pytest.mark.parametrize("still", ["/health", "/props", "/v1/models"])
async def test_a_server_that_loads_is_not_ready_with_its_own_words(still: str) -> None:
    async with replaying({**READY, still: LOADING}) as server, means() as given:
        reading = await LlamaCpp(server.origin, given).poll(0.0)
    assert (reading.ready, reading.detect_again) == (False, True)
    assert (reading.reason or "").endswith("is not ready: Loading model")


async def test_whether_it_embeds_is_probed_once_a_model() -> None:
    answers = {**READY, "/v1/embeddings": recorded("llamacpp/embeddings")}
    async with replaying(answers) as server, means() as given:
        backend = LlamaCpp(server.origin, given)
        await backend.poll(0.0)
        reading = await backend.poll(5.0)
        assert server.paths().count("/v1/embeddings") == 1
        assert reading.models[0].capabilities == ("completion", "embedding")
        server.answers["/v1/models"] = recorded("llamacpp/models-embedding")
        await backend.poll(10.0)
        assert server.paths().count("/v1/embeddings") == 2


async def test_a_server_without_embeddings_is_asked_again_only_after_it_was_gone() -> None:
    async with replaying(READY) as server, means() as given:
        backend = LlamaCpp(server.origin, given)
        await backend.poll(0.0)
        await backend.poll(1000.0)
        assert server.paths().count("/v1/embeddings") == 1
        server.answers["/health"] = LOADING
        await backend.poll(1005.0)
        server.answers["/health"] = READY["/health"]
        server.answers["/v1/embeddings"] = recorded("llamacpp/embeddings")
        await backend.poll(1030.0)
        assert backend.reading.models[0].capabilities == ("completion", "embedding")


async def test_without_an_alias_it_is_called_by_its_files_stem() -> None:
    answers = {
        **READY,
        "/props": recorded("llamacpp/sleeping2-props"),
        "/v1/models": recorded("llamacpp/sleeping2-v1-models"),
    }
    async with replaying(answers) as server, means() as given:
        backend = LlamaCpp(server.origin, given)
        await backend.poll(0.0)
    assert backend.reading.models[0].name == "smol-f16"
    assert backend.upstream_model("smol-f16") == "/opt/models/ggufs/smol-f16.gguf"


async def test_a_probe_that_got_no_answer_is_tried_again_later() -> None:
    answers = {**READY, "/v1/embeddings": LOADING}
    async with replaying(answers) as server, means() as given:
        backend = LlamaCpp(server.origin, given)
        await backend.poll(0.0)
        await backend.poll(1.0)
        assert server.paths().count("/v1/embeddings") == 1
        await backend.poll(PROBE_INTERVAL_S)
        assert server.paths().count("/v1/embeddings") == 2


async def test_a_sleeping_server_is_warm_and_nothing_wakes_it() -> None:
    async with replaying(ASLEEP) as server, means() as given:
        backend = LlamaCpp(server.origin, given)
        await backend.poll(100.0)
        reading = await backend.poll(160.0)
        assert await backend.slots_taken() is None
        assert set(server.paths()) == {"/health", "/props", "/v1/models"}
    assert (reading.ready, reading.models[0].state, reading.models[0].unloaded_s_ago) == (True, "warm", 60.0)
    assert reading.models[0].name == "alias-two"


async def test_busy_slots_are_asked_for_once_a_second_at_most() -> None:
    clock = ManualClock()
    async with replaying(READY) as server, means(clock) as given:
        backend = LlamaCpp(server.origin, given)
        await backend.poll(clock.now_s())
        assert [await backend.slots_taken() for _ in range(3)] == [2, 2, 2]
        assert server.paths().count("/slots") == 1
        clock.advance(1.0)
        server.answers["/slots"] = recorded("llamacpp/slots-idle")
        assert await backend.slots_taken() == 0
        clock.advance(1.0)
        server.answers["/slots"] = recorded("llamacpp/slots-disabled")
        assert await backend.slots_taken() is None


async def test_slots_may_be_set_by_the_user() -> None:
    async with replaying(READY) as server, means(slots=1) as given:
        assert (await LlamaCpp(server.origin, given).poll(0.0)).models[0].slots == 1


async def test_a_server_that_wants_a_key_says_so() -> None:
    answers = {**READY, "/props": recorded("llamacpp/apikey-missing")}
    async with replaying(answers) as server, means() as given:
        reading = await LlamaCpp(server.origin, given).poll(0.0)
    assert not reading.ready
    assert "/props answers 401: Invalid API Key" in (reading.reason or "")


@pytest.mark.parametrize("nonsense", [b"", b"[]", b"null", b'"x"', b"{}", b'{"data": [1]}', b'{"data": {}}'])
async def test_nonsense_is_not_ready_and_no_exception(nonsense: bytes) -> None:
    async with replaying({**READY, "/v1/models": Answer(200, nonsense)}) as server, means() as given:
        reading = await LlamaCpp(server.origin, given).poll(0.0)
    assert (reading.ready, reading.detect_again, reading.models) == (False, True, ())


@pytest.mark.parametrize(
    ("path", "entry", "names"),
    [
        ("/m/a.gguf", {"id": "x", "aliases": ["a", "b"]}, ("a", ("b",))),
        (
            "/m/My Model.Q4.gguf",
            {"id": "/m/My Model.Q4.gguf", "aliases": ["/m/My Model.Q4.gguf"]},
            ("My Model.Q4", ()),
        ),
        ("C:\\m\\a.GGUF", {"id": "C:\\m\\a.GGUF", "aliases": []}, ("a", ())),
        ("m/a.gguf", {"id": "m/a.gguf"}, ("a", ())),
        (None, {"id": "/m/a.gguf"}, ("a", ())),
        ("/m/a.gguf", {"id": "org/repo:Q4", "aliases": ["org/repo:Q4"]}, ("org/repo:Q4", ())),
        (None, {}, ("model", ())),
    ],
)
def test_a_model_is_called_by_its_first_alias_or_its_files_stem(path, entry, names) -> None:
    assert names_of({"model_path": path}, entry) == names


def test_two_aliases_are_name_and_alias() -> None:
    listed = orjson.loads(recorded("llamacpp/models-two-aliases").body)["data"][0]
    assert names_of({}, listed) == ("alias-two", ("smollm2:135m",))


@pytest.mark.parametrize(
    ("path", "stem"), [("/a/b.gguf", "b"), ("b", "b"), ("a\\b.GGUF", "b"), ("/a/b.bin", "b.bin")]
)
def test_the_stem_of_a_file(path: str, stem: str) -> None:
    assert file_stem(path) == stem


@pytest.mark.parametrize(
    ("props", "embeds", "words"),
    [
        ({}, None, ("completion",)),
        ({}, True, ("completion", "embedding")),
        ({"chat_template_caps": {"supports_tools": True}}, False, ("completion", "tools")),
        ({"chat_template": "a<think>b"}, None, ("completion", "thinking")),
        ({"modalities": {"vision": True, "audio": True}}, None, ("audio", "completion", "vision")),
        ({"modalities": [], "chat_template_caps": 7, "chat_template": None}, None, ("completion",)),
    ],
)
def test_capabilities_come_from_template_and_modalities(props, embeds, words) -> None:
    assert capabilities_of(props, embeds=embeds) == words


def test_slots_that_are_no_list_are_unknown() -> None:
    from herd_node.backends import calls

    assert busy_slots(calls.Answer(200, {"a": 1})) is None
    assert busy_slots(calls.Answer(501, [])) is None


async def test_an_openai_compatible_server_lists_names_and_excludes_nothing() -> None:
    listed = [{"id": "Qwen/Qwen3-8B", "max_model_len": 40960}, {"id": "plain"}, {"id": 7}, {"id": "a b"}]
    async with (
        replaying({"/v1/models": made({"object": "list", "data": listed})}) as server,
        means() as given,
    ):
        backend = OpenAICompatible(server.origin, given)
        reading = await backend.poll(0.0)
        server.answers["/v1/models"] = NOT_FOUND
        assert (await backend.poll(5.0)).detect_again
    first, second = reading.models
    assert (first.name, first.state, first.slots) == ("Qwen/Qwen3-8B", "hot", 4)
    assert (first.context_tokens, first.context_fixed) == (40960, True)
    assert (second.context_tokens, second.context_fixed) == (None, False)
    assert {"completion", "embedding", "tools", "vision"} <= set(first.capabilities)
    assert backend.native == {"openai"}
    await backend.ensure_loaded("plain", {})
    assert await backend.slots_taken() is None
