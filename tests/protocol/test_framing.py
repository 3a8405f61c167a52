"""Record framing: any split of the same bytes gives the same records, recorded or invented."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from time import perf_counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd_node.protocol.framing import FramingError, Records
from tests.fakes.recordings import recording

SSE_RECORDINGS = [
    "llamacpp/chat-stream",
    "llamacpp/chat-stream-usage",
    "llamacpp/prefill-stream-pings",
    "llamacpp/kill9-mid-stream",
    "llamacpp/completion-native-stream",
    "llamacpp/messages-stream",
    "ollama/v1-chat-stream",
    "ollama/kill9-child-v1-stream",
    "ollama/v1-messages-stream",
]
NDJSON_RECORDINGS = [
    "ollama/chat-stream",
    "ollama/generate-stream",
    "ollama/chat-think-default",
    "ollama/kill9-stream",
    "ollama/kill9-child-stream",
    "ollama/repeat-abort",
]


def fed(kind: str, chunks: Iterable[bytes], limit_bytes: int = 4 * 1024 * 1024) -> list[bytes | str]:
    """All records of a body; "error" stands where framing gave up."""
    records = Records(kind, limit_bytes)
    out: list[bytes | str] = []
    try:
        for chunk in chunks:
            out += records.feed(chunk)
        if rest := records.rest():
            out.append(rest)
    except FramingError:
        out.append("error")
    return out


def single_bytes(body: bytes) -> list[bytes]:
    return [body[i : i + 1] for i in range(len(body))]


def cut(body: bytes, places: Iterable[int]) -> list[bytes]:
    marks = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    return [body[a:b] for a, b in pairwise(marks)]


def sse_by_the_book(body: bytes) -> list[bytes]:
    """The specification, line by line; events whose data is empty are dropped."""
    events, data = [], []
    for line in re.split(rb"\r\n|\r|\n", body.removeprefix(b"\xef\xbb\xbf")):
        name, _, value = line.partition(b":")
        if line == b"":
            if any(data):
                events.append(b"\n".join(data))
            data = []
        elif name == b"data":
            data.append(value.removeprefix(b" "))
    return events


def ndjson_by_the_book(body: bytes) -> list[bytes]:
    return [line.removesuffix(b"\r") for line in body.split(b"\n") if line.removesuffix(b"\r")]


@pytest.mark.parametrize("name", SSE_RECORDINGS)
def test_a_recorded_event_stream_gives_its_events_whole_and_byte_by_byte(name: str) -> None:
    body = recording(name).body
    # the recorder saw a stream that may break off inside its last event: that one is no record
    complete = body[: body.rindex(b"\n\n") + 2]
    expected = sse_by_the_book(complete)
    assert len(expected) >= 3
    assert all(record == b"[DONE]" or isinstance(json.loads(record), dict) for record in expected)
    assert fed("sse", [body]) == expected
    assert fed("sse", single_bytes(body)) == expected


@pytest.mark.parametrize("name", NDJSON_RECORDINGS)
def test_a_recorded_line_stream_gives_its_lines_whole_and_byte_by_byte(name: str) -> None:
    body = recording(name).body
    expected = ndjson_by_the_book(body)
    assert len(expected) >= 3
    assert all(isinstance(json.loads(record), dict) for record in expected)
    assert fed("ndjson", [body]) == expected
    assert fed("ndjson", single_bytes(body)) == expected


@given(st.sampled_from(SSE_RECORDINGS), st.lists(st.integers(0, 1 << 20), max_size=12))
def test_any_split_of_a_recorded_event_stream_gives_the_same_records(name: str, places: list[int]) -> None:
    body = recording(name).body
    assert fed("sse", cut(body, places)) == fed("sse", [body])


@given(st.sampled_from(NDJSON_RECORDINGS), st.lists(st.integers(0, 1 << 20), max_size=12))
def test_any_split_of_a_recorded_line_stream_gives_the_same_records(name: str, places: list[int]) -> None:
    body = recording(name).body
    assert fed("ndjson", cut(body, places)) == fed("ndjson", [body])


LINES = [
    b"data: x",
    b"data:y",
    b"data:  z",
    b"data",
    b"data: ",
    b"dat",
    b"event: e",
    b": ping",
    b"",
    b"\xef\xbb\xbf",
    b"data: \xc3\xa9",
]


@given(
    st.lists(
        st.tuples(st.sampled_from(LINES), st.sampled_from([b"\n", b"\r", b"\r\n", b"\n\n", b""])), max_size=30
    ),
    st.lists(st.integers(0, 1 << 10), max_size=8),
)
def test_any_event_stream_reads_as_the_specification_says(
    lines: list[tuple[bytes, bytes]], places: list[int]
) -> None:
    # the ends make sure that the last event is complete, which is where the book stops
    body = b"".join(line + end for line, end in lines) + b"\n\n"
    expected = sse_by_the_book(body)
    assert fed("sse", [body]) == expected
    assert fed("sse", cut(body, places)) == expected
    assert fed("sse", single_bytes(body)) == expected


@given(
    st.lists(st.sampled_from([b"{}", b"a", b"\n", b"\r\n", b"\r", b"\xc3"]), max_size=30),
    st.lists(st.integers(0, 1 << 10), max_size=8),
)
def test_any_line_stream_gives_its_non_empty_lines(pieces: list[bytes], places: list[int]) -> None:
    body = b"".join(pieces)
    expected = ndjson_by_the_book(body)
    assert fed("ndjson", cut(body, places)) == expected
    assert fed("ndjson", single_bytes(body)) == expected


@given(
    st.sampled_from(["sse", "ndjson"]),
    st.lists(st.integers(0, 24), min_size=1, max_size=8),
    st.lists(st.integers(0, 1 << 10), max_size=6),
)
def test_the_limit_falls_at_the_same_record_however_the_bytes_are_split(
    kind: str, sizes: list[int], places: list[int]
) -> None:
    head, end = (b"data: ", b"\n\n") if kind == "sse" else (b"", b"\n")
    body = b"".join(head + b"x" * size + end for size in sizes)
    whole = fed(kind, [body], limit_bytes=16)
    assert fed(kind, cut(body, places), limit_bytes=16) == whole
    assert fed(kind, single_bytes(body), limit_bytes=16) == whole
    assert ("error" in whole) == any(len(head) + size > 16 for size in sizes)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data:a\ndata: b\n\n", [b"a\nb"]),
        (b"data: a\r\ndata: b\r\n\r\n", [b"a\nb"]),
        (b"data: a\rdata: b\r\r", [b"a\nb"]),
        (b"data: a\r\n\ndata: b\r\n\n", [b"a", b"b"]),
        (b"data:\ndata:\n\n", []),
        (b"data: a\ndata\ndata: b\n\n", [b"a\n\nb"]),
        (b": ping\n\n:\n\ndata: a\n\n", [b"a"]),
        (b"event: delta\nid: 7\nretry: 10\ndata: a\n\n", [b"a"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: \xef\xbb\xbf\n\n", [b"\xef\xbb\xbf"]),
        (b"event: ping\ndata:\n\n", []),
        (b"data: [DONE]\n", []),
        (b"data: open", []),
    ],
)
def test_an_event_is_its_joined_data(body: bytes, expected: list[bytes]) -> None:
    assert fed("sse", [body]) == expected
    assert fed("sse", single_bytes(body)) == expected


def test_a_record_comes_out_with_the_chunk_that_ends_it() -> None:
    records = Records("sse")
    assert records.feed(b"data: on") == []
    assert records.pending == 8
    assert records.feed(b"e\n") == []
    assert records.feed(b"\ndata: two\n\nda") == [b"one", b"two"]
    assert records.pending == 2


def test_a_last_line_without_line_end_counts_and_an_open_event_does_not() -> None:
    lines, events = Records("ndjson"), Records("sse")
    assert lines.feed(b'{"done":true}') == []
    assert lines.rest() == b'{"done":true}'
    assert lines.rest() == b""
    events.feed(b"data: a\n")
    assert events.rest() == b""


def test_a_line_of_eight_mebibytes_is_refused_and_what_came_before_it_is_not_lost() -> None:
    records = Records("ndjson")
    assert records.feed(b'{"a":1}\n' + b"x" * (8 << 20)) == [b'{"a":1}']
    with pytest.raises(FramingError):
        records.feed(b"\n")
    with pytest.raises(FramingError):
        records.rest()
    assert records.pending == 0


def test_a_long_record_in_many_pieces_costs_no_more_than_its_length() -> None:
    piece, count = b"x" * 64, (4 << 20) // 64 - 1
    records = Records("sse")
    assert records.feed(b"data: ") == []
    began_s = perf_counter()
    for _ in range(count):
        assert records.feed(piece) == []
    assert records.feed(b"\n\n") == [piece * count]
    # linear: some 50 ms. Joining the tail at each feed would copy 130 GB
    assert perf_counter() - began_s < 5


def test_a_lone_record_is_known_without_being_fed_and_only_between_records() -> None:
    events, lines = Records("sse", 40), Records("ndjson", 40)
    assert events.lone(b'data: {"a":1}\n\n') == b'{"a":1}'
    assert lines.lone(b'{"a":1}\r\n') == b'{"a":1}'
    assert events.lone(b"event: e\ndata: a\n\n") == b"a"
    for other in (
        b"event: e\n\n",
        b"event: e\ndata: a\n",
        b"event: e\ndata: a\nx\n\n",
        b"event: e\nid: 1\ndata: a\n\n",
        b"event: e\r\ndata: a\n\n",
        b"event: e\ndata: a\n\ndata: b\n\n",
        b"",
        b"\n\n",
        b": ping\n\n",
        b"data: a\n",
        b"data: a\nx\n\n",
        b"data: a\r\n\n",
        b"data:a\n\n",
    ):
        assert events.lone(other) == b""
    assert events.lone(b"data: a\n\ndata: b\n\n") == lines.lone(b"a\nb\n") == lines.lone(b"a") == b""
    assert events.lone(b"data: " + b"a" * 40 + b"\n\n") == b""
    for unfinished in (b"data: a", b"data: a\n\n\r"):
        records = Records("sse")
        records.feed(unfinished)
        assert records.lone(b"data: b\n\n") == b""
    lines.feed(b"a\n" + b"b" * 50)
    assert lines.lone(b"a\n") == b""  # broken
