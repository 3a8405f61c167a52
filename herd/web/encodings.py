"""Request bodies that come compressed: unpacked here, once, because the model has to be read and signed.

A node never sees the packed form: llama-server answers 415 and Ollama unpacks zstd only. What is packed may
be a bomb, so nothing beyond the limit is ever unpacked.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from io import BytesIO

import zstandard

from herd.errors import BadRequest, UnsupportedEncoding
from herd_node.net.exchange import BodyTooLarge

#: The largest window that RFC 8878 asks every decoder to support; a frame can claim gigabytes.
_ZSTD_WINDOW_BYTES = 8 * 1024 * 1024
_GZIP = 16 + zlib.MAX_WBITS


def unpack(body: bytes, coding: bytes, limit_bytes: int) -> bytes:
    """The plain body. `coding` is the value of Content-Encoding, which is not empty.

    Raises UnsupportedEncoding for others than gzip and zstd, BadRequest for what is damaged, BodyTooLarge.
    """
    unpacker = _UNPACKERS.get(coding.strip().lower())
    if unpacker is None:
        raise UnsupportedEncoding("the request body's encoding is not accepted; send it plain, gzip or zstd")
    try:
        plain = unpacker(body, limit_bytes + 1)
    except (zlib.error, zstandard.ZstdError, EOFError) as error:
        name = coding.strip().lower().decode("latin-1")
        raise BadRequest(f"the request body is not valid {name}") from error
    if len(plain) > limit_bytes:
        raise BodyTooLarge(limit_bytes)
    return plain


def _gunzip(body: bytes, most_bytes: int) -> bytes:
    """Members stand one behind the other; the last one must be whole, and nothing else may follow."""
    plain: list[bytes] = []
    left = most_bytes
    while body and left > 0:
        member = zlib.decompressobj(_GZIP)
        piece = member.decompress(body, left)
        plain.append(piece)
        left -= len(piece)
        if not member.eof and left > 0:
            raise EOFError
        body = member.unused_data
    return b"".join(plain)


def _unzstd(body: bytes, most_bytes: int) -> bytes:
    """Of a frame that was cut short it gives what came: the start of a JSON object, which is none."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
    with decompressor.stream_reader(BytesIO(body), read_across_frames=True) as reader:
        return reader.read(most_bytes)


_UNPACKERS: Mapping[bytes, Callable[[bytes, int], bytes]] = {
    b"gzip": _gunzip,
    b"x-gzip": _gunzip,
    b"zstd": _unzstd,
}
