"""A body that may be large: bytes or a mapped file, the same to whoever searches, hashes or sends it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from mmap import mmap

import pytest

from herd_node.net.exchange import BodyTooLarge
from herd_node.net.pool import Origin, Pool
from herd_node.net.spool import MEMORY_BYTES
from herd_node.net.uploads import read_upload, release
from herd_node.protocol import auth


class Piecemeal:
    """An exchange whose body comes in pieces."""

    def __init__(self, body: bytes, piece_bytes: int = 65536) -> None:
        self._body, self._size = body, piece_bytes

    async def pieces(self, limit_bytes: int) -> AsyncIterator[bytes]:
        for at in range(0, len(self._body), self._size):
            if at + self._size > limit_bytes:
                raise BodyTooLarge(limit_bytes)
            yield self._body[at : at + self._size]


def body_of(size_bytes: int) -> bytes:
    return (b"0123456789abcde\n" * (size_bytes // 16 + 1))[:size_bytes]


@pytest.mark.parametrize("size_bytes", [0, 1, MEMORY_BYTES - 1, MEMORY_BYTES, 5 * MEMORY_BYTES + 3])
async def test_it_reads_like_bytes_wherever_it_is_kept(size_bytes: int) -> None:
    sent = body_of(size_bytes)
    body = await read_upload(Piecemeal(sent), 1 << 30)  # type: ignore[arg-type]
    assert isinstance(body, mmap) is (size_bytes >= MEMORY_BYTES)
    assert (len(body), body[:], body[:7] + body[7:]) == (size_bytes, sent, sent)
    assert auth.body_hash(body) == hashlib.sha256(sent).hexdigest()
    assert body.find(b"abcde\n0") == sent.find(b"abcde\n0")
    release(body)


async def test_too_much_is_refused_and_nothing_is_kept() -> None:
    with pytest.raises(BodyTooLarge):
        await read_upload(Piecemeal(body_of(3 * MEMORY_BYTES)), 2 * MEMORY_BYTES)  # type: ignore[arg-type]


async def test_a_mapped_file_is_sent_whole_and_can_be_sent_again() -> None:
    sent, got = body_of(3 * MEMORY_BYTES), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            got.append(await reader.readexactly(len(sent)))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await reader.read(1)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    pool = Pool(idle_s=5)
    origin = Origin("127.0.0.1", server.sockets[0].getsockname()[1])
    body = await read_upload(Piecemeal(sent), 1 << 30)  # type: ignore[arg-type]
    for _ in range(2):
        upstream = await pool.request(origin, "POST", "/", list, body)
        assert (upstream.status, await upstream.read_all(10)) == (200, b"")
        upstream.close()
    release(body)
    release(b"")
    await pool.close(force=True)
    server.close()
    assert got == [sent, sent]
