"""llama-server's streams, as Ollama's lines: recorded ones byte by byte, broken ones, and any text at all."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from herd_node.protocol.framing import Records
from herd_node.translate import Call, ModelFacts, Reader, Truncated, translate
from tests.fakes.recordings import recording

FACTS = ModelFacts(name="smollm2:135m", upstream_id="x", capabilities=frozenset({"completion", "tools"}))
WALL_S = 1795403355.25
DONE = b"[DONE]"


def reader(path: str = "/api/chat", *, stream: bool = True) -> Reader:
    prompt = {"prompt": "x"} if path == "/api/generate" else {"messages": [{"role": "user", "content": "x"}]}
    call = translate(path, orjson.dumps({"model": "Asked:Name", "stream": stream, **prompt}), FACTS)
    assert isinstance(call, Call)
    return call.reader


def chunk(finish: str | None = None, **delta: object) -> bytes:
    return orjson.dumps({"choices": [{"finish_reason": finish, "index": 0, "delta": delta}]})


def run(to: Reader, payloads: list[bytes], *, end: bool = True) -> bytes:
    out = b"".join(to.feed(payload, wall_s=WALL_S, elapsed_s=0.5) for payload in payloads)
    return out + to.end(elapsed_s=0.5, wall_s=WALL_S) if end else out


def objects(out: bytes) -> list[dict]:
    assert out.endswith(b"\n")
    return [orjson.loads(line) for line in out.splitlines()]


def translated(body: bytes, size: int, path: str, *, stream: bool = True) -> bytes:
    """A whole recorded body through framing and reader, in pieces of `size` bytes."""
    records = Records("sse")
    to = reader(path, stream=stream)
    payloads = [payload for at in range(0, len(body), size) for payload in records.feed(body[at : at + size])]
    return run(to, payloads)


def shape(value: object) -> object:
    """The keys in their order and the type of each value."""
    if isinstance(value, dict):
        return [(key, shape(inner)) for key, inner in value.items()]
    return type(value).__name__


#: Ours has no load_duration (the model is always loaded) and no context (ids are the tokenizer's own).
NOT_OURS = ("load_duration", "context")


def ollama_shape(value: dict) -> object:
    return shape({key: inner for key, inner in value.items() if key not in NOT_OURS})


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize("name", ["chat-stream", "chat-stream-usage"])
def test_a_recorded_chat_stream_has_ollamas_shape(name: str, size: int) -> None:
    ours = objects(translated(recording(f"llamacpp/{name}").body, size, "/api/chat"))
    theirs = [orjson.loads(line) for line in recording("ollama/chat-stream").body.splitlines()]
    assert [shape(line) for line in ours] == [ollama_shape(line) for line in theirs]
    assert [line["message"]["content"] for line in ours] == ["One", " colour", " is", " blue", ".", ""]
    assert {line["model"] for line in ours} == {"Asked:Name"}
    assert {line["created_at"] for line in ours} == {"2026-11-23T03:09:15.25Z"}


def test_the_timings_become_ollamas_counters_in_nanoseconds() -> None:
    last = objects(translated(recording("llamacpp/chat-stream").body, 4096, "/api/chat"))[-1]
    assert {key: last[key] for key in list(last)[3:]} == {
        "done": True,
        "done_reason": "stop",
        "total_duration": 500_000_000,
        "prompt_eval_count": 22,
        "prompt_eval_duration": 32_995_000,
        "eval_count": 6,
        "eval_duration": 147_978_000,
    }


@pytest.mark.parametrize("name", ["chat", "generate"])
def test_a_folded_answer_has_the_shape_of_ollamas_own(name: str) -> None:
    body = translated(recording("llamacpp/chat-stream").body, 100, f"/api/{name}", stream=False)
    ours, theirs = orjson.loads(body), orjson.loads(recording(f"ollama/{name}").body)
    assert shape(ours) == ollama_shape(theirs)
    text = ours["message"]["content"] if name == "chat" else ours["response"]
    assert text == "One colour is blue."


def test_a_generate_stream_has_ollamas_shape() -> None:
    ours = objects(translated(recording("llamacpp/chat-stream").body, 13, "/api/generate"))
    theirs = [orjson.loads(line) for line in recording("ollama/generate-stream").body.splitlines()]
    assert shape(ours[0]) == ollama_shape(theirs[0])
    assert shape(ours[-1]) == ollama_shape(theirs[-1])


def test_thoughts_stand_beside_the_content() -> None:
    body = recording("llamacpp/reasoning-stream").body
    ours = objects(translated(body, 1, "/api/chat"))
    theirs = [orjson.loads(line) for line in recording("ollama/chat-think-default").body.splitlines()]
    assert shape(ours[0]) == ollama_shape(theirs[0])
    assert "".join(line["message"].get("thinking", "") for line in ours) == "hm\n"
    assert "".join(line["message"]["content"] for line in ours) == "hi"
    folded = orjson.loads(translated(body, 50, "/api/chat", stream=False))
    assert shape(folded) == ollama_shape(orjson.loads(recording("ollama/chat-think-nostream").body))
    generated = objects(translated(body, 50, "/api/generate"))
    assert list(generated[0])[2:4] == ["response", "thinking"]


def test_a_full_context_ends_with_length() -> None:
    body = recording("llamacpp/ctx-filled-by-generation-stream").body
    assert objects(translated(body, 1000, "/api/chat"))[-1]["done_reason"] == "length"


def test_tool_calls_come_whole_in_one_line_before_the_last() -> None:
    pieces = [
        chunk(role="assistant", content=None),
        chunk(tool_calls=[{"index": 0, "id": "a", "function": {"name": "get_weather", "arguments": ""}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '{"city":'}}]),
        chunk(tool_calls=[{"index": 1, "id": "b", "function": {"name": "other", "arguments": "{}"}}]),
        chunk(tool_calls=[{"index": 0, "function": {"arguments": '"Oslo"}'}}]),
        chunk("tool_calls"),
    ]  # fmt: skip
    to = reader()
    assert run(to, pieces, end=False) == b""
    assert to.content_started
    line, last = objects(run(to, [DONE]))
    recorded = [orjson.loads(text) for text in recording("ollama/chat-tools").body.splitlines()]
    assert shape(line) == ollama_shape(recorded[0])
    first, second = line["message"]["tool_calls"]
    assert first == {
        "id": "a",
        "function": {"index": 0, "name": "get_weather", "arguments": {"city": "Oslo"}},
    }
    assert second["function"] == {"index": 1, "name": "other", "arguments": {}}
    assert (last["done_reason"], last["message"]) == ("stop", {"role": "assistant", "content": ""})
    folded = orjson.loads(run(reader(stream=False), [*pieces, DONE]))
    assert folded["message"]["tool_calls"] == line["message"]["tool_calls"]
    assert shape(folded) == ollama_shape(
        {
            key: value
            for key, value in orjson.loads(recording("ollama/chat-tools-nostream").body).items()
            if key in folded
        }
    )


def test_a_tool_call_cut_by_the_length_goes_out_as_text() -> None:
    cut = chunk(tool_calls=[{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"ci'}}])
    line, last = objects(run(reader(), [cut, chunk("length"), DONE]))
    assert line["message"] == {"role": "assistant", "content": '{"ci'}
    assert last["done_reason"] == "length"


def test_counters_that_are_zero_are_left_out_as_ollama_does() -> None:
    last = objects(run(reader(), [chunk(content="x"), chunk("stop"), DONE]))[-1]
    assert list(last) == ["model", "created_at", "message", "done", "done_reason", "total_duration"]


def test_usage_stands_in_for_missing_timings() -> None:
    usage = orjson.dumps({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})
    last = objects(run(reader(), [chunk("stop"), usage, DONE]))[-1]
    assert (last["prompt_eval_count"], last["eval_count"]) == (5, 2)


def test_waiting_for_the_backend_is_load_duration() -> None:
    to = reader()
    to.load_s = 0.25
    last = objects(run(to, [chunk("stop"), DONE]))[-1]
    assert list(last)[5:7] == ["total_duration", "load_duration"]
    assert last["load_duration"] == 250_000_000


def test_a_finish_without_done_mark_is_complete() -> None:
    assert objects(run(reader(), [chunk(content="x"), chunk("stop")]))[-1]["done"] is True


@pytest.mark.parametrize("name", ["kill9-mid-stream", "router-child-killed-mid-stream"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_cut_short_is_truncated_never_complete(name: str, stream: bool) -> None:
    with pytest.raises(Truncated):
        translated(recording(f"llamacpp/{name}").body, 64, "/api/chat", stream=stream)


def test_a_done_mark_alone_is_no_finish() -> None:
    with pytest.raises(Truncated):
        run(reader(), [chunk(content="x"), DONE])


@pytest.mark.parametrize("payload", [b"proxy error", b"[1]", b"7", b'{"choices":'])
def test_what_is_no_chunk_breaks_the_answer_off(payload: bytes) -> None:
    with pytest.raises(Truncated):
        run(reader(), [payload])


@pytest.mark.parametrize(
    "payload",
    [
        b"{}",
        b'{"choices":7}',
        b'{"choices":[7]}',
        b'{"choices":[{"delta":7}]}',
        b'{"choices":[{"delta":{"content":7,"tool_calls":[7]}}]}',
        b'{"choices":[{"delta":{"tool_calls":7}}],"timings":7,"usage":[]}',
    ],
)
def test_a_chunk_of_another_shape_says_nothing(payload: bytes) -> None:
    assert run(reader(), [payload], end=False) == b""


def test_an_error_before_the_first_token_has_its_own_status() -> None:
    error = b'{"error":{"code":503,"message":"Loading model","type":"unavailable_error"}}'
    for stream in (True, False):
        to = reader(stream=stream)
        assert orjson.loads(run(to, [error, DONE])) == {"error": "Loading model"}
        assert (to.status, to.content_started) == (503, False)


def test_an_error_in_the_middle_is_one_line_and_the_end() -> None:
    to = reader()
    error = b'{"error":{"code":500,"message":"oops","type":"server_error"}}'
    recorded = recording("ollama/kill9-child-stream").body.splitlines()[-1]
    *_, last = objects(run(to, [chunk(content="a"), error, chunk(content="b"), chunk("stop"), DONE]))
    assert shape(last) == shape(orjson.loads(recorded))
    assert (last, to.status) == ({"error": "oops"}, 200)


def test_an_error_in_the_middle_spoils_a_folded_answer() -> None:
    to = reader(stream=False)
    error = b'{"error":{"code":500,"message":"oops","type":"server_error"}}'
    assert orjson.loads(run(to, [chunk(content="a"), error])) == {"error": "oops"}
    assert to.status == 500


def test_an_error_body_goes_through_whole() -> None:
    recorded = recording("llamacpp/err-ctx-exceeded-stream")
    status, body = reader().whole(recorded.status, recorded.body, elapsed_s=0.1)
    message = "request (3031 tokens) exceeds the available context size (1024 tokens), try increasing it"
    assert (status, orjson.loads(body)) == (400, {"error": message})


@pytest.mark.parametrize("status", [200, 204, 302])
def test_an_answer_that_is_no_stream_is_the_backends_failure(status: int) -> None:
    answered, body = reader().whole(status, b'{"choices":[]}', elapsed_s=0.1)
    assert (answered, list(orjson.loads(body))) == (502, ["error"])


@settings(suppress_health_check=[HealthCheck.too_slow])  # the first text builds hypothesis' character table
@given(pieces=st.lists(st.text(), max_size=6), data=st.data())
def test_any_text_survives_any_split_of_the_bytes(pieces: list[str], data: st.DataObject) -> None:
    payloads = [*(chunk(content=piece) for piece in pieces), chunk("stop"), DONE]
    body = b"".join(b"data: " + payload + b"\n\n" for payload in payloads)
    size = data.draw(st.integers(1, len(body)))
    out = translated(body, size, "/api/chat")
    assert "".join(line["message"]["content"] for line in objects(out)) == "".join(pieces)
    assert out == translated(body, len(body), "/api/chat")
    folded = orjson.loads(translated(body, size, "/api/generate", stream=False))
    assert folded["response"] == "".join(pieces)
