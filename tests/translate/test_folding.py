"""llama-server's streams folded to its own bodies: recordings byte by byte, made-up ones, broken ones."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd_node.protocol.framing import Records
from herd_node.translate import Call, Reader, Truncated, fold
from tests.fakes.recordings import recording

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
DONE = b"[DONE]"


def call(path: str, body: bytes) -> Call:
    made = fold(path, body, orjson.loads(body))
    assert made is not None
    assert (made.stream, made.sse, made.path) == (False, True, path)
    return made


def reader(path: str = CHAT) -> Reader:
    return call(path, b'{"model":"m"}').reader


def run(to: Reader, payloads: Iterable[bytes]) -> dict[str, Any]:
    assert b"".join(to.feed(payload, wall_s=0, elapsed_s=0) for payload in payloads) == b""
    return orjson.loads(to.end(wall_s=0, elapsed_s=0))


def folded(name: str, path: str, size: int = 1) -> dict[str, Any]:
    """A whole recorded body in pieces of `size` bytes."""
    body, records = recording(f"llamacpp/{name}").body, Records("sse")
    payloads = [payload for at in range(0, len(body), size) for payload in records.feed(body[at : at + size])]
    return run(reader(path), payloads)


def chunk(finish: str | None = None, index: int = 0, **delta: object) -> bytes:
    return orjson.dumps({"choices": [{"finish_reason": finish, "index": index, "delta": delta}]})


# ---- what is sent


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (b'{"model":"m"}', b'{"stream_options":{"include_usage":true},"stream":true,"model":"m"}'),
        (
            b' {"a":1e0, "stream" : false,"b":"\\u00fc"} ',
            b' {"stream_options":{"include_usage":true},"a":1e0, "stream" : true,"b":"\\u00fc"} ',
        ),
        (
            b'{"stream":null,"stream_options":{"include_usage":false},"x":[{"stream":false}]}',
            b'{"stream":true,"stream_options":{"include_usage":true},"x":[{"stream":false}]}',
        ),
        (b'{"stream":0}', b'{"stream_options":{"include_usage":true},"stream":true}'),
    ],
)
def test_the_body_is_edited_and_never_written_anew(body: bytes, sent: bytes) -> None:
    got = call(CHAT, body).body
    assert orjson.loads(got) == orjson.loads(sent)
    assert sorted(got) == sorted(sent)


def test_of_two_fields_the_last_one_counts_as_it_does_for_the_server() -> None:
    assert orjson.loads(call(CHAT, b'{"stream":true,"stream":false,"n":2}').body) == {
        "stream": True,
        "n": 2,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize("path", [TEXT, "/v1/responses", "/v1/messages"])
def test_only_a_chat_must_ask_for_its_usage(path: str) -> None:
    assert call(path, b'{"model":"m"}').body == b'{"stream":true,"model":"m"}'


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank", "/v1/models"])
def test_what_never_streams_is_left_alone(path: str) -> None:
    assert fold(path, b'{"model":"m"}', {"model": "m"}) is None


def test_a_stream_is_left_alone() -> None:
    assert fold(CHAT, b'{"stream":true}', {"stream": True}) is None


# ---- recordings


def without_counts(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in ("id", "created", "timings", "usage")}


@pytest.mark.parametrize(
    ("stream", "whole", "path"),
    [
        ("chat-stream-usage", "chat", CHAT),
        ("reasoning-stream", "reasoning", CHAT),
        ("chat-logprobs-stream", "chat-logprobs", CHAT),
    ],
)
def test_a_recorded_stream_folds_to_the_recorded_body(stream: str, whole: str, path: str) -> None:
    ours, theirs = folded(stream, path), orjson.loads(recording(f"llamacpp/{whole}").body)
    assert without_counts(ours) == without_counts(theirs)
    assert ours == folded(stream, path, size=10_000)
    if stream == "chat-stream-usage":
        assert list(ours) == list(theirs)
        assert ours["usage"].keys() == theirs["usage"].keys()
        assert ours["timings"].keys() == theirs["timings"].keys()


def test_a_recorded_text_completion_folds_to_its_shape() -> None:
    ours, theirs = (
        folded("v1-completions-stream", TEXT),
        orjson.loads(recording("llamacpp/v1-completions").body),
    )
    assert list(ours) == list(theirs)
    assert list(ours["choices"][0]) == list(theirs["choices"][0])
    assert ours["choices"][0] | {"text": ""} == theirs["choices"][0] | {"text": ""}
    assert ours["choices"][0]["text"] == " a canvas of"
    assert ours["usage"]["completion_tokens"] == 3


def test_recorded_messages_and_responses_fold_to_their_bodies() -> None:
    message = folded("messages-stream", "/v1/messages")
    assert (message["type"], message["role"], message["stop_reason"] is None) == (
        "message",
        "assistant",
        False,
    )
    assert [block["type"] for block in message["content"]] == ["text"]
    assert message["content"][0]["text"]
    assert message["usage"].keys() >= {"input_tokens", "output_tokens"}
    response = folded("responses-stream", "/v1/responses")
    assert (response["object"], response["status"]) == ("response", "completed")
    assert response["output"][0]["content"][0]["text"]
    assert response["completed_at"] == response["created_at"]


# ---- the parts


def begun(index: int, call_id: str, name: str) -> dict[str, Any]:
    return {
        "index": index,
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": "{}"},
    }


def test_tool_calls_are_joined_by_index() -> None:
    pieces = [
        chunk(role="assistant", content=None),
        chunk(tool_calls=[{**begun(0, "a", "f"), "function": {"name": "f", "arguments": ""}}]),
        chunk(tool_calls=[begun(1, "b", "g")]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"c":'}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": "1}"}}]),
        chunk("tool_calls"),
        DONE,
    ]  # fmt: skip
    (choice,) = run(reader(), pieces)["choices"]
    assert choice == {
        "finish_reason": "tool_calls",
        "index": 0,
        "message": {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": '{"c":1}'}, "id": "a"},
                {"type": "function", "function": {"name": "g", "arguments": "{}"}, "id": "b"},
            ],
        },
    }
    assert list(choice["message"]["tool_calls"][0]) == ["type", "function", "id"]


def test_choices_are_told_apart_and_the_first_one_counts() -> None:
    usage = [
        orjson.dumps({"choices": [], "usage": {"of": n}, "timings": {"of": n}, "id": "x"}) for n in (1, 0)
    ]
    pieces = [
        chunk(index=1, content="b"),
        chunk(index=0, content="a"),
        chunk("length", 1),
        usage[0],
        chunk(index=0, content="A"),
        chunk("stop", 0),
        usage[1],
        DONE,
    ]
    body = run(reader(), pieces)
    assert [(one["index"], one["message"]["content"], one["finish_reason"]) for one in body["choices"]] == [
        (0, "aA", "stop"),
        (1, "b", "length"),
    ]
    assert (body["usage"], body["timings"]) == ({"of": 0}, {"of": 0})


def test_fields_that_nobody_knows_survive() -> None:
    first = {"choices": [{"index": 0, "delta": {"content": "x", "mood": "go", "parts": [1]}}], "tier": "a"}
    second = {"choices": [{"index": 0, "delta": {"mood": "od", "parts": [2], "level": 3}}], "tier": "b"}
    body = run(reader(), [orjson.dumps(first), orjson.dumps(second), b"null", chunk("stop"), DONE])
    message = {"role": "assistant", "content": "x", "mood": "good", "parts": [1, 2], "level": 3}
    assert (body["choices"][0]["message"], body["tier"]) == (message, "b")


def grown(index: int, kind: str, **delta: object) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": {"type": kind, **delta}}


def block(index: int, **content: object) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": content}


def test_messages_grow_by_their_deltas() -> None:
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {"id": "x", "usage": {"input_tokens": 3, "output_tokens": 0}}},
        block(0, type="thinking", thinking=""),
        grown(0, "thinking_delta", thinking="hm"),
        grown(0, "signature_delta", signature="s"),
        block(1, type="tool_use", id="t", input={}),
        grown(1, "input_json_delta", partial_json='{"a"'),
        grown(1, "input_json_delta", partial_json=":1}"),
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}},
        {"type": "message_stop"},
    ]
    body = run(reader("/v1/messages"), map(orjson.dumps, events))
    assert body["content"] == [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "tool_use", "id": "t", "input": {"a": 1}},
    ]
    assert (body["stop_reason"], body["usage"]) == ("tool_use", {"input_tokens": 3, "output_tokens": 9})


# ---- ends that are none


@pytest.mark.parametrize(
    "payloads",
    [
        [],
        [chunk(content="a")],
        [chunk(content="a"), DONE],
        [chunk("stop")],
        [chunk("stop"), chunk(index=1, content="b"), DONE],
        [DONE],
    ],
)
def test_without_finish_and_mark_it_is_cut_off(payloads: list[bytes]) -> None:
    with pytest.raises(Truncated):
        run(reader(), payloads)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
def test_an_event_stream_without_its_last_event_is_cut_off(path: str) -> None:
    with pytest.raises(Truncated):
        run(reader(path), [b'{"type":"message_start","message":{}}', b'{"type":"response.created"}'])


@pytest.mark.parametrize("name", ["kill9-mid-stream", "router-child-killed-mid-stream"])
def test_a_recorded_cut_is_never_complete(name: str) -> None:
    with pytest.raises(Truncated):
        folded(name, CHAT, size=64)


def test_an_error_in_the_middle_is_the_answer_with_its_own_status() -> None:
    error = b'{"error":{"code":500,"message":"oops","type":"server_error"}}'
    for payload, status in ((error, 500), (error.replace(b"oops", b"[json.exception.x] y"), 400)):
        to = reader()
        body = run(to, [chunk(content="a"), payload, chunk("stop"), DONE])
        assert (to.status, body["error"]["code"]) == (status, status)
        assert body["error"]["message"] == orjson.loads(payload)["error"]["message"]


@pytest.mark.parametrize(
    ("name", "status"),
    [("err-ctx-exceeded", 400), ("chat-image-unsupported", 400), ("chat-loading-503", 503)],
)
def test_a_refusal_keeps_its_body(name: str, status: int) -> None:
    recorded = recording(f"llamacpp/{name}")
    answered, body = reader().whole(recorded.status, recorded.body, elapsed_s=0)
    ours, theirs = orjson.loads(body)["error"], orjson.loads(recorded.body)["error"]
    assert (answered, ours["message"], ours["code"]) == (status, theirs["message"], status)
    assert (body == recorded.body) is (recorded.status == status)


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first text builds hypothesis' character table
@given(pieces=st.lists(st.text(), max_size=6), data=st.data())
def test_any_text_survives_any_split_of_the_bytes(pieces: list[str], data: st.DataObject) -> None:
    payloads = [*(chunk(content=piece) for piece in pieces), chunk("stop"), DONE]
    body = b"".join(b"data: " + payload + b"\n\n" for payload in payloads)
    size = data.draw(st.integers(1, len(body)))
    records = Records("sse")
    split = [payload for at in range(0, len(body), size) for payload in records.feed(body[at : at + size])]
    assert run(reader(), split)["choices"][0]["message"]["content"] == "".join(pieces)


KEYS = ["choices", "delta", "content", "tool_calls", "function", "index", "text", "logprobs"]
KEYS += ["type", "response"]
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(
    st.lists(anything, max_size=5),
    st.sampled_from([CHAT, TEXT, "/v1/responses", "/v1/messages"]),
)
def test_a_stream_of_any_shape_is_folded_or_cut_off(events: list[Any], path: str) -> None:
    with suppress(Truncated):
        assert isinstance(run(reader(path), [*map(orjson.dumps, events), DONE]), dict)


def test_a_message_whose_opening_was_forgotten_is_still_a_message() -> None:
    events = [
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 1}},
        {"type": "message_stop"},
    ]
    call = fold("/v1/messages", b'{"model":"m"}', {"model": "m"})
    assert call is not None
    body = run(call.reader, map(orjson.dumps, events))
    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "m")
    assert body["content"] == [{"type": "text", "text": "x"}]
    assert (body["stop_reason"], body["usage"]["output_tokens"]) == ("end_turn", 1)
