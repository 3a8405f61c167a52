"""Answers as the pool reads them: framing, cuts, what is not HTTP, large bodies in both directions."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from herd_node.net.pool import BadResponse, Pool, PoolError, ResetBeforeHead, UpstreamCut
from tests.net.scripted import OK, Peer, Script, answer, answer_and_close, scripted, soon, until

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def ask(
    pool: Pool, script: Script, *, method: str = "POST", body: bytes = b"{}"
) -> tuple[int, list[tuple[bytes, bytes]], bytes, bool]:
    """One exchange with a server that plays the script: status, headers, body, connection kept."""
    async with scripted(script) as server:
        upstream = await soon(pool.request(server.origin, method, "/x", lambda: [], body))
        try:
            whole = await soon(upstream.read_all(64 << 20))
        finally:
            upstream.close()
        kept = pool.idle_count(server.origin) == 1
        pool.close_idle()
        return upstream.status, upstream.headers, whole, kept


FRAMED = {
    "content-length": (OK, 200, b"ok", True),
    "empty": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b"", True),
    "no reason": (b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\nok", 200, b"ok", True),
    "chunked": (CHUNKED + b"2\r\nok\r\n1;ext=1\r\n!\r\n0\r\n\r\n", 200, b"ok!", True),
    "trailer": (CHUNKED + b"2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n", 200, b"ok", True),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
    "304": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", 304, b"", True),
    "100": (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, 200, b"ok", True),
    "103": (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 3 + OK, 200, b"ok", True),
    "500": (b"HTTP/1.1 500 Oh\r\nContent-Length: 2\r\n\r\nno", 500, b"no", True),
}


@pytest.mark.parametrize("drip", [False, True], ids=["whole", "drip"])
@pytest.mark.parametrize("name", FRAMED)
async def test_an_answer_ends_where_its_framing_says(pool: Pool, name: str, drip: bool) -> None:
    raw, status, body, kept = FRAMED[name]

    async def dripping(peer: Peer) -> None:
        await peer.request()
        await peer.drip(raw)
        await peer.left()

    script = dripping if drip else answer(raw)
    got_status, headers, got_body, got_kept = await ask(pool, script)
    assert (got_status, got_body, got_kept) == (status, body, kept)
    assert [name for name, _ in headers if name in (b"link", b"x-sum")] == []


@pytest.mark.parametrize("drip", [False, True], ids=["whole", "drip"])
async def test_a_body_without_length_ends_with_its_connection_and_says_so(pool: Pool, drip: bool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        raw = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nuntil the end"
        await (peer.drip(raw) if drip else peer.send(raw))

    async with scripted(script) as server:
        upstream = await soon(pool.request(server.origin, "GET", "/", lambda: [], b""))
        assert upstream.until_close
        assert await soon(upstream.read_all(100)) == b"until the end"
        upstream.close()
        assert pool.idle_count(server.origin) == 0


async def test_a_body_with_framing_does_not_claim_to_end_with_its_connection(pool: Pool) -> None:
    async with scripted(answer(), answer(CHUNKED + b"0\r\n\r\n")) as server:
        for _ in range(2):
            upstream = await soon(pool.request(server.origin, "GET", "/", lambda: [], b"", reuse=False))
            assert not upstream.until_close
            upstream.close()


async def test_the_answer_to_head_has_no_body_whatever_it_announces(pool: Pool) -> None:
    status, headers, body, kept = await ask(
        pool, answer(b"HTTP/1.1 200 OK\r\nContent-Length: 17\r\n\r\n"), method="HEAD"
    )
    assert (status, headers, body, kept) == (200, [(b"content-length", b"17")], b"", False)


CUTS = {
    "short length": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\none",
    "no last chunk": CHUNKED + b"3\r\none\r\n",
    "inside a chunk": CHUNKED + b"9\r\none",
    "inside the last chunk": CHUNKED + b"3\r\none\r\n0\r\n",
}


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("name", CUTS)
async def test_a_body_that_breaks_off_is_a_cut_after_all_that_came(pool: Pool, name: str, how: str) -> None:
    read = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CUTS[name])
        await soon(read.wait())
        if how == "rst":
            peer.reset()

    async with scripted(script) as server:
        upstream = await soon(pool.request(server.origin, "GET", "/", lambda: [], b""))
        assert await soon(upstream.read()) == b"one"
        read.set()
        for _ in range(2):
            with pytest.raises(UpstreamCut):
                await soon(upstream.read())
        upstream.close()
        assert pool.idle_count(server.origin) == 0


async def test_a_cut_comes_after_the_bytes_that_wait_to_be_read(pool: Pool) -> None:
    async with scripted(answer_and_close(CUTS["short length"])) as server:
        upstream = await soon(pool.request(server.origin, "GET", "/", lambda: [], b""))
        await until(lambda: not pool._open)
        assert await upstream.read() == b"one"
        with pytest.raises(UpstreamCut):
            await upstream.read()
        upstream.close()


async def test_a_reset_is_no_proper_end_of_a_body_without_length(pool: Pool) -> None:
    read = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\none")
        await soon(read.wait())
        peer.reset()

    async with scripted(script) as server:
        upstream = await soon(pool.request(server.origin, "GET", "/", lambda: [], b""))
        assert await soon(upstream.read()) == b"one"
        read.set()
        with pytest.raises(UpstreamCut):
            await soon(upstream.read())
        upstream.close()


@pytest.mark.parametrize("junk", [b"zz\r\n", b"-1\r\nx", b"ffffffffffffffffff\r\n", b"3\r\nabcd\r\n"])
async def test_a_bad_chunk_is_a_cut_and_ends_the_connection(pool: Pool, junk: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED + b"3\r\none\r\n" + junk)
        await peer.left()

    async with scripted(script) as server:
        upstream = await soon(pool.request(server.origin, "GET", "/", lambda: [], b""))
        came = b""
        with pytest.raises(UpstreamCut, match="badly framed"):
            while piece := await soon(upstream.read()):
                came += piece
        assert came.startswith(b"one")
        await soon(server.peers[0].played.wait())
        upstream.close()


NOT_HTTP = {
    "garbage": b"SSH-2.0-OpenSSH_9.2\r\n",
    "html": b"<html>\r\n\r\n",
    "http/0.9": b"hello",
    "http/2": b"HTTP/2.0 200 OK\r\n\r\n",
    "no such status": b"HTTP/1.1 999999 OK\r\n\r\n",
    "status 0": b"HTTP/1.1 000 OK\r\n\r\n",
    "status 600": b"HTTP/1.1 600 OK\r\nContent-Length: 0\r\n\r\n",
    "cl and te": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "te and cl": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nok",
    "gzip coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "1.0 chunked": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "101": b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\nxxx",
    "101 without upgrade": b"HTTP/1.1 101 Switching\r\n\r\n",
    "bare lf": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    "folded": b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 2\r\n\r\nok",
    "one long header": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\nContent-Length: 2\r\n\r\nok",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000 + b"Content-Length: 2\r\n\r\nok",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000,
    "endless hints": b"HTTP/1.1 103 Early Hints\r\n\r\n" * 5_000,
}


@pytest.mark.parametrize("name", NOT_HTTP)
async def test_what_is_no_usable_answer_is_refused_and_its_connection_cut(pool: Pool, name: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(NOT_HTTP[name])
        await peer.left()

    async with scripted(script) as server:
        with pytest.raises(BadResponse):
            await soon(pool.request(server.origin, "POST", "/x", lambda: [], b"{}"))
        await soon(server.peers[0].played.wait())


async def test_garbage_byte_by_byte_is_refused_too(pool: Pool) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        with suppress(ConnectionError):
            await peer.drip(NOT_HTTP["cl and te"])
        await peer.left()

    async with scripted(script) as server:
        with pytest.raises(BadResponse):
            await soon(pool.request(server.origin, "POST", "/x", lambda: [], b"{}"))


async def test_a_head_bomb_is_not_buffered(pool: Pool) -> None:
    taken = 0

    async def script(peer: Peer) -> None:
        nonlocal taken
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nX: ")
        try:
            while taken < 64 << 20:
                await peer.send(b"x" * 65536)
                taken += 65536
        except ConnectionError:
            pass

    async with scripted(script) as server:
        with pytest.raises(BadResponse):
            await soon(pool.request(server.origin, "POST", "/x", lambda: [], b"{}"))
        await soon(server.peers[0].played.wait())
    assert taken < 64 << 20, "the connection was cut long before the end"


async def test_a_head_as_large_as_allowed_passes(pool: Pool) -> None:
    field = b"X: " + b"x" * 60_000 + b"\r\n"
    status, _, body, kept = await ask(pool, answer(OK.replace(b"\r\n\r\n", b"\r\n" + field + b"\r\n")))
    assert (status, body, kept) == (200, b"ok", True)


async def test_a_head_that_never_ends_properly_is_a_reset(pool: Pool) -> None:
    with pytest.raises(ResetBeforeHead):
        await ask(pool, answer_and_close(b"HTTP/1.1 200 OK\r\nContent-Le"))


async def test_an_answer_larger_than_the_limit_is_refused(pool: Pool) -> None:
    async with scripted(answer(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nlarge")) as server:
        upstream = await soon(pool.request(server.origin, "GET", "/", lambda: [], b""))
        with pytest.raises(BadResponse, match="larger than 4 bytes"):
            await upstream.read_all(4)
        upstream.close()


def test_every_error_is_a_pool_error() -> None:
    assert issubclass(UpstreamCut, PoolError)
    assert issubclass(BadResponse, PoolError)
    assert not issubclass(UpstreamCut, BadResponse)


# --- streams ------------------------------------------------------------------------------------------------


async def test_a_piece_is_given_on_as_soon_as_it_is_there(pool: Pool) -> None:
    got = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(CHUNKED)
        for n in range(5):
            await peer.send(b"2\r\nt%d\r\n" % n)
            await soon(got.wait())
            got.clear()
        await peer.send(b"0\r\n\r\n")
        await peer.left()

    async with scripted(script) as server:
        upstream = await soon(pool.request(server.origin, "GET", "/", lambda: [], b""))
        pieces = []
        while piece := await soon(upstream.read()):
            pieces.append(piece)
            got.set()
        upstream.close()
        assert pieces == [b"t0", b"t1", b"t2", b"t3", b"t4"]
        assert pool.idle_count(server.origin) == 1


async def test_a_slow_reader_gets_fewer_larger_pieces(pool: Pool) -> None:
    raw = CHUNKED + b"".join(b"1\r\n%d\r\n" % (n % 10) for n in range(100)) + b"0\r\n\r\n"
    async with scripted(answer(raw)) as server:
        upstream = await soon(pool.request(server.origin, "GET", "/", lambda: [], b""))
        await until(lambda: upstream.ended)
        assert await upstream.read() == b"0123456789" * 10
        assert await upstream.read() == b""
        upstream.close()


SIZE = 8 << 20
ONE_READ = 16 * 1024


async def test_an_unread_answer_is_held_back_at_its_sender_and_comes_whole(pool: Pool) -> None:
    async with scripted(
        answer(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE + b"x" * SIZE)
    ) as server:
        upstream = await soon(pool.request(server.origin, "GET", "/", lambda: [], b""))
        (connection,) = pool._open
        await until(lambda: not connection._transport.is_reading())
        first = await upstream.read()
        assert pool.max_buffer_bytes < len(first) <= pool.max_buffer_bytes + ONE_READ
        assert not connection._transport.is_reading(), "nobody waits for more yet"
        largest, total = 0, len(first)
        while piece := await soon(upstream.read()):
            largest, total = max(largest, len(piece)), total + len(piece)
        upstream.close()
        assert total == SIZE
        assert largest <= pool.max_buffer_bytes + ONE_READ
        assert pool.idle_count(server.origin) == 1


async def test_a_connection_that_was_held_back_is_kept_fit_for_use(pool: Pool) -> None:
    size = pool.max_buffer_bytes + 1
    raw = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + b"x" * size
    async with scripted(answer(raw)) as server:
        upstream = await soon(pool.request(server.origin, "GET", "/", lambda: [], b""))
        await until(lambda: upstream.ended)
        upstream.close()
        upstream = await soon(pool.request(server.origin, "GET", "/", lambda: [], b""))
        assert len(await soon(upstream.read_all(size))) == size
        upstream.close()
        assert len(server.peers) == 1


# --- large requests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, SIZE + 1])
async def test_a_request_body_arrives_whole(pool: Pool, size: int) -> None:
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    came = b""

    async def script(peer: Peer) -> None:
        nonlocal came
        came = await peer.request()
        await peer.send(OK)
        await peer.left()

    assert await ask(pool, script, body=body) == (200, [(b"content-length", b"2")], b"ok", True)
    assert came == body


async def test_a_large_request_to_a_slow_reader_waits_outside_the_send_buffer(pool: Pool) -> None:
    go_on = asyncio.Event()
    size = 32 << 20

    async def script(peer: Peer) -> None:
        await peer.head()
        await soon(go_on.wait())
        await soon(peer.reader.readexactly(size))
        await peer.send(OK)
        await peer.left()

    async with scripted(script) as server:
        asking = asyncio.create_task(pool.request(server.origin, "POST", "/x", lambda: [], b"x" * size))
        await until(lambda: bool(server.peers) and bool(server.peers[0].heads))
        (connection,) = pool._open
        await until(lambda: connection._write_paused)
        assert len(connection._unsent) > size // 2
        assert connection._transport.get_write_buffer_size() <= 512 * 1024
        go_on.set()
        upstream = await soon(asking)
        assert await soon(upstream.read_all(10)) == b"ok"
        upstream.close()
        assert pool.idle_count(server.origin) == 1


async def test_an_early_answer_to_a_large_request_is_heard_and_its_connection_not_kept(pool: Pool) -> None:
    async def script(peer: Peer) -> None:
        await peer.head()
        await peer.send(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await soon(answered.wait())
        await peer.left()

    answered = asyncio.Event()
    async with scripted(script) as server:
        upstream = await soon(pool.request(server.origin, "POST", "/x", lambda: [], b"x" * (32 << 20)))
        assert upstream.status == 413
        assert await soon(upstream.read_all(10)) == b"no"
        answered.set()
        upstream.close()
        assert pool.idle_count(server.origin) == 0
        await soon(server.peers[0].played.wait())
