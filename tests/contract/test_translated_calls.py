"""An Ollama caller on a llama.cpp node, as the gateway serves it: translate, call, read back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import orjson
import pytest

from herd_node.protocol.framing import Records
from herd_node.translate import Answer, Call, ModelFacts, Question, Refusal, translate
from tests.contract.targets import client
from tests.fakes.contract import MESSAGES, Target, same_shape
from tests.fakes.recordings import recording

NOT_OURS = ("load_duration",)
GREEDY = {"temperature": 0, "seed": 1, "num_predict": 6}


def facts(target: Target) -> ModelFacts:
    words = frozenset({"completion", "embedding"})
    return ModelFacts(
        name=target.model, upstream_id=target.model, context_tokens=1024, slots=2, capabilities=words
    )


async def follow(target: Target, made: object) -> object:
    """Asks until there is no question left."""
    while isinstance(made, Question):
        answer = await target.http.post(made.path, content=made.body)
        made = made.then(answer.status_code, answer.content)
    return made


async def ask(target: Target, path: str, known: ModelFacts | None = None, **fields: Any) -> tuple[int, bytes]:
    body = orjson.dumps({"model": "As:Asked", **fields})
    call = await follow(target, translate(path, body, known or facts(target)))
    if isinstance(call, Answer):
        return call.status, call.body
    assert isinstance(call, Call)
    loop = asyncio.get_running_loop()
    began_s, reader, out = loop.time(), call.reader, b""
    async with target.http.stream("POST", call.path, content=call.body) as answer:
        if answer.status_code != 200 or not call.sse:
            body = await answer.aread()
            return reader.whole(answer.status_code, body, elapsed_s=loop.time() - began_s)
        records = Records("sse")
        async for piece in answer.aiter_raw():
            for payload in records.feed(piece):
                out += reader.feed(payload, wall_s=1.5, elapsed_s=loop.time() - began_s)
        await follow(target, reader.question())
        out += reader.end(elapsed_s=loop.time() - began_s, wall_s=1.5)
    return reader.status, out


async def test_a_chat_streams_in_ollamas_shape(llama: Target) -> None:
    status, out = await ask(llama, "/api/chat", messages=MESSAGES, options=GREEDY)
    lines = [orjson.loads(line) for line in out.splitlines()]
    theirs = [orjson.loads(line) for line in recording("ollama/chat-stream").body.splitlines()]
    assert status == 200
    same_shape(lines[0], theirs[0])
    same_shape(lines[-1], theirs[-1], but=NOT_OURS)
    assert lines[-1]["eval_count"] == 6
    assert lines[-1]["done_reason"] == "length"
    assert "".join(line["message"]["content"] for line in lines)


async def test_a_generate_folds_to_one_object(llama: Target) -> None:
    status, out = await ask(llama, "/api/generate", prompt="The sky is", options=GREEDY, stream=False)
    assert status == 200
    same_shape(orjson.loads(out), orjson.loads(recording("ollama/generate").body), but=NOT_OURS)


async def test_embeddings_come_normalised_and_cut(llama: Target) -> None:
    status, out = await ask(llama, "/api/embed", input=["hello", "world"], dimensions=8)
    answer = orjson.loads(out)
    assert status == 200
    same_shape(answer, orjson.loads(recording("ollama/embed-two").body), but=NOT_OURS)
    for vector in answer["embeddings"]:
        assert len(vector) == 8
        assert abs(sum(x * x for x in vector) - 1) < 1e-6


async def test_what_is_too_long_is_the_callers_mistake(llama: Target) -> None:
    long_text = "word " * 5000
    status, out = await ask(llama, "/api/generate", prompt=long_text)
    assert (status, "exceeds the available context size" in out.decode()) == (400, True)
    status, out = await ask(llama, "/api/embed", input=long_text)
    assert (status, orjson.loads(out)) == (400, {"error": "the input length exceeds the context length"})


@pytest.mark.llama
@pytest.mark.slow
async def test_a_schema_is_enforced_by_the_real_server(real_llama_server: str) -> None:
    schema = {
        "type": "object",
        "properties": {"warm": {"type": "boolean"}},
        "required": ["warm"],
        "additionalProperties": False,
    }
    async with client(real_llama_server) as http:
        target = Target(http, "smollm2:135m", None)
        fields = {"messages": MESSAGES, "format": schema, "stream": False}
        _, out = await ask(target, "/api/chat", options={"temperature": 0, "num_predict": 60}, **fields)
    said = orjson.loads(orjson.loads(out)["message"]["content"])
    assert said.keys() == {"warm"}


# ---- text of the caller's own


async def generated(target: Target, **fields: Any) -> dict[str, Any]:
    status, out = await ask(target, "/api/generate", options=GREEDY, stream=False, **fields)
    assert status == 200, out
    return orjson.loads(out)


async def test_a_raw_prompt_is_answered_in_ollamas_shape(llama: Target) -> None:
    answer = await generated(llama, prompt="The sky is", raw=True)
    same_shape(answer, orjson.loads(recording("ollama/generate-raw").body), but=NOT_OURS)
    assert answer["eval_count"] == 6
    status, out = await ask(llama, "/api/generate", prompt="The sky is", raw=True, options=GREEDY)
    lines = [orjson.loads(line) for line in out.splitlines()]
    assert (status, "".join(line["response"] for line in lines)) == (200, answer["response"])


async def test_a_context_carries_the_talk_on(llama: Target) -> None:
    first = await generated(llama, prompt="Name one colour.")
    assert all(isinstance(token, int) for token in first["context"])
    second = await generated(llama, prompt="And one more?", context=first["context"])
    assert second["context"][: len(first["context"])] == first["context"]
    assert len(second["context"]) > len(first["context"])


async def test_a_context_of_no_model_is_refused(llama: Target) -> None:
    with pytest.raises(Refusal, match="tokens that this model does not have"):
        await ask(llama, "/api/generate", prompt="x", context=[50_400_000])


async def test_a_template_makes_the_prompt(llama: Target) -> None:
    recorded = recording("ollama/generate-system-template")
    asked = orjson.loads(recorded.request_body)
    fields = {name: asked[name] for name in ("prompt", "system", "template")}
    answer, theirs = await generated(llama, **fields), orjson.loads(recorded.body)
    same_shape(answer, theirs, but=NOT_OURS)


@pytest.mark.llama
@pytest.mark.slow
async def test_the_tokens_of_a_context_are_those_that_ollama_gives(real_llama_server: str) -> None:
    recorded = recording("ollama/generate-system-template")
    theirs = orjson.loads(recorded.body)
    async with client(real_llama_server) as http:
        made = translate("/api/generate", recorded.request_body, facts(Target(http, "m", None)))
        assert isinstance(made, Call)
        made.reader.feed(b'{"content":"","stop":true,"stop_type":"eos"}', wall_s=0, elapsed_s=0)
        await follow(Target(http, "m", None), made.reader.question())
    ours = orjson.loads(made.reader.end(elapsed_s=0, wall_s=0))
    assert ours["context"] == theirs["context"][: theirs["prompt_eval_count"]]


async def test_log_probabilities_have_ollamas_shape(llama: Target) -> None:
    for name, path, fields in (
        ("chat-logprobs", "/api/chat", {"messages": MESSAGES, "top_logprobs": 1}),
        ("generate-logprobs-stream", "/api/generate", {"prompt": "The sky is"}),
        ("generate-logprobs-stream", "/api/generate", {"prompt": "The sky is", "raw": True}),
    ):
        _, out = await ask(llama, path, logprobs=True, options=GREEDY, **fields)
        theirs = orjson.loads(recording(f"ollama/{name}").body.splitlines()[0])
        same_shape(orjson.loads(out.splitlines()[0]), theirs)


async def test_a_gap_that_cannot_be_filled_is_refused_as_ollama_refuses_it(llama: Target) -> None:
    status, out = await ask(llama, "/api/generate", prompt="def f(", suffix="return")
    theirs = recording("ollama/generate-suffix-unsupported").body
    assert (status, out) == (400, theirs.replace(b"library/smollm2:135m", b"library/As:Asked"))


# ---- a model that thinks and calls tools, for real

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
LONG = {"temperature": 0, "seed": 1, "num_predict": 60}


@pytest.fixture
async def able(able_llama_server: str) -> AsyncIterator[Target]:
    async with client(able_llama_server) as http:
        yield Target(http, "smollm2:135m", None)


def able_facts(target: Target) -> ModelFacts:
    return replace(facts(target), capabilities=frozenset({"completion", "tools", "thinking"}))


@pytest.mark.llama
@pytest.mark.slow
async def test_a_real_tool_call_comes_whole_with_an_object(able: Target) -> None:
    talk: list[dict[str, Any]] = [{"role": "user", "content": "Weather in Oslo?"}]
    fields = {"messages": talk, "tools": [TOOL], "options": LONG}
    _, out = await ask(able, "/api/chat", able_facts(able), **fields)
    *_, made, last = [orjson.loads(line) for line in out.splitlines()]
    theirs = [orjson.loads(line) for line in recording("ollama/chat-tools").body.splitlines()]
    same_shape(made, theirs[0])
    same_shape(last, theirs[-1], but=NOT_OURS)
    (call,) = made["message"]["tool_calls"]
    assert call["function"] == {"index": 0, "name": "get_weather", "arguments": {"city": "Oslo"}}
    talk += [made["message"], {"role": "tool", "tool_name": "get_weather", "content": "12 C"}]
    status, out = await ask(able, "/api/chat", able_facts(able), **fields, stream=False)
    assert (status, orjson.loads(out)["done"]) == (200, True)


@pytest.mark.llama
@pytest.mark.slow
async def test_real_thoughts_stand_beside_the_answer(able: Target) -> None:
    for path, fields in (
        ("/api/chat", {"messages": MESSAGES}),
        ("/api/generate", {"prompt": "Name one colour."}),
    ):
        _, out = await ask(able, path, able_facts(able), stream=False, options=LONG, **fields)
        answer = orjson.loads(out)
        said = answer["message"] if path == "/api/chat" else answer
        assert said["thinking"].startswith("The user wants a colour.")
        assert "<think>" not in orjson.dumps(said).decode()
        _, out = await ask(able, path, able_facts(able), stream=False, options=GREEDY, think=False, **fields)
        said = orjson.loads(out)
        assert "thinking" not in (said["message"] if path == "/api/chat" else said)


@pytest.mark.llama
@pytest.mark.slow
async def test_real_thoughts_are_told_apart_in_plain_text_too(able: Target) -> None:
    example = "<think>\nThe user wants %s.\n</think>\n\n%s.<|im_end|>\n"
    asked = "<|im_start|>user\nName one %s.<|im_end|>\n<|im_start|>assistant\n"
    prompt = asked % "animal" + example % ("an animal", "Cat") + asked % "city" + example % ("a city", "Oslo")
    fields = {"prompt": prompt + asked % "colour", "raw": True, "stream": False, "options": LONG}
    _, out = await ask(able, "/api/generate", able_facts(able), **fields)
    answer = orjson.loads(out)
    assert answer["thinking"].startswith("The user wants a colour")
    assert answer["response"]
    assert "think>" not in answer["response"]
