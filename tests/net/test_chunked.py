"""Chunks written and read back; what is not whole chunks is left to the parser."""

from __future__ import annotations

from collections.abc import Callable

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from herd_node.net.chunked import chunk_of, whole_chunks

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
#: Bytes that framing is made of, so that pieces look like it.
_TRICKY = st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"1", b"0", b"a", b";", b" "]), max_size=8)
_PIECES = st.lists(_TRICKY.map(b"".join).filter(bool) | st.binary(min_size=1, max_size=2000), max_size=5)


def parsed(data: bytes) -> tuple[bytes, int]:
    """What llhttp takes out of it, and how many chunks it saw the end of."""
    pieces: list[bytes] = []
    ends: list[int] = []

    class Seen:
        on_body: Callable[[bytes], None] = staticmethod(pieces.append)

        def on_chunk_complete(self) -> None:
            ends.append(1)

    parser = httptools.HttpResponseParser(Seen())
    parser.feed_data(HEAD + data)
    return b"".join(pieces), len(ends)


@given(pieces=_PIECES)
def test_what_is_framed_is_read_by_the_parser_and_by_us(pieces: list[bytes]) -> None:
    framed = b"".join(map(chunk_of, pieces))
    assert parsed(framed) == (b"".join(pieces), len(pieces))
    found = whole_chunks(framed)
    assert found == b"".join(pieces) or (found == b"" and any(b"\r\n" in piece for piece in pieces))


@given(data=_PIECES.map(b"".join) | _PIECES.map(lambda pieces: b"".join(map(chunk_of, pieces))[:-1]))
def test_what_is_taken_for_whole_chunks_is_that_for_the_parser_too(data: bytes) -> None:
    found = whole_chunks(data)
    if found:
        content, _ = parsed(data)
        assert content == found
        assert parsed(data + b"2\r\nok\r\n")[0] == found + b"ok", "it stands between two chunks behind it"


@pytest.mark.parametrize("size", [1, 15, 16, 1023, 1024, 70_000])
def test_chunks_of_any_size_are_known(size: int) -> None:
    piece = b"x" * size
    assert chunk_of(piece) == b"%x\r\n%b\r\n" % (size, piece)
    assert whole_chunks(chunk_of(piece)) == piece
    assert whole_chunks(chunk_of(piece) * 3) == piece * 3


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"0\r\n\r\n",
        b"2\r\nok\r\n0\r\n\r\n",
        b"2\r\nok",
        b"2\r\nok\r",
        b"2\r\nok\r\n2",
        b"2\r\nok\r\n2\r\n",
        b"2\r\nokay\r\n",
        b"02\r\nok\r\n",
        b"2;a=b\r\nok\r\n",
        b"A\r\n0123456789\r\n",
        b"+2\r\nok\r\n",
        b"\r\n\r\n",
        b"ok\r\n",
    ],
)
def test_the_end_a_part_and_other_spellings_are_the_parsers(data: bytes) -> None:
    assert whole_chunks(data) == b""
