"""The gateway in front of a faithful Ollama and a faithful llama-server: both dialects, loads, faults."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from tests.agent.agent_kit import Answer, House, until
from tests.fakes.backend import FakeBackend
from tests.fakes.faults import Fault
from tests.fakes.model import FakeModel

TEXT = "t0000 t0001 t0002 t0003 t0004 t0005 t0006 t0007"
ASK = {"model": "smollm2:135m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    house.start()
    yield house
    await house.close()


@pytest.fixture
async def llama(house: House) -> AsyncIterator[FakeBackend]:
    async with FakeBackend(kind="llama-server", slots=2) as fake:
        await house.add(fake.url)
        yield fake


@pytest.fixture
async def ollama(house: House) -> AsyncIterator[FakeBackend]:
    async with FakeBackend(kind="ollama", models=[FakeModel("smollm2:135m")]) as fake:
        await house.add(fake.url)
        yield fake


def lines(answer: Answer) -> list[dict[str, object]]:
    return [json.loads(line) for line in answer.body.splitlines()]


def text_of(answer: Answer) -> str:
    return "".join(line["message"]["content"] for line in lines(answer) if "message" in line).strip()  # type: ignore[index]


async def test_ollamas_chat_streams_from_a_llama_server(house: House, llama: FakeBackend) -> None:
    answer = await house.call("/api/chat", ASK | {"model": "SmolLM2:135M"})
    assert (answer.status, answer.whole) == (200, True)
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert text_of(answer) == TEXT
    last = lines(answer)[-1]
    assert (last["done"], last["done_reason"], last["eval_count"]) == (True, "stop", 8)
    assert {line["model"] for line in lines(answer)} == {"SmolLM2:135M"}
    assert list(llama.counters.by_path)[-1] == "/v1/chat/completions"


async def test_ollamas_chat_is_folded_for_a_caller_that_wants_one_object(
    house: House, llama: FakeBackend
) -> None:
    answer = await house.call("/api/chat", ASK | {"stream": False})
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert text_of(answer) == TEXT
    assert json.loads(llama.counters.last[-1]["body"])["stream"] is True


async def test_openais_chat_passes_through_a_llama_server_untouched(house: House, llama: FakeBackend) -> None:
    answer = await house.call("/v1/chat/completions", ASK | {"stream": True})
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.body.endswith(b"data: [DONE]\n\n")
    assert answer.whole


@pytest.mark.parametrize("path", ["/api/embed", "/api/show"])
async def test_the_other_ollama_calls_are_answered_too(house: House, llama: FakeBackend, path: str) -> None:
    answer = await house.call(path, {"model": "smollm2:135m", "input": "hello"})
    assert answer.status == 200
    assert {"/api/embed": "embeddings", "/api/show": "model_info"}[path] in answer.json()  # type: ignore[operator]


async def test_what_cannot_be_translated_is_the_callers_mistake(house: House, llama: FakeBackend) -> None:
    answer = await house.call("/api/generate", {"model": "smollm2:135m", "prompt": "x", "template": "{{ y"})
    assert answer.status == 400
    assert "template: :1: unclosed action" in str(answer.json())
    assert "x-herd-error" not in answer.headers


async def test_a_translated_stream_that_the_backend_cuts_is_cut(house: House, llama: FakeBackend) -> None:
    for kind in ("fin_after_n", "rst_after_n", "clean_eof_after_n"):
        llama.faults.append(Fault(kind=kind, after=3, count=1))
        answer = await house.call("/api/chat", ASK)
        assert (answer.status, answer.whole) == (200, False), kind
        # a reset may overtake what was sent before it
        assert TEXT.startswith(text_of(answer))
        assert not any(line["done"] for line in lines(answer))


async def test_a_folded_answer_that_the_backend_cuts_is_a_reset_and_no_answer(
    house: House, llama: FakeBackend
) -> None:
    llama.faults.append(Fault(kind="fin_after_n", after=3, count=1))
    answer = await house.call("/api/chat", ASK | {"stream": False})
    assert (answer.status, answer.headers["x-herd-error"]) == (502, "reset")


async def test_a_client_mistake_that_a_backend_calls_500_is_a_400(house: House, llama: FakeBackend) -> None:
    llama.faults.append(Fault(kind="status", count=1))
    assert (await house.call("/v1/chat/completions", ASK)).status == 500
    answer = await house.call("/v1/embeddings", {"model": "smollm2:135m", "input": "word " * 600})
    assert answer.status == 400
    assert "too large to process" in str(answer.json())


async def test_a_caller_that_leaves_frees_the_slot_of_a_translated_stream(
    house: House, llama: FakeBackend
) -> None:
    llama.faults.append(Fault(kind="stall_after_n", after=1, count=1))
    line = await house.begin("/api/chat", ASK)
    await line.head()
    await line.chunk()
    await line.close()
    await house.gateway.calls.until_idle()
    await until(lambda: llama.counters.aborted > 0)
    assert llama.counters.live == 0


async def test_a_cold_model_is_loaded_by_the_agent_with_the_callers_options(
    house: House, ollama: FakeBackend
) -> None:
    answer = await house.call("/api/chat", ASK | {"options": {"num_ctx": 1024, "temperature": 0}})
    assert answer.status == 200
    assert text_of(answer) == TEXT
    assert ollama.counters.loads == 1
    first = json.loads(ollama.counters.last[0]["body"])
    assert (ollama.counters.last[0]["path"], first["options"]) == ("/api/generate", {"num_ctx": 1024})


async def test_a_caller_that_leaves_during_a_load_throws_nothing_away(
    house: House, ollama: FakeBackend
) -> None:
    ollama.load_s = 0.3
    line = await house.begin("/api/chat", ASK)
    await until(lambda: ollama.counters.requests > 0)
    await line.close()
    await house.gateway.calls.until_idle()
    answer = await house.call("/api/chat", ASK)
    assert answer.status == 200
    assert ollama.counters.loads == 1


async def test_unloading_does_not_load_first(house: House, ollama: FakeBackend) -> None:
    answer = await house.call("/api/generate", {"model": "smollm2:135m", "keep_alive": 0, "stream": False})
    assert (answer.status, answer.json()["done_reason"]) == (200, "unload")  # type: ignore[index]
    assert ollama.counters.loads == 0


async def test_ollama_hears_its_own_name_and_echoes_the_callers_spelling(
    house: House, ollama: FakeBackend
) -> None:
    answer = await house.call("/api/chat", ASK | {"model": "registry.ollama.ai/library/SmolLM2:135m"})
    assert {line["model"] for line in lines(answer)} == {"registry.ollama.ai/library/SmolLM2:135m"}


async def test_a_kept_connection_that_ollama_closed_is_not_the_callers_problem(
    house: House, ollama: FakeBackend
) -> None:
    assert (await house.call("/api/chat", ASK)).status == 200
    ollama.faults.append(Fault(kind="keepalive_race", count=1))
    assert (await house.call("/api/chat", ASK)).status == 200
