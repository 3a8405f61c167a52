"""Answers that do not stream: when they are complete, and what they say about themselves."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.dialects import DIALECT_BY_PATH, Ending, dialect_of
from herd_node.protocol.routes import FORWARDED, FORWARDED_BY_PATH, Route
from tests.fakes.recordings import recording


def whole(path: str, body: bytes) -> Ending:
    route = FORWARDED_BY_PATH[path]
    return DIALECT_BY_PATH[path].whole(route, body)


@pytest.mark.parametrize(
    ("name", "path", "finish"),
    [
        ("llamacpp/chat", "/v1/chat/completions", "stop"),
        ("llamacpp/reasoning", "/v1/chat/completions", "stop"),
        ("llamacpp/v1-completions", "/v1/completions", "length"),
        ("llamacpp/embeddings", "/v1/embeddings", None),
        ("llamacpp/embeddings-two", "/v1/embeddings", None),
        ("ollama/v1-chat", "/v1/chat/completions", "stop"),
        ("ollama/v1-completions", "/v1/completions", "length"),
        ("ollama/v1-embeddings", "/v1/embeddings", None),
        ("ollama/chat", "/api/chat", "stop"),
        ("ollama/chat-tools-nostream", "/api/chat", "stop"),
        ("ollama/chat-empty-load", "/api/chat", "load"),
        ("ollama/generate", "/api/generate", "length"),
        ("ollama/embed", "/api/embed", None),
        ("ollama/embed-empty-list", "/api/embed", None),
        ("ollama/embeddings", "/api/embeddings", None),
        ("ollama/show", "/api/show", None),
        ("llamacpp/responses", "/v1/responses", "stop"),
        ("ollama/v1-responses", "/v1/responses", "stop"),
        ("ollama/v1-responses-tools", "/v1/responses", "stop"),
        ("llamacpp/messages", "/v1/messages", "max_tokens"),
        ("ollama/v1-messages", "/v1/messages", "max_tokens"),
        ("ollama/v1-messages-tools", "/v1/messages", "tool_use"),
        ("llamacpp/messages-count-tokens", "/v1/messages/count_tokens", None),
    ],
)
def test_a_recorded_answer_is_complete(name: str, path: str, finish: str | None):
    body = recording(name).body
    ending = whole(path, body)
    assert (ending.how, ending.finish_reason, ending.no_output) == ("complete", finish, False)
    if path not in ("/api/show", "/api/embeddings") and name not in (
        "ollama/embed-empty-list",
        "ollama/chat-empty-load",
    ):
        assert ending.prompt_tokens


@pytest.mark.parametrize(
    "path", [route.path for route in FORWARDED if route.kind not in ("show", "transcription")]
)
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"null", b"{}", b"<html>", b"\xff"])
def test_anything_else_is_truncated(path: str, body: bytes):
    ending = whole(path, body)
    assert ending.how == "truncated"


@pytest.mark.parametrize("path", [route.path for route in FORWARDED])
def test_an_error_with_status_200_is_an_error(path: str):
    for body in (b'{"error":"the cause"}', b'{"error":{"message":"the cause"}}'):
        ending = whole(path, body)
        assert (ending.how, ending.message) == ("error", "the cause")


@pytest.mark.parametrize("path", [route.path for route in FORWARDED if route.kind != "transcription"])
def test_half_an_answer_is_no_answer(path: str):
    stems = {
        "/v1/chat/completions": "llamacpp/chat",
        "/api/chat": "ollama/chat",
        "/api/embed": "ollama/embed",
        "/v1/messages": "llamacpp/messages",
        "/v1/responses": "llamacpp/responses",
    }
    body = recording(stems.get(path, "ollama/generate")).body
    assert whole(path, body[: len(body) // 2]).how == "truncated"


def test_a_choice_without_a_finish_reason_is_truncated():
    value = orjson.loads(recording("llamacpp/chat").body)
    for reason in (None, "", 7):
        value["choices"][0]["finish_reason"] = reason
        assert whole("/v1/chat/completions", orjson.dumps(value)).how == "truncated"
    value["choices"] = []
    assert whole("/v1/chat/completions", orjson.dumps(value)).how == "truncated"


def test_ollamas_stop_on_a_repeated_token_is_known():
    body = b'{"model":"m","response":"\\n\\n","done":false}'
    assert whole("/api/generate", body).how == "repeat_abort"


def test_embeddings_are_never_without_output():
    usage = {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3}
    ending = whole("/v1/embeddings", orjson.dumps({"data": [], "usage": usage}))
    assert (ending.how, ending.no_output, ending.prompt_tokens) == ("complete", False, 3)


_KEYS = ["choices", "usage", "timings", "data", "embeddings", "embedding", "done", "done_reason", "error"]
_KEYS += ["finish_reason", "prompt_tokens", "prompt_n", "cache_n", "eval_count", "message", "object"]
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=5),
    max_leaves=15,
)


@given(route=st.sampled_from(FORWARDED), value=_VALUES)
def test_nothing_that_a_backend_answers_makes_it_fall_over(route: Route, value: object):
    ending = dialect_of(route).whole(route, orjson.dumps(value))
    assert ending.how in ("complete", "repeat_abort", "truncated", "error")
    for number in (ending.prompt_tokens, ending.cached_tokens, ending.completion_tokens):
        assert number is None or (isinstance(number, int) and number >= 0)
