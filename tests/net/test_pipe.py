"""A body that is piped: handed on inside the socket's callback, the task woken only when it is needed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from herd_node.net.chunked import chunk_of
from herd_node.net.pool import Pool, Upstream, UpstreamCut
from herd_node.net.upstream import Connection, Origin
from tests.net.scripted import Peer, Script, scripted, soon, until

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


class Silent(asyncio.Transport):
    """A socket of which a test plays the other side by calling the connection."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = True

    def write(self, data: object) -> None:
        return

    def is_closing(self) -> bool:
        return False

    def abort(self) -> None:
        return

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_write_buffer_size(self) -> int:
        return 0


@asynccontextmanager
async def answered(first: bytes = HEAD) -> AsyncIterator[tuple[Connection, Upstream, Silent]]:
    pool = Pool(idle_s=60)
    connection, transport = Connection(pool, Origin("h", 1)), Silent()
    connection.connection_made(transport)
    upstream = connection.send("POST", "/x", lambda: [], b"{}")
    connection.data_received(first)
    await soon(upstream.head(None))
    yield connection, upstream, transport
    connection.connection_lost(None)
    await pool.close()


def piping(upstream: Upstream, push: Callable[[bytes], bool]) -> asyncio.Task[bool]:
    return asyncio.ensure_future(upstream.pipe(push))  # type: ignore[arg-type]


async def test_each_read_is_pushed_once_and_at_once() -> None:
    got: list[bytes] = []
    async with answered(HEAD + chunk_of(b"before")) as (connection, upstream, _):
        task = piping(upstream, lambda piece: got.append(piece) is None)
        await asyncio.sleep(0)
        for data in (chunk_of(b"one"), chunk_of(b"two") + chunk_of(b"three"), b"5\r\nfo", b"ur!\r", b"\n"):
            connection.data_received(data)  # the loop has no turn between them
        assert got == [b"before", b"one", b"twothree", b"fo", b"ur!"]
        assert not task.done()
        connection.data_received(chunk_of(b"last") + END)
        assert got[-1] == b"last"
        assert await soon(task) is False


async def test_a_push_that_refuses_keeps_its_piece_and_the_rest_waits() -> None:
    got: list[bytes] = []
    async with answered() as (connection, upstream, transport):
        task = piping(upstream, lambda piece: got.append(piece) is not None)
        await asyncio.sleep(0)
        for letter in (b"a", b"b", b"c"):
            connection.data_received(chunk_of(letter))
        assert got == [b"a"]
        assert await soon(task) is True
        assert not transport.reading, "what cannot be passed on now must not pile up"
        assert await soon(upstream.read()) == b"bc"
        more = asyncio.ensure_future(upstream.read())
        await asyncio.sleep(0)
        assert transport.reading, "somebody waits for more"
        while transport.reading:
            connection.data_received(chunk_of(b"x" * 10_000))
        assert len(await soon(more)) == 70_000, "what was kept is bounded"
        task = piping(upstream, lambda piece: got.append(piece) is None)
        await asyncio.sleep(0)
        assert transport.reading
        connection.data_received(END)
        assert await soon(task) is False


async def test_a_push_that_refuses_the_last_piece_hears_of_the_end_when_it_comes_back() -> None:
    async with answered() as (connection, upstream, _):
        task = piping(upstream, lambda _: False)
        await asyncio.sleep(0)
        connection.data_received(chunk_of(b"last") + END)
        assert await soon(task) is True
        assert await soon(upstream.pipe(lambda _: True)) is False


@pytest.mark.parametrize("when", ["at once", "later"])
async def test_what_a_push_raises_is_raised_in_the_task(when: str) -> None:
    def push(piece: bytes) -> bool:
        raise KeyError("ours")

    async with answered(HEAD + (chunk_of(b"a") if when == "at once" else b"")) as (connection, upstream, _):
        task = piping(upstream, push)
        await asyncio.sleep(0)
        if when == "later":
            connection.data_received(chunk_of(b"a"))
        with pytest.raises(KeyError, match="ours"):
            await soon(task)


async def test_a_size_line_between_two_reads_is_not_taken_for_a_chunk() -> None:
    """The content of a chunk may look like a chunk."""
    body = chunk_of(b"2\r\nok\r\n")
    for cut in range(1, len(body)):
        async with answered(HEAD + chunk_of(b"a") + body[:cut]) as (connection, upstream, _):
            connection.data_received(body[cut:])
            connection.data_received(END)
            assert await soon(upstream.read_all(100)) == b"a2\r\nok\r\n"


@pytest.mark.parametrize("seed", range(8))
async def test_however_the_reads_cut_it_the_body_is_the_same(seed: int) -> None:
    chance = random.Random(seed)
    pieces = [bytes(chance.choices(b"\r\n0a1", k=chance.randint(1, 40))) for _ in range(60)]
    raw = b"".join(map(chunk_of, pieces)) + END
    got: list[bytes] = []
    async with answered() as (connection, upstream, _):
        task = piping(upstream, lambda piece: got.append(piece) is None)
        await asyncio.sleep(0)
        while raw:
            # half of the reads end where a chunk does
            size = chance.choice([len(chunk_of(pieces[0])), chance.randint(1, 60)])
            connection.data_received(raw[:size])
            raw = raw[size:]
        assert await soon(task) is False
    assert b"".join(got) == b"".join(pieces)


def streaming(*parts: bytes) -> Script:
    async def script(peer: Peer) -> None:
        await peer.request()
        for part in parts:
            await peer.send(part)
        await peer.left()

    return script


async def asked(pool: Pool, origin: Origin) -> Upstream:
    return await soon(pool.request(origin, "POST", "/x", lambda: [], b"{}"))


async def test_a_body_is_piped_over_a_socket_and_the_connection_is_used_again(pool: Pool) -> None:
    got: list[bytes] = []
    async with scripted(streaming(HEAD, chunk_of(b"a") * 3, chunk_of(b"b") + END)) as server:
        upstream = await asked(pool, server.origin)
        assert await soon(upstream.pipe(lambda piece: got.append(piece) is None)) is False
        upstream.close()
        assert b"".join(got) == b"aaab"
        assert pool.idle_count(server.origin) == 1


@pytest.mark.parametrize("tail", [b"", b"5\r\nab", b"nonsense\r\n"])
async def test_a_cut_is_raised_after_everything_that_came_before_it(pool: Pool, tail: bytes) -> None:
    got: list[bytes] = []

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(HEAD + chunk_of(b"a"))
        await peer.send(chunk_of(b"b") + tail)

    async with scripted(script) as server:
        upstream = await asked(pool, server.origin)
        with pytest.raises(UpstreamCut):
            await soon(upstream.pipe(lambda piece: got.append(piece) is None))
        upstream.close()
        assert b"".join(got) == b"ab" + (b"ab" if tail.startswith(b"5") else b"")


async def test_a_pipe_whose_task_is_cancelled_cuts_the_connection(pool: Pool) -> None:
    got: list[bytes] = []
    async with scripted(streaming(HEAD, chunk_of(b"a"))) as server:
        upstream = await asked(pool, server.origin)
        task = piping(upstream, lambda piece: got.append(piece) is None)
        await until(lambda: got == [b"a"])
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await soon(server.peers[0].played.wait())
        upstream.close()
        assert pool.live_count == pool.idle_count(server.origin) == 0
