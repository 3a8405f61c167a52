"""What Anthropic's requests tell the planner, and what their answers say about themselves."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from herd.dialects import ANTHROPIC, Parsed
from herd.errors import ApiError
from herd_node.protocol.routes import FORWARDED_BY_PATH
from tests.fakes.recordings import recording

MESSAGES = FORWARDED_BY_PATH["/v1/messages"]
COUNT = FORWARDED_BY_PATH["/v1/messages/count_tokens"]
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aGk="}}


def parse(*content: object, **more: Any) -> Parsed:
    messages = [{"role": "user", "content": one} for one in content or ("hi",)]
    body = {"model": "m", "max_tokens": 9, "messages": messages} | more
    return ANTHROPIC.parse(MESSAGES, orjson.dumps(body))


def test_what_the_planner_must_know_is_read():
    parsed = parse(
        [{"type": "text", "text": "x" * 360}, IMAGE], tools=[TOOL], metadata={"user_id": "u" * 300}
    )
    assert parsed.needs == {"completion", "/v1/messages", "tools", "vision"}
    assert (parsed.max_tokens, parsed.buffered, parsed.user) == (9, True, "u" * 256)
    assert 700 < parsed.est_tokens < 750
    assert parse().needs == {"completion", "/v1/messages"}
    assert parse(tools=[]).buffered is False


def test_a_thinking_request_goes_to_any_model_since_backends_drop_what_they_cannot_do():
    assert parse(thinking={"type": "enabled", "budget_tokens": 1024}).needs == parse().needs


def test_system_and_tools_stand_before_the_first_message():
    plain, told = parse("a", "b"), parse("a", "b", system="Be brief.")
    assert told.est_tokens > plain.est_tokens
    assert {mark.digest for mark in plain.prefixes}.isdisjoint(mark.digest for mark in told.prefixes)
    blocks = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    assert parse("a", "b", system=blocks).prefixes == told.prefixes
    assert parse(tools=[TOOL]).prefixes != parse().prefixes


def test_equal_beginnings_have_equal_prefix_marks():
    def marks(*texts: str) -> list[bytes]:
        return [mark.digest for mark in parse(*texts).prefixes]

    assert marks("a", "b", "c")[:2] == marks("a", "b")
    assert marks("a", "b")[-1] != marks("a", "x")[-1]


BLOCKS: list[dict[str, Any]] = [
    {"type": "text", "text": "x"},
    {"type": "thinking", "thinking": "x", "signature": "s"},
    {"type": "redacted_thinking", "data": "x"},
    {"type": "tool_use", "id": "t", "name": "f", "input": {"city": "Oslo"}},
    {"type": "tool_result", "tool_use_id": "t", "content": "warm"},
    {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "warm"}, IMAGE]},
    {"type": "tool_result", "tool_use_id": "t"},
    {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x" * 900}},
    {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "x" * 90000}},
    {"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}},
    {"type": "something_of_tomorrow", "x": [1]},
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block["type"])
def test_every_kind_of_block_is_taken(block: dict[str, Any]):
    parsed = parse([block])
    assert parsed.est_tokens < 1500
    assert ("vision" in parsed.needs) is ("source" in str(block) and "image" in str(block))


@pytest.mark.parametrize(
    "block",
    [
        {"text": "x"},
        {"type": "text"},
        {"type": "text", "text": 7},
        {"type": "thinking", "thinking": None},
        {"type": "image"},
        {"type": "image", "source": "aGk="},
        {"type": "tool_result", "content": 7},
        {"type": "tool_result", "content": [7]},
    ],
)
def test_a_block_of_another_shape_is_refused(block: dict[str, Any]):
    with pytest.raises(ApiError) as caught:
        parse([block])
    assert caught.value.status == 400


def test_a_count_needs_no_limit_and_never_streams():
    body = {"model": "m", "messages": [{"role": "user", "content": "x" * 36}], "stream": True}
    parsed = ANTHROPIC.parse(COUNT, orjson.dumps(body))
    assert (parsed.stream, parsed.needs) == (False, {"completion", "/v1/messages/count_tokens"})
    assert ANTHROPIC.guess is not None
    assert orjson.loads(ANTHROPIC.guess(parsed.est_tokens)) == {"input_tokens": 11}
    assert orjson.loads(ANTHROPIC.guess(0.0)) == {"input_tokens": 1}


def test_tokens_from_the_prompt_cache_belong_to_the_prompt():
    ending = ANTHROPIC.whole(MESSAGES, recording("llamacpp/messages").body)
    assert (ending.prompt_tokens, ending.cached_tokens, ending.completion_tokens) == (34, 33, 8)
    ending = ANTHROPIC.whole(MESSAGES, recording("ollama/v1-messages").body)
    assert (ending.prompt_tokens, ending.cached_tokens, ending.completion_tokens) == (13, None, 8)


def test_a_message_without_a_reason_to_stop_is_not_complete():
    value = orjson.loads(recording("ollama/v1-messages").body)
    for reason in (None, "", 7):
        assert ANTHROPIC.whole(MESSAGES, orjson.dumps(value | {"stop_reason": reason})).how == "truncated"


def test_an_error_of_openais_shape_is_an_error_here_too():
    ending = ANTHROPIC.whole(MESSAGES, recording("llamacpp/err-ctx-exceeded-messages").body)
    assert ending.how == "error"
    assert "exceeds the available context size" in (ending.message or "")
