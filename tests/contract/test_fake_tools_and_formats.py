"""What no small model does on demand, and the fake Ollama by script: calls of tools, answers in a format.

Each recorded request is sent to the fake, and its answer compared with the recorded one.
"""

from __future__ import annotations

import base64
import struct

import httpx
import orjson
import pytest

from tests.contract.targets import client
from tests.fakes.backend import FakeBackend
from tests.fakes.contract import same_shape
from tests.fakes.model import FakeModel
from tests.fakes.recordings import recording

MODELS = {
    "smollm2:135m": ("completion",),
    "smol-tools:latest": ("tools", "completion"),
    "smol-embed:latest": ("embedding",),
}
#: The fake loads nothing, and a call of a tool has no tokens there.
NOT_OURS = ("load_duration", "eval_count")


async def ask_as_recorded(name: str) -> httpx.Response:
    recorded = recording(f"ollama/{name}")
    models = [FakeModel(model, capabilities=able, loaded=True) for model, able in MODELS.items()]
    async with FakeBackend(kind="ollama", models=models) as fake, client(fake.url) as http:
        path = recorded.request_head.split()[1].decode()
        answer = await http.post(path, content=recorded.request_body)
    assert answer.status_code == recorded.status
    assert answer.headers["content-type"] == recorded.headers["content-type"]
    return answer


def payloads(body: bytes) -> list[bytes]:
    return [line.removeprefix(b"data: ") for line in body.split(b"\n") if line and b"event:" not in line]


@pytest.mark.parametrize("name", ["chat-tools-nostream", "v1-chat-tools", "v1-messages-tools"])
async def test_a_whole_answer_that_calls_a_tool_has_the_recorded_shape(name: str) -> None:
    answer = await ask_as_recorded(name)
    same_shape(answer.json(), orjson.loads(recording(f"ollama/{name}").body), but=NOT_OURS)
    assert b"get_weather" in answer.content
    assert b"Oslo" in answer.content


@pytest.mark.parametrize("name", ["chat-tools", "v1-chat-tools-stream"])
async def test_a_stream_that_calls_a_tool_has_the_recorded_records(name: str) -> None:
    ours = payloads((await ask_as_recorded(name)).content)
    theirs = payloads(recording(f"ollama/{name}").body)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if other == b"[DONE]":
            assert one == b"[DONE]"
        else:
            same_shape(orjson.loads(one), orjson.loads(other), but=NOT_OURS)


async def test_who_brings_what_the_tool_said_is_answered_in_words() -> None:
    message = (await ask_as_recorded("chat-tools-result")).json()["message"]
    assert message["content"].startswith("t0000 ")
    assert "tool_calls" not in message


@pytest.mark.parametrize("name", ["chat-schema", "v1-chat-schema", "chat-json", "v1-chat-json-object"])
async def test_an_answer_in_a_format_is_json_in_the_recorded_shape(name: str) -> None:
    answer = (await ask_as_recorded(name)).json()
    recorded = orjson.loads(recording(f"ollama/{name}").body)
    same_shape(answer, recorded, but=NOT_OURS)
    ours, theirs = (
        (one.get("message") or one["choices"][0]["message"])["content"] for one in (answer, recorded)
    )
    same_shape(orjson.loads(ours), orjson.loads(theirs))


async def test_embeddings_are_packed_when_asked_for_so() -> None:
    data = (await ask_as_recorded("v1-embeddings-base64")).json()["data"]
    values = struct.unpack("<16f", base64.b64decode(data[0]["embedding"]))
    assert sum(value * value for value in values) == pytest.approx(1)
