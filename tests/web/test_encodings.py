"""Packed request bodies: what comes out is what was packed, and never more than the limit."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from herd.errors import BadRequest, UnsupportedEncoding
from herd.web.encodings import unpack
from herd_node.net.exchange import BodyTooLarge

PACKERS: dict[bytes, Callable[[bytes], bytes]] = {
    b"gzip": gzip.compress,
    b"x-gzip": gzip.compress,
    b" GZIP ": gzip.compress,
    b"zstd": zstandard.compress,
    b"ZSTD": zstandard.compress,
}
LIMIT_BYTES = 100_000


@given(coding=st.sampled_from(sorted(PACKERS)), body=st.binary(max_size=5000))
def test_what_was_packed_comes_out(coding: bytes, body: bytes) -> None:
    assert unpack(PACKERS[coding](body), coding, LIMIT_BYTES) == body


@pytest.mark.parametrize("coding", [b"gzip", b"zstd"])
def test_parts_that_were_packed_one_by_one_are_joined(coding: bytes) -> None:
    pack = PACKERS[coding]
    assert unpack(pack(b'{"a":') + pack(b"1}"), coding, LIMIT_BYTES) == b'{"a":1}'


def test_a_frame_without_a_size_is_read_too() -> None:
    packer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    assert unpack(packer.compress(b"x" * 5000) + packer.flush(), b"zstd", LIMIT_BYTES) == b"x" * 5000


@pytest.mark.parametrize("coding", [b"gzip", b"zstd"])
def test_the_limit_is_one_of_plain_bytes(coding: bytes) -> None:
    pack = PACKERS[coding]
    assert len(unpack(pack(b"\0" * LIMIT_BYTES), coding, LIMIT_BYTES)) == LIMIT_BYTES
    for size in (LIMIT_BYTES + 1, 500 * LIMIT_BYTES):
        with pytest.raises(BodyTooLarge):
            unpack(pack(b"\0" * size), coding, LIMIT_BYTES)


def test_a_frame_that_wants_gigabytes_of_window_is_refused() -> None:
    window = zstandard.ZstdCompressionParameters.from_level(1, window_log=27, write_content_size=False)
    packed = zstandard.ZstdCompressor(compression_params=window).compressobj()
    with pytest.raises(BadRequest):
        unpack(packed.compress(b"x" * 10) + packed.flush(), b"zstd", LIMIT_BYTES)


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        (b"gzip", b"{}"),
        (b"gzip", gzip.compress(b"x" * 999)[:-4]),
        (b"gzip", gzip.compress(b"x") + b"more"),
        (b"gzip", zlib.compress(b"x")),
        (b"zstd", b"{}"),
        (b"zstd", zstandard.compress(b"x") + b"more"),
    ],
)
def test_what_is_damaged_is_the_callers_mistake(coding: bytes, body: bytes) -> None:
    with pytest.raises(BadRequest, match=f"not valid {coding.decode()}"):
        unpack(body, coding, LIMIT_BYTES)


@pytest.mark.parametrize("coding", [b"br", b"deflate", b"gzip, zstd", b"aws-chunked"])
def test_other_encodings_are_refused_with_the_names_of_those_that_work(coding: bytes) -> None:
    with pytest.raises(UnsupportedEncoding, match="gzip or zstd"):
        unpack(b"", coding, LIMIT_BYTES)
