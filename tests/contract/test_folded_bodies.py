"""A folded stream is what the real llama.cpp server itself answers without streaming, minus ids and times."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
import pytest

from herd_node.protocol.framing import Records
from herd_node.translate import fold
from tests.contract.targets import client

pytestmark = [pytest.mark.llama, pytest.mark.slow]

ASK = [{"role": "user", "content": "Name one colour."}]
#: Nothing of one request is left for the next, so that both count the same tokens as cached.
STILL = {"model": "smollm2:135m", "temperature": 0, "seed": 1, "cache_prompt": False}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
WEATHER = [{"role": "user", "content": "Weather in Oslo?"}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"

PLAIN: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": ASK, "max_tokens": 6}),
    (CHAT, {"messages": ASK, "max_tokens": 6, "stream": False, "stream_options": {"include_usage": False}}),
    (CHAT, {"messages": ASK, "max_tokens": 40, "stop": ["possible"]}),
    (CHAT, {"messages": ASK, "max_tokens": 5, "n": 2}),
    (CHAT, {"messages": ASK, "max_tokens": 6, "logprobs": True, "top_logprobs": 3}),
    (CHAT, {"messages": ASK, "max_tokens": 4, "n": 2, "logprobs": True}),
    (CHAT, {"messages": ASK, "max_tokens": 12, "response_format": SCHEMA}),
    (CHAT, {"messages": ASK, "max_tokens": 4, "timings_per_token": True, "return_progress": True}),
    (CHAT, {"messages": [{"role": "user", "content": "Repeat: 🦄 ünï 日本語"}], "max_tokens": 20}),
    (CHAT, {"messages": ASK, "max_tokens": 0, "unknown": {"field": [1]}}),
    (TEXT, {"prompt": "The sky is", "max_tokens": 6}),
    (TEXT, {"prompt": "The sky is", "max_tokens": 6, "logprobs": 2}),
    (TEXT, {"prompt": "The sky is", "max_tokens": 4, "n": 2}),
    (TEXT, {"prompt": ["The sky is", "Grass is"], "max_tokens": 4}),
    (TEXT, {"prompt": "The sky is", "max_tokens": 20, "stop": [","]}),
    ("/v1/responses", {"input": "Name one colour.", "max_output_tokens": 4}),
    ("/v1/messages", {"messages": ASK, "max_tokens": 4}),
]
ABLE: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": ASK, "max_tokens": 60}),
    (CHAT, {"messages": ASK, "max_tokens": 5}),
    (CHAT, {"messages": ASK, "max_tokens": 8, "chat_template_kwargs": {"enable_thinking": False}}),
    (CHAT, {"messages": WEATHER, "tools": [TOOL], "max_tokens": 60}),
    (CHAT, {"messages": WEATHER, "tools": [TOOL], "max_tokens": 60, "n": 2}),
    (CHAT, {"messages": WEATHER, "tools": [TOOL], "max_tokens": 15}),
    ("/v1/responses", {"input": "Name one colour.", "max_output_tokens": 40}),
    (
        "/v1/responses",
        {"input": "Weather in Oslo?", "tools": [{"type": "function", **TOOL["function"]}]},
    ),
    ("/v1/messages", {"messages": ASK, "max_tokens": 40}),
    (
        "/v1/messages",
        {
            "messages": WEATHER,
            "max_tokens": 60,
            "tools": [{"name": "get_weather", "input_schema": TOOL["function"]["parameters"]}],
        },
    ),
]


def without_ids_and_times(value: Any) -> Any:
    """Nor how many of the prompt's tokens were cached: two of the endpoints do not hear `cache_prompt`."""
    if isinstance(value, list):
        return [without_ids_and_times(item) for item in value]
    if not isinstance(value, dict):
        return value
    gone = {"id", "call_id", "created", "created_at", "completed_at", "cached_tokens"}
    if "cache_read_input_tokens" in value:
        gone |= {"cache_read_input_tokens", "input_tokens"}
    return {
        key: without_ids_and_times(inner)
        for key, inner in value.items()
        if key not in gone and not key.endswith(("_ms", "_per_second"))
    }


async def folded(http: httpx.AsyncClient, path: str, fields: dict[str, Any]) -> bytes:
    call = fold(path, orjson.dumps(fields), fields)
    assert call is not None
    records = Records("sse")
    async with http.stream("POST", path, content=call.body) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        async for piece in answer.aiter_raw():
            for payload in records.feed(piece):
                assert call.reader.feed(payload, wall_s=0, elapsed_s=0) == b""
    return call.reader.end(wall_s=0, elapsed_s=0)


async def compare(url: str, path: str, fields: dict[str, Any]) -> None:
    async with client(url) as http:
        theirs = await http.post(path, json=STILL | fields)
        assert theirs.status_code == 200
        ours = orjson.loads(await folded(http, path, STILL | fields))
    assert without_ids_and_times(ours) == without_ids_and_times(theirs.json())
    if path in (CHAT, TEXT):
        assert list(ours) == list(theirs.json())
        assert [list(choice) for choice in ours["choices"]] == [
            list(choice) for choice in theirs.json()["choices"]
        ]


@pytest.mark.parametrize(("path", "fields"), PLAIN)
async def test_a_folded_body_is_the_servers_own(
    real_llama_server: str, path: str, fields: dict[str, Any]
) -> None:
    await compare(real_llama_server, path, fields)


@pytest.mark.parametrize(("path", "fields"), ABLE)
async def test_folded_thoughts_and_tool_calls_are_the_servers_own(
    able_llama_server: str, path: str, fields: dict[str, Any]
) -> None:
    await compare(able_llama_server, path, fields)


async def test_a_mark_that_the_length_cut_off_is_in_no_stream(able_llama_server: str) -> None:
    """The one difference in the text: the server holds `<think` back until it knows, and then it is over."""
    fields = STILL | {"messages": ASK, "max_tokens": 2}
    async with client(able_llama_server) as http:
        theirs = (await http.post(CHAT, json=fields)).json()["choices"][0]["message"]
        ours = orjson.loads(await folded(http, CHAT, fields))["choices"][0]["message"]
    assert (ours["content"], "<think>".startswith(theirs["content"])) == ("", True)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_what_is_refused_is_refused_in_the_servers_words(real_llama_server: str, path: str) -> None:
    fields = STILL | {"messages": ASK * 600, "prompt": "word " * 3000}
    async with client(real_llama_server) as http:
        theirs = await http.post(path, json=fields)
        call = fold(path, orjson.dumps(fields), fields)
        assert call is not None
        ours = await http.post(path, content=call.body)
    assert call.reader.whole(ours.status_code, ours.content, elapsed_s=0) == (400, theirs.content)
