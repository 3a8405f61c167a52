"""Through the gateway: answers folded for who wants no stream, text prompts, unloading, OpenAI servers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.agent.agent_kit import Answer, Backendish, House, Request, openai_backend, until
from tests.fakes.backend import FakeBackend
from tests.fakes.faults import Fault
from tests.fakes.model import FakeModel

TEXT = "t0000 t0001 t0002 t0003 t0004 t0005 t0006 t0007 "
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NAME = "smollm2:135m"
ASK = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]


@pytest.fixture
async def house() -> AsyncIterator[House]:
    house = House()
    house.start()
    yield house
    await house.close()


@pytest.fixture
async def llama(house: House) -> AsyncIterator[FakeBackend]:
    able = ("completion", "tools", "thinking", "insert", "vision")
    async with FakeBackend(kind="llama-server", slots=2, models=[FakeModel(NAME, able)]) as fake:
        await house.add(fake.url)
        yield fake


def sent(fake: FakeBackend) -> dict[str, Any]:
    return json.loads(fake.counters.last[-1]["body"])


def without_id(body: bytes) -> dict[str, Any]:
    return {
        name: value for name, value in json.loads(body).items() if name not in ("id", "created", "timings")
    }


# ---- OpenAI's dialect, folded


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (CHAT, ASK),
        (CHAT, ASK | {"stream": False, "unknown": {"x": [1]}}),
        (CHAT, ASK | {"tools": TOOLS}),
        (CHAT, ASK | {"logprobs": True, "top_logprobs": 2}),
        (CHAT, ASK | {"max_tokens": 3}),
        (COMPLETIONS, {"model": NAME, "prompt": "The sky is", "max_tokens": 3}),
        (COMPLETIONS, {"model": NAME, "prompt": "The sky is", "logprobs": 1}),
    ],
)
async def test_a_folded_answer_is_the_backends_own(
    house: House, llama: FakeBackend, path: str, asked: dict[str, Any]
) -> None:
    answer = await house.call(path, asked)
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json; charset=utf-8")
    assert sent(llama)["stream"] is True
    assert {name: sent(llama)[name] for name in asked if name != "stream"} == {
        name: value for name, value in asked.items() if name != "stream"
    }
    async with house.http.stream("POST", llama.url + path, json=asked | {"stream": False}) as direct:
        assert without_id(answer.body) == without_id(await direct.aread())


@pytest.mark.parametrize("asked", [{"stream": False}, {}])
@pytest.mark.parametrize("path", [CHAT, "/api/chat", "/api/generate"])
async def test_a_caller_that_leaves_frees_the_slot_without_having_asked_for_a_stream(
    house: House, llama: FakeBackend, path: str, asked: dict[str, Any]
) -> None:
    llama.faults.append(Fault(kind="stall_after_n", after=1, count=1))
    line = await house.begin(path, ASK | {"prompt": "hi"} | asked)
    await until(lambda: llama.counters.live > 0)
    await line.close()
    await house.gateway.calls.until_idle()
    await until(lambda: llama.counters.aborted > 0)
    assert llama.counters.live == 0


async def test_a_folded_answer_that_is_cut_is_a_reset_and_no_answer(house: House, llama: FakeBackend) -> None:
    for kind in ("fin_after_n", "clean_eof_after_n", "rst_after_n"):
        llama.faults.append(Fault(kind=kind, after=3, count=1))
        answer = await house.call(CHAT, ASK)
        assert (answer.status, answer.headers["x-herd-error"]) == (502, "reset"), kind


async def test_an_error_inside_a_stream_is_the_folded_answer(house: House, llama: FakeBackend) -> None:
    llama.faults.append(Fault(kind="error_after_n", after=2, count=1))
    answer = await house.call(CHAT, ASK)
    assert (answer.status, answer.json()["error"]["message"]) == (500, "injected error")  # type: ignore[index]
    assert "x-herd-error" not in answer.headers


async def test_a_refusal_keeps_the_backends_body_and_gets_an_honest_status(
    house: House, llama: FakeBackend
) -> None:
    long = await house.call(CHAT, ASK | {"messages": [{"role": "user", "content": "word " * 3000}]})
    assert (long.status, long.json()["error"]["type"]) == (400, "exceed_context_size_error")  # type: ignore[index]
    troubles = house.troubles
    wrong = await house.call("/v1/embeddings", {"model": NAME, "input": "word " * 600})
    assert (wrong.status, house.troubles) == (400, troubles)


async def test_on_ollama_nothing_is_folded(house: House) -> None:
    async with FakeBackend(kind="ollama", models=[FakeModel(NAME)]) as ollama:
        await house.add(ollama.url)
        assert (await house.call(CHAT, ASK | {"stream": False})).status == 200
        assert sent(ollama)["stream"] is False


# ---- text of the caller's own


def lines(answer: Answer) -> list[dict[str, Any]]:
    assert answer.status == 200, answer.body
    return [json.loads(line) for line in answer.body.splitlines()]


def text_of(answer: Answer) -> str:
    return "".join(line["response"] for line in lines(answer))


@pytest.mark.parametrize(
    ("asked", "path", "prompt"),
    [
        ({"raw": True}, "/completion", {"prompt": "The sky is"}),
        ({"suffix": "blue"}, "/infill", {"input_prefix": "The sky is", "input_suffix": "blue"}),
        ({"template": "<{{ .Prompt }}>"}, "/completion", {"prompt": "<The sky is>"}),
        (
            {"context": list(b"before "), "system": "S"},
            "/completion",
            {
                "prompt": "before <|im_start|>system\nS<|im_end|>\n"
                "<|im_start|>user\nThe sky is<|im_end|>\n<|im_start|>assistant\n"
            },
        ),
    ],
)
async def test_text_of_the_callers_own_reaches_the_model_as_text(
    house: House, llama: FakeBackend, asked: dict[str, Any], path: str, prompt: dict[str, str]
) -> None:
    answer = await house.call("/api/generate", {"model": NAME, "prompt": "The sky is", **asked})
    assert llama.counters.last[-1]["path"] == path
    assert prompt.items() <= sent(llama).items()
    assert text_of(answer).endswith(TEXT)


async def test_a_talk_goes_on_by_its_context(house: House, llama: FakeBackend) -> None:
    asked = {"model": NAME, "prompt": "Name one colour.", "think": False, "stream": False}
    first = lines(await house.call("/api/generate", asked))[0]
    said = "<|im_start|>user\nName one colour.<|im_end|>\n<|im_start|>assistant\n" + TEXT
    assert bytes(first["context"]).decode() == said
    await house.call("/api/generate", asked | {"prompt": "And?", "context": first["context"]})
    assert sent(llama)["prompt"].startswith(said + "<|im_start|>user\nAnd?")


async def test_a_context_of_another_model_is_the_callers_mistake(house: House, llama: FakeBackend) -> None:
    answer = await house.call("/api/generate", {"model": NAME, "prompt": "x", "context": [50_400_000]})
    assert (answer.status, "tokens" in str(answer.json())) == (400, True)
    assert "x-herd-error" not in answer.headers


async def test_thoughts_and_log_probabilities_come_through(house: House, llama: FakeBackend) -> None:
    asked = {"model": NAME, "prompt": "x", "raw": True, "logprobs": True, "stream": False}
    (answer,) = lines(await house.call("/api/generate", asked))
    assert (answer["thinking"], answer["response"]) == ("thought0000", TEXT)
    assert answer["logprobs"][-1]["token"] == "t0007 "
    assert "top_logprobs" not in answer["logprobs"][-1]


async def test_tools_go_both_ways(house: House, llama: FakeBackend) -> None:
    call = {"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    talk = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_name": "get_weather", "content": "12 C"},
    ]
    asked = {"model": NAME, "messages": talk, "tools": TOOLS}
    answer = await house.call("/api/chat", asked)
    upstream = sent(llama)["messages"]
    assert upstream[1]["tool_calls"][0]["function"]["arguments"] == '{"city":"Rome"}'
    assert upstream[2]["tool_call_id"] == upstream[1]["tool_calls"][0]["id"]
    *_, made, last = lines(answer)
    function = {"index": 0, "name": "get_weather", "arguments": {"city": "Oslo"}}
    assert made["message"]["tool_calls"] == [{"id": "fakecall", "function": function}]
    assert (last["done"], last["done_reason"]) == (True, "stop")
    (folded,) = lines(await house.call("/api/chat", asked | {"stream": False}))
    assert folded["message"]["tool_calls"] == made["message"]["tool_calls"]


# ---- other OpenAI-compatible servers


@pytest.fixture
async def other(house: House) -> AsyncIterator[Backendish]:
    async with openai_backend("some/model") as server:
        await house.add(server.url)
        yield server


def says(*chunks: dict[str, Any]) -> Any:
    async def script(request: Request) -> None:
        request.begin()
        for one in chunks:
            request.chunk(b"data: " + json.dumps(one).encode() + b"\n\n")
        request.chunk(b"data: [DONE]\n\n")
        request.end()

    return script


def delta(finish: str | None = None, **said: object) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": said, "finish_reason": finish}]}


USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}


async def test_ollamas_dialect_is_translated_for_any_openai_server(house: House, other: Backendish) -> None:
    other.on(CHAT, says(delta(reasoning="hm"), delta(content="yes"), delta("stop"), USAGE))
    asked = {"model": "some/model", "messages": ASK["messages"], "options": {"seed": 7, "top_k": 5}}
    answer = await house.call("/api/chat", asked | {"stream": False, "format": "json"})
    (body,) = lines(answer)
    assert body["message"] == {"role": "assistant", "content": "yes", "thinking": "hm"}
    assert (body["prompt_eval_count"], body["eval_count"]) == (5, 2)
    upstream = json.loads(other.of(CHAT)[0].body)
    schema = upstream.pop("response_format")
    assert schema["json_schema"]["schema"] == {"type": "object"}
    assert upstream == {
        "model": "some/model",
        "messages": ASK["messages"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.8,
        "top_p": 0.9,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_k": 5,
        "seed": 7,
    }


async def test_a_raw_prompt_goes_to_the_completions_of_any_openai_server(
    house: House, other: Backendish
) -> None:
    other.on(COMPLETIONS, says({"choices": [{"index": 0, "text": "blue", "finish_reason": "stop"}]}, USAGE))
    asked = {"model": "some/model", "prompt": "The sky is", "raw": True}
    assert text_of(await house.call("/api/generate", asked)) == "blue"
    assert json.loads(other.of(COMPLETIONS)[0].body)["prompt"] == "The sky is"


async def test_an_openai_server_is_asked_for_no_context(house: House, other: Backendish) -> None:
    other.on(CHAT, says(delta(content="yes"), delta("stop")))
    answer = lines(await house.call("/api/generate", {"model": "some/model", "prompt": "x", "stream": False}))
    assert (answer[0]["response"], "context" in answer[0]) == ("yes", False)
    assert [request.path for request in other.requests if request.path == "/apply-template"] == []


async def test_what_an_openai_server_refuses_is_said_in_ollamas_words(
    house: House, other: Backendish
) -> None:
    async def refuse(request: Request) -> None:
        request.answer(400, {"error": {"message": "no such thing", "type": "BadRequestError", "code": 400}})

    other.on(CHAT, refuse)
    answer = await house.call("/api/chat", {"model": "some/model", "messages": ASK["messages"]})
    assert (answer.status, answer.json()) == (400, {"error": "no such thing"})


async def test_openais_dialect_passes_an_openai_server_untouched(house: House, other: Backendish) -> None:
    other.on(CHAT, {"choices": [], "object": "chat.completion"})
    body = json.dumps({"model": "some/model", "messages": [], "stream": False}).encode()
    answer = await house.call(CHAT, body)
    assert answer.json() == {"choices": [], "object": "chat.completion"}
    assert other.of(CHAT)[0].body == body


# ---- unloading


class Unloads(Backendish):
    """llama-server in router mode, with one model that is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.state = "loaded"
        self.on("/props", {"role": "router", "max_instances": 1, "build_info": "b1"})
        self.on("/models", self._list)
        self.on("/models/unload", self._unload)
        self.on("/models/load", self._load)
        self.on(CHAT, says(delta(content="yes"), delta("stop")))

    async def _list(self, request: Request) -> None:
        entry = {"id": "alpha", "aliases": [], "status": {"value": self.state, "args": []}}
        request.answer(200, {"data": [entry], "object": "list"})

    async def _unload(self, request: Request) -> None:
        self.state = "unloaded"
        request.answer(200, {"success": True})

    async def _load(self, request: Request) -> None:
        self.state = "loaded"
        request.answer(200, {"success": True})


@pytest.fixture
async def routing(house: House) -> AsyncIterator[Unloads]:
    server = Unloads()
    await server.start()
    await house.add(server.url)
    yield server
    await server.close()


async def test_a_keep_alive_of_nothing_unloads_where_the_backend_can(house: House, routing: Unloads) -> None:
    answer = await house.call("/api/generate", {"model": "alpha", "keep_alive": 0})
    assert (answer.status, answer.json()["done_reason"]) == (200, "unload")  # type: ignore[index]
    await routing.wait_for("/models/unload")
    assert json.loads(routing.of("/models/unload")[0].body) == {"model": "alpha"}
    assert routing.of("/models/load") == []


async def test_it_unloads_after_an_answer_too(house: House, routing: Unloads) -> None:
    asked = {"model": "alpha", "messages": ASK["messages"], "stream": False}
    assert lines(await house.call("/api/chat", asked | {"keep_alive": "5m"}))[0]["done"] is True
    assert lines(await house.call("/api/chat", asked | {"keep_alive": 0}))[0]["done"] is True
    await routing.wait_for("/models/unload")
    assert len(routing.of("/models/unload")) == 1


async def test_nothing_to_say_loads_the_model_and_says_so(house: House, routing: Unloads) -> None:
    routing.state = "unloaded"
    await house.backends[0].poll(house.clock.now_s())
    answer = await house.call("/api/generate", {"model": "alpha"})
    assert (answer.status, answer.json()["done_reason"]) == (200, "load")  # type: ignore[index]
    assert len(routing.of("/models/load")) == 1


async def test_the_time_of_a_load_is_told(house: House, routing: Unloads) -> None:
    routing.state = "unloaded"
    await house.backends[0].poll(house.clock.now_s())
    (body,) = lines(
        await house.call("/api/chat", {"model": "alpha", "messages": ASK["messages"], "stream": False})
    )
    assert 0 < body["load_duration"] <= body["total_duration"]


async def test_one_model_that_is_kept_is_said_to_be_loaded(house: House, llama: FakeBackend) -> None:
    answer = await house.call("/api/generate", {"model": NAME, "keep_alive": 0})
    assert (answer.status, answer.json()["done_reason"]) == (200, "load")  # type: ignore[index]
