"""What backends promise about the endpoints that not each of them has, the fakes and the real ones."""

from __future__ import annotations

from typing import Any

import orjson

from tests.fakes.contract import MESSAGES, Check, Target, post, same_head, same_shape
from tests.fakes.endpoints import OF_LLAMA, OF_OLLAMA
from tests.fakes.recordings import recording

ASKED = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0}


def named_events(body: bytes) -> list[tuple[str, Any]]:
    """Name and data of each event, which must both be there and agree."""
    found = []
    for block in body.replace(b"\n\n\n", b"\n\n").split(b"\n\n"):
        if not block.strip() or block.startswith(b":"):
            continue
        head, _, data = block.strip(b"\n").partition(b"\n")
        value = orjson.loads(data.removeprefix(b"data: "))
        assert head == b"event: " + value["type"].encode()
        found.append((value["type"], value))
    return found


def once(kinds: list[str]) -> list[str]:
    """Without the repetitions of deltas."""
    return [kind for at, kind in enumerate(kinds) if not at or kinds[at - 1] != kind]


async def streams_a_message(target: Target, name: str) -> None:
    recorded = recording(name)
    answer = await post(target, "/v1/messages", model=target.model, stream=True, **ASKED)
    same_head(answer, recorded)
    ours, theirs = named_events(answer.content), named_events(recorded.body)
    assert once([kind for kind, _ in ours]) == once([kind for kind, _ in theirs])
    for at in (0, 1, 2, -3, -2, -1):
        same_shape(ours[at][1], theirs[at][1])


async def streams_a_response(target: Target, name: str) -> None:
    recorded = recording(name)
    fields = {"model": target.model, "input": "Name one colour.", "max_output_tokens": 4, "stream": True}
    answer = await post(target, "/v1/responses", **fields)
    same_head(answer, recorded)
    ours, theirs = named_events(answer.content), named_events(recorded.body)
    kinds = once([kind for kind, _ in ours])
    assert kinds[-1] == "response.completed"
    assert set(kinds) <= {kind for kind, _ in theirs}
    assert ours[-1][1]["response"]["usage"]["output_tokens"] > 0
    assert ("sequence_number" in ours[0][1]) is ("sequence_number" in theirs[0][1])


async def says_what_it_does_not_have(target: Target, has: tuple[str, ...]) -> None:
    """As an agent tries it: an empty object is refused where the endpoint is, and starts nothing."""
    for path in (*OF_LLAMA, *OF_OLLAMA, "/v1/images/generations"):
        status = (await post(target, path)).status_code
        offered = 400 <= status <= 500 and status not in (404, 405)
        assert offered is (path in has), (path, status)


async def llama_answers_a_message(target: Target) -> None:
    answer = await post(target, "/v1/messages", model="ignored", **ASKED)
    recorded = recording("llamacpp/messages")
    same_head(answer, recorded)
    same_shape(answer.json(), orjson.loads(recorded.body))
    assert (answer.json()["model"], answer.json()["stop_reason"]) == (target.model, "max_tokens")


async def llama_streams_a_message(target: Target) -> None:
    await streams_a_message(target, "llamacpp/messages-stream")


async def llama_counts_tokens(target: Target) -> None:
    answer = await post(target, "/v1/messages/count_tokens", model=target.model, messages=MESSAGES)
    same_head(answer, recording("llamacpp/messages-count-tokens"))
    assert answer.json() == {"input_tokens": answer.json()["input_tokens"]}


async def llama_refuses_a_message_in_openais_shape(target: Target) -> None:
    for fields in ({"max_tokens": 1}, {"messages": [{"role": "user", "content": "word " * 4000}]}):
        answer = await post(target, "/v1/messages", **fields)
        assert answer.status_code in (400, 500)
        assert {"code", "message", "type"} <= answer.json()["error"].keys()
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}
    answer = await post(target, "/v1/messages", messages=[{"role": "user", "content": [image]}], max_tokens=1)
    assert answer.status_code == 500
    assert "image input is not supported" in answer.json()["error"]["message"]


async def llama_responds(target: Target) -> None:
    answer = await post(target, "/v1/responses", model="ignored", input="hi", max_output_tokens=4)
    recorded = recording("llamacpp/responses")
    same_head(answer, recorded)
    same_shape(answer.json(), orjson.loads(recorded.body))


async def llama_streams_a_response(target: Target) -> None:
    await streams_a_response(target, "llamacpp/responses-stream")


async def llama_keeps_no_response(target: Target) -> None:
    answer = await post(target, "/v1/responses", input="hi", previous_response_id="resp_1")
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == "llama.cpp does not support 'previous_response_id'."


async def llama_says_what_it_does_not_have(target: Target) -> None:
    await says_what_it_does_not_have(target, ("/v1/messages", "/v1/messages/count_tokens", "/v1/responses"))


async def ollama_answers_a_message(target: Target) -> None:
    answer = await post(target, "/v1/messages", model=target.model, **ASKED)
    recorded = recording("ollama/v1-messages")
    same_head(answer, recorded)
    same_shape(answer.json(), orjson.loads(recorded.body))


async def ollama_streams_a_message(target: Target) -> None:
    await streams_a_message(target, "ollama/v1-messages-stream")


async def ollama_refuses_a_message_in_anthropics_shape(target: Target) -> None:
    for name, fields in (
        ("v1-messages-no-max-tokens", {"model": target.model, "messages": MESSAGES}),
        ("v1-messages-unknown", {"model": "nope", **ASKED}),
    ):
        answer, recorded = await post(target, "/v1/messages", **fields), recording(f"ollama/{name}")
        same_head(answer, recorded)
        same_shape(answer.json(), orjson.loads(recorded.body))
        assert answer.json()["error"] == orjson.loads(recorded.body)["error"]


async def ollama_streams_a_response(target: Target) -> None:
    await streams_a_response(target, "ollama/v1-responses-stream")


async def ollama_ignores_a_previous_response(target: Target) -> None:
    fields = {"model": target.model, "input": "x", "previous_response_id": "resp_1", "max_output_tokens": 2}
    answer, recorded = (
        await post(target, "/v1/responses", **fields),
        recording("ollama/v1-responses-previous"),
    )
    same_head(answer, recorded)
    same_shape(answer.json(), orjson.loads(recorded.body), but=("usage",))
    assert answer.json()["previous_response_id"] is None


async def ollama_wants_a_form(target: Target) -> None:
    answer, recorded = (
        await post(target, "/v1/audio/transcriptions", model=target.model),
        recording("ollama/v1-audio-text-model"),
    )
    same_head(answer, recorded)
    assert answer.content == recorded.body


async def ollama_says_what_it_does_not_have(target: Target) -> None:
    await says_what_it_does_not_have(target, OF_OLLAMA)


LLAMA: tuple[Check, ...] = (
    llama_answers_a_message,
    llama_streams_a_message,
    llama_counts_tokens,
    llama_refuses_a_message_in_openais_shape,
    llama_responds,
    llama_streams_a_response,
    llama_keeps_no_response,
    llama_says_what_it_does_not_have,
)
OLLAMA: tuple[Check, ...] = (
    ollama_answers_a_message,
    ollama_streams_a_message,
    ollama_refuses_a_message_in_anthropics_shape,
    ollama_streams_a_response,
    ollama_ignores_a_previous_response,
    ollama_wants_a_form,
    ollama_says_what_it_does_not_have,
)
