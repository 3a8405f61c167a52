"""An Ollama caller on a llama.cpp node, as the gateway serves it: translate, call, read back."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from herd_node.protocol.framing import Records
from herd_node.translate import Call, ModelFacts, translate
from tests.contract.targets import client
from tests.fakes.contract import MESSAGES, Target, same_shape
from tests.fakes.recordings import recording

NOT_OURS = ("load_duration", "context")
GREEDY = {"temperature": 0, "seed": 1, "num_predict": 6}


def facts(target: Target) -> ModelFacts:
    words = frozenset({"completion", "embedding"})
    return ModelFacts(
        name=target.model, upstream_id=target.model, context_tokens=1024, slots=2, capabilities=words
    )


async def ask(target: Target, path: str, **fields: Any) -> tuple[int, bytes]:
    call = translate(path, orjson.dumps({"model": "As:Asked", **fields}), facts(target))
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
