"""The watch over a stream: recordings whole, byte by byte and in any pieces, good ones and broken ones."""

from __future__ import annotations

import time
from itertools import pairwise

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd.dialects import ANTHROPIC, OLLAMA, OPENAI, RESPONSES, Dialect, Ending, StreamWatch, Verdict
from tests.fakes.recordings import recording

DIALECTS = {"openai": OPENAI, "ollama": OLLAMA, "anthropic": ANTHROPIC, "responses": RESPONSES}

#: recording, dialect, finish reason, prompt tokens, completion tokens
GOOD: list[tuple[str, Dialect, str, int | None, int | None]] = [
    ("llamacpp/chat-stream", OPENAI, "stop", 22, 6),
    ("llamacpp/chat-stream-usage", OPENAI, "stop", 22, 6),
    ("llamacpp/v1-completions-stream", OPENAI, "length", 3, 3),
    ("llamacpp/reasoning-stream", OPENAI, "stop", 12, 22),
    ("llamacpp/prefill-stream-pings", OPENAI, "stop", 931, 1),
    ("llamacpp/ctx-filled-by-generation-stream", OPENAI, "length", 35, 221),
    ("ollama/v1-chat-stream", OPENAI, "stop", None, None),
    ("ollama/v1-chat-stream-usage", OPENAI, "length", 22, 3),
    ("ollama/v1-completions-stream", OPENAI, "length", 12, 3),
    ("ollama/chat-stream", OLLAMA, "stop", 22, 6),
    ("ollama/generate-stream", OLLAMA, "length", 12, 8),
    ("ollama/chat-tools", OLLAMA, "stop", 192, 32),
    ("ollama/chat-think-default", OLLAMA, "stop", 94, 22),
    ("llamacpp/messages-stream", ANTHROPIC, "max_tokens", 34, 4),
    ("llamacpp/reasoning-messages-stream", ANTHROPIC, "max_tokens", 12, 30),
    ("ollama/v1-messages-stream", ANTHROPIC, "max_tokens", 13, 3),
    ("ollama/v1-messages-think", ANTHROPIC, "end_turn", 94, 22),
    ("ollama/v1-messages-tools-stream", ANTHROPIC, "tool_use", 192, 32),
    ("llamacpp/responses-stream", RESPONSES, "stop", 34, 4),
    ("ollama/v1-responses-stream", RESPONSES, "stop", 13, 3),
]
NAMES = [name for name, *_ in GOOD]


def watch_all(dialect: Dialect, pieces: list[bytes]) -> tuple[bytes, Ending, StreamWatch]:
    """What is forwarded of a body that comes in these pieces and then ends properly."""
    watch = StreamWatch(dialect)
    out = [watch.feed(piece) for piece in pieces]
    tail, ending = watch.finish()
    return b"".join(out) + tail, ending, watch


def bytes_of(body: bytes) -> list[bytes]:
    return [body[at : at + 1] for at in range(len(body))]


@pytest.mark.parametrize(("name", "dialect", "finish", "prompt", "completion"), GOOD)
def test_a_good_stream_passes_whole_and_byte_by_byte(
    name: str, dialect: Dialect, finish: str, prompt: int | None, completion: int | None
):
    body = recording(name).body
    for pieces in ([body], bytes_of(body)):
        out, ending, watch = watch_all(dialect, pieces)
        assert out == body
        assert (ending.how, ending.finish_reason) == ("complete", finish)
        assert (ending.prompt_tokens, ending.completion_tokens) == (prompt, completion)
        assert watch.ended


def whole_records(dialect: Dialect, forwarded: bytes) -> bool:
    return not forwarded or forwarded.endswith(b"\n" if dialect is OLLAMA else b"\n\n")


@given(name=st.sampled_from(NAMES), cuts=st.lists(st.integers(0, 6000), max_size=12))
def test_any_split_passes_and_what_has_passed_is_always_whole_records(name: str, cuts: list[int]):
    dialect = next(row[1] for row in GOOD if row[0] == name)
    body = recording(name).body
    places = [0, *sorted(cut % len(body) for cut in cuts), len(body)]
    watch, out = StreamWatch(dialect), b""
    for start, end in pairwise(places):
        out += watch.feed(body[start:end])
        assert body.startswith(out)
        assert whole_records(dialect, out)
    tail, ending = watch.finish()
    assert (out + tail, ending.how) == (body, "complete")


@pytest.mark.parametrize(("name", "dialect"), [row[:2] for row in GOOD])
@pytest.mark.parametrize("records_a_chunk", [1, 2, 3, 7])
def test_records_that_come_whole_are_seen_as_those_that_come_in_bytes(
    name: str, dialect: Dialect, records_a_chunk: int
):
    body = recording(name).body
    end = b"\n" if dialect is OLLAMA else b"\n\n"
    records = [record + end for record in body.removesuffix(end).split(end)]
    chunks = [b"".join(records[at : at + records_a_chunk]) for at in range(0, len(records), records_a_chunk)]
    out, ending, watch = watch_all(dialect, chunks)
    slow_out, slow_ending, slow = watch_all(dialect, bytes_of(body))
    assert (out, ending, watch.last) == (slow_out, slow_ending, slow.last)
    for at in range(1, len(chunks)):
        watch, slow = StreamWatch(dialect), StreamWatch(dialect)
        assert b"".join(map(watch.feed, chunks[:at])) == b"".join(
            map(slow.feed, bytes_of(b"".join(chunks[:at])))
        )
        assert (watch.last, watch.content_seen, watch.ended) == (slow.last, slow.content_seen, slow.ended)
        if at > 40:
            break


_SEVERAL = {
    "sse": [
        b"data: %b\n\n",
        b"data:%b\n\n",
        b"data: %b\r\n\r\n",
        b"event: x\ndata: %b\n\n",
        b": c\n\ndata: %b\n\n",
    ],
    "ndjson": [b"%b\n", b"%b\r\n", b"\n%b\n", b" %b\n"],
}


def usual(dialect: Dialect) -> bytes:
    """How the dialect writes a plain record."""
    named = b"event: %b\n" % dialect.event if dialect.event else b""
    return named + _SEVERAL[dialect.framing][0]


@pytest.mark.parametrize("name", ["anthropic", "responses"])
def test_the_named_event_that_is_passed_unread_is_the_one_that_comes(name: str):
    """Else each of them would be taken apart."""
    dialect = DIALECTS[name]
    record = dialect.frame(WORDS[name]("a"))
    assert record.startswith(b"event: %b\ndata: {" % dialect.event)
    watch = StreamWatch(dialect)
    watch.feed(record)
    assert watch.content_seen
    for records in (record, 3 * record):
        assert watch.feed(records) is records
    assert watch.last[-1] == WORDS[name]("a")


@given(data=st.data(), name=st.sampled_from(["openai", "ollama", "anthropic", "responses"]))
def test_plain_records_are_seen_the_same_whatever_stands_beside_them(data: st.DataObject, name: str):
    """Runs of plain records pass without being taken apart; anything else among them must not."""
    dialect = DIALECTS[name]
    kinds = st.tuples(
        st.sampled_from([WORDS[name]("a"), WORDS[name]('"error"'), b'{"error":"no"}', b"7", *ENDS[name]]),
        st.sampled_from([usual(dialect)] * 4 + _SEVERAL[dialect.framing]),
    )
    records = [form % value for value, form in data.draw(st.lists(kinds, max_size=8))]
    records.insert(0, dialect.frame(WORDS[name]("first")))
    size = data.draw(st.integers(1, 4))
    watch, slow = StreamWatch(dialect), StreamWatch(dialect)
    for at in range(0, len(records), size):
        chunk_ = b"".join(records[at : at + size])
        out, slow_out = watch.feed(chunk_), b"".join(map(slow.feed, bytes_of(chunk_)))
        assert watch.failed == slow.failed
        assert (watch.last, watch.content_seen, watch.ended) == (slow.last, slow.content_seen, slow.ended)
        if b"\r" not in chunk_ and not watch.failed and not watch.ended:
            assert out == slow_out == chunk_


@given(cuts=st.lists(st.integers(0, 3000), max_size=10), ends=st.sampled_from([b"\r\n", b"\r"]))
def test_sse_with_other_line_ends_is_cut_at_records_too(cuts: list[int], ends: bytes):
    body = recording("llamacpp/chat-stream").body.replace(b"\n", ends)
    places = [0, *sorted(cut % len(body) for cut in cuts), len(body)]
    watch, out = StreamWatch(OPENAI), b""
    for start, end in pairwise(places):
        out += watch.feed(body[start:end])
        assert body.startswith(out)
        # the LF of a last CRLF may still be on its way
        assert not out or out.endswith((ends + ends, b"\n\n", b"\r\n\r"))
    assert watch.ended
    assert out in (body, body.removesuffix(b"\n"))


@pytest.mark.parametrize(
    ("name", "dialect", "how", "message"),
    [
        ("ollama/kill9-child-stream", OLLAMA, "error", "an error was encountered while running the model"),
        ("ollama/kill9-child-v1-stream", OPENAI, "truncated", None),
        ("ollama/repeat-abort", OLLAMA, "repeat_abort", None),
        ("llamacpp/router-child-killed-mid-stream", OPENAI, "repeat_abort", None),
        ("llamacpp/kill9-mid-stream", OPENAI, "repeat_abort", None),
        ("ollama/kill9-child-v1-messages", ANTHROPIC, "truncated", None),
        ("ollama/kill9-child-v1-responses", RESPONSES, "truncated", None),
    ],
)
def test_a_broken_stream_is_known_for_what_it_is(name: str, dialect: Dialect, how: str, message: str | None):
    """Two of llama-server look like Ollama's stop on a repeated token: only an Ollama is believed that."""
    body = recording(name).body
    for pieces in ([body], bytes_of(body)):
        out, ending, watch = watch_all(dialect, pieces)
        assert ending.how == how
        assert message is None or message in (ending.message or "")
        assert not watch.ended
        assert body.startswith(out)
        assert whole_records(dialect, out)
        assert b'"error":{' not in out
        assert b'"error":"' not in out


def chunk(text: str, **more: object) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    value = {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": [choice]}
    return orjson.dumps(value | more)


def line(text: str, **more: object) -> bytes:
    return orjson.dumps(
        {"model": "m", "message": {"role": "assistant", "content": text}, "done": False} | more
    )


def delta(text: str, **more: object) -> bytes:
    said = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}
    return orjson.dumps(said | more)


def told(text: str, **more: object) -> bytes:
    return orjson.dumps({"type": "response.output_text.delta", "item_id": "m", "delta": text} | more)


STOP = [
    orjson.dumps({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {}}),
    b'{"type":"message_stop"}',
]
COMPLETED = orjson.dumps({"type": "response.completed", "response": {"status": "completed"}})
FINISH = chunk("", choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
DONE = line("", done=True, done_reason="stop", eval_count=3, prompt_eval_count=2)
WORDS = {"openai": chunk, "ollama": line, "anthropic": delta, "responses": told}
ENDS = {"openai": [FINISH, b"[DONE]"], "ollama": [DONE], "anthropic": STOP, "responses": [COMPLETED]}


def body_of(name: str, records: list[bytes]) -> bytes:
    return b"".join(map(DIALECTS[name].frame, records))


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize(
    ("bad", "verdict", "message"),
    [
        (b'{"error":"the cause"}', Verdict.ERROR, "the cause"),
        (b'{"error":{"code":500,"message":"the cause","type":"server_error"}}', Verdict.ERROR, "the cause"),
        (b'{"code":500,"error":{"message":"the cause"}}', Verdict.ERROR, "the cause"),
        (b'{"model":"broken', Verdict.MALFORMED, "cannot be read"),
        (b"<html>", Verdict.MALFORMED, "cannot be read"),
        (b"[1,2]", Verdict.MALFORMED, "cannot be read"),
        (b"7", Verdict.MALFORMED, "cannot be read"),
        (b"\xff\xfe", Verdict.MALFORMED, "cannot be read"),
    ],
)
def test_an_error_or_garbage_at_n_ends_the_stream_after_n_whole_records(
    name: str, at: int, bad: bytes, verdict: Verdict, message: str
):
    good = [WORDS[name](f"t{n}") for n in range(4)]
    before, body = body_of(name, good[:at]), body_of(name, [*good[:at], bad, *good[at:], *ENDS[name]])
    for pieces in ([body], bytes_of(body)):
        out, ending, watch = watch_all(DIALECTS[name], pieces)
        assert out == before
        assert (watch.failed, watch.content_seen) == (verdict, at > 0)
        assert ending.how == "error"
        assert message in (ending.message or "")


@pytest.mark.parametrize("name", DIALECTS)
def test_words_that_look_like_an_error_or_an_end_are_words(name: str):
    texts = [
        '{"error":"no"}',
        '"error"',
        '"done":true',
        "[DONE]",
        "data: [DONE]\n\n",
        '{"done": true}',
        "error",
    ]
    records = [WORDS[name](text) for text in texts]
    records.append(WORDS[name]("x", error=None))
    body = body_of(name, [*records, *ENDS[name]])
    out, ending, _ = watch_all(DIALECTS[name], bytes_of(body))
    assert (out, ending.how) == (body, "complete")


def test_a_tool_call_may_have_arguments_named_done_and_error():
    call = {"function": {"name": "f", "arguments": {"done": True, "error": "x"}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    body = body_of("ollama", [line("", message=message), line("", message=message), DONE])
    out, ending, _ = watch_all(OLLAMA, [body])
    assert (out, ending.how) == (body, "complete")


@pytest.mark.parametrize("name", DIALECTS)
def test_an_answer_has_one_end_and_nothing_behind_it(name: str):
    good = body_of(name, [WORDS[name]("a"), *ENDS[name]])
    for more in (body_of(name, ENDS[name]), body_of(name, [WORDS[name]("b")]), b"trash", good):
        for pieces in ([good + more], [good, more], bytes_of(good + more)):
            out, ending, watch = watch_all(DIALECTS[name], pieces)
            assert (out, ending.how, watch.ended) == (good, "complete", True)


@pytest.mark.parametrize("name", DIALECTS)
def test_silence_is_not_content(name: str):
    silent = {
        "openai": chunk("", choices=[]),
        "ollama": line(""),
        "anthropic": b'{"type":"ping"}',
        "responses": b'{"type":"response.created"}',
    }
    watch = StreamWatch(DIALECTS[name])
    watch.feed(body_of(name, [WORDS[name](""), silent[name]]))
    assert not watch.content_seen
    watch.feed(b"\n" if name == "ollama" else b": ping\n\n")
    assert not watch.content_seen
    watch.feed(body_of(name, [WORDS[name]("x")]))
    assert watch.content_seen


CONTENT = [
    chunk("", choices=[{"delta": {"role": "assistant", "reasoning_content": "x"}}]),
    chunk("", choices=[{"delta": {"reasoning": "x"}}]),
    chunk("", choices=[{"delta": {"tool_calls": [{"index": 0}]}}]),
    chunk("", choices=[{"text": "x"}]),
    chunk("", choices=[{"delta": {}, "finish_reason": "stop"}]),
    chunk("", choices=[{"delta": {}}, {"delta": {"content": "x"}}]),
]


ANTHROPIC_CONTENT = [
    b'{"type":"content_block_delta","delta":{"type":"thinking_delta","thinking":"x"}}',
    b'{"type":"content_block_delta","delta":{"type":"input_json_delta","partial_json":"{"}}',
    b'{"type":"content_block_start","content_block":{"type":"tool_use","name":"f","input":{}}}',
    b'{"type":"message_delta","delta":{"stop_reason":"end_turn"}}',
]


@pytest.mark.parametrize("record", ANTHROPIC_CONTENT)
def test_whatever_an_event_of_anthropics_says_is_content(record: bytes):
    assert ANTHROPIC.judge(record) is Verdict.CONTENT


@pytest.mark.parametrize(
    "record",
    [
        b'{"type":"response.function_call_arguments.delta","delta":"{"}',
        b'{"type":"response.reasoning_text.delta","delta":"x"}',
        b'{"type":"response.output_item.done","item":{}}',
    ],
)
def test_whatever_an_event_of_a_response_says_is_content(record: bytes):
    assert RESPONSES.judge(record) is Verdict.CONTENT


def test_a_response_that_failed_is_an_error_with_its_cause():
    failed = {"type": "response.failed", "response": {"status": "failed", "error": {"message": "the cause"}}}
    out, ending, _ = watch_all(RESPONSES, [body_of("responses", [told("a"), orjson.dumps(failed)])])
    assert (out, ending.how, ending.message) == (body_of("responses", [told("a")]), "error", "the cause")


def test_a_response_that_was_cut_by_its_limit_is_complete():
    cut = {"type": "response.incomplete", "response": {"status": "incomplete"}}
    _, ending, _ = watch_all(RESPONSES, [body_of("responses", [told("a"), orjson.dumps(cut)])])
    assert (ending.how, ending.finish_reason) == ("complete", "length")


def test_a_message_that_stops_without_a_reason_is_not_sent_on():
    out, ending, watch = watch_all(ANTHROPIC, [body_of("anthropic", [delta("a"), STOP[1]])])
    assert (out, ending.how, watch.ended) == (body_of("anthropic", [delta("a")]), "error", False)
    assert "stop_reason" in (ending.message or "")


def test_events_that_are_written_anew_keep_their_names():
    good = body_of("anthropic", [delta("a"), *STOP])
    assert b"event: content_block_delta\n" in good
    assert b"event: message_stop\n" in good
    assert body_of("responses", [COMPLETED]).startswith(b"event: response.completed\ndata: ")
    odd = orjson.dumps({"type": "a\r\nb"})
    assert body_of("anthropic", [odd]) == body_of("responses", [odd]) == b"data: " + odd + b"\n\n"


@pytest.mark.parametrize("record", CONTENT)
def test_whatever_a_choice_says_is_content(record: bytes):
    assert OPENAI.judge(record) is Verdict.CONTENT


@pytest.mark.parametrize(
    "record",
    [
        line("", message={"content": "", "thinking": "x"}),
        line("", message={"content": "", "tool_calls": [{}]}),
        b'{"response":"x","done":false}',
    ],
)
def test_whatever_a_line_says_is_content(record: bytes):
    assert OLLAMA.judge(record) is Verdict.CONTENT


def test_an_empty_answer_is_an_answer_without_output():
    empty = body_of(
        "ollama", [line("", done=True, done_reason="stop", total_duration=5, prompt_eval_count=9)]
    )
    _, ending, watch = watch_all(OLLAMA, [empty])
    assert (ending.how, ending.no_output, ending.completion_tokens, watch.content_seen) == (
        "complete",
        True,
        0,
        True,
    )
    usage = chunk("", choices=[], usage={"prompt_tokens": 9, "completion_tokens": 0})
    _, ending, _ = watch_all(OPENAI, [body_of("openai", [FINISH, usage, b"[DONE]"])])
    assert (ending.how, ending.no_output) == ("complete", True)


def test_an_answer_without_counters_has_unknown_counts():
    for name in DIALECTS:
        end = [line("", done=True, done_reason="stop")] if name == "ollama" else ENDS[name]
        _, ending, _ = watch_all(DIALECTS[name], [body_of(name, [WORDS[name]("x"), *end])])
        assert (ending.how, ending.prompt_tokens, ending.completion_tokens) == ("complete", None, None)
        assert not ending.no_output


def test_loading_and_unloading_are_answers():
    for reason in ("load", "unload"):
        _, ending, _ = watch_all(OLLAMA, [body_of("ollama", [line("", done=True, done_reason=reason)])])
        assert (ending.how, ending.finish_reason, ending.no_output) == ("complete", reason, False)


def test_an_end_mark_without_a_finish_reason_is_not_sent_on():
    body = body_of("openai", [chunk("a"), b"[DONE]"])
    out, ending, watch = watch_all(OPENAI, [body])
    assert out == body_of("openai", [chunk("a")])
    assert (ending.how, watch.ended) == ("error", False)
    assert "finish_reason" in (ending.message or "")


def test_a_last_line_without_a_line_end_counts():
    body = body_of("ollama", [line("a"), DONE])[:-1]
    out, ending, watch = watch_all(OLLAMA, bytes_of(body))
    assert (out, ending.how, watch.ended) == (body, "complete", True)
    out, ending, _ = watch_all(OPENAI, [body_of("openai", [chunk("a"), FINISH]) + b"data: [DONE]"])
    assert ending.how == "truncated"


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("size_bytes", [64 * 1024, 8 * 1024 * 1024])
def test_a_record_beyond_the_limit_fails_and_none_of_it_passes(name: str, size_bytes: int):
    first = body_of(name, [WORDS[name]("a")])
    body = first + body_of(name, [WORDS[name]("x" * 8 * 1024 * 1024)])
    pieces = [body[at : at + size_bytes] for at in range(0, len(body), size_bytes)]
    for given_pieces in (pieces, [body]):
        watch = StreamWatch(DIALECTS[name])
        out = b"".join(map(watch.feed, given_pieces))
        assert first.startswith(out)
        assert watch.failed is Verdict.MALFORMED


@pytest.mark.parametrize("name", DIALECTS)
def test_a_long_record_costs_no_more_when_it_comes_in_drops(name: str):
    body = body_of(name, [WORDS[name]("x" * 300_000), *ENDS[name]])
    began_s = time.perf_counter()
    out, ending, _ = watch_all(DIALECTS[name], bytes_of(body))
    assert (out, ending.how) == (body, "complete")
    assert time.perf_counter() - began_s < 5  # quadratic: minutes


_KEYS = ["choices", "delta", "message", "usage", "timings", "error", "done", "done_reason", "text", "model"]
_KEYS += ["finish_reason", "object", "prompt_tokens_details", "eval_count", "content"]
_KEYS += ["type", "response", "stop_reason", "content_block"]
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(name=st.sampled_from(sorted(DIALECTS)), values=st.lists(_VALUES, max_size=6), done=st.booleans())
def test_nothing_that_a_backend_sends_makes_the_watch_fall_over(name: str, values: list[object], done: bool):
    records = [*map(orjson.dumps, values), *([b"[DONE]"] if done else [])]
    out, ending, watch = watch_all(DIALECTS[name], [body_of(name, records)])
    assert ending.how in ("complete", "repeat_abort", "truncated", "error")
    assert watch.ended is (ending.how == "complete")
    if ending.how == "repeat_abort":
        DIALECTS[name].proper_end(tuple(watch.last))
    assert whole_records(DIALECTS[name], out)


@pytest.mark.parametrize("name", ["ollama/repeat-abort", "ollama/kill9-child-v1-stream", "openai completion"])
def test_a_proper_end_is_what_the_dialect_would_have_ended_with(name: str):
    if name == "ollama/repeat-abort":
        dialect, body = OLLAMA, recording(name).body
    elif name == "openai completion":
        dialect = OPENAI
        body = body_of("openai", [chunk("", object="text_completion", choices=[{"text": "x", "index": 0}])])
    else:  # the same stream without the last chunk, by which the dead runner is known
        dialect, body = OPENAI, recording(name).body
        body = body[: body.rindex(b"data: ")]
    out, ending, watch = watch_all(dialect, [body])
    assert ending.how == "repeat_abort"
    whole = out + dialect.proper_end(tuple(watch.last))
    _, ending, again = watch_all(dialect, [whole])
    assert (ending.how, ending.finish_reason, again.ended) == ("complete", "stop", True)
    final = orjson.loads(again.last[-1] if dialect is OLLAMA else again.last[-2])
    if name == "openai completion":
        assert final["choices"] == [{"index": 0, "text": "", "finish_reason": "stop"}]
    assert final["model"]
