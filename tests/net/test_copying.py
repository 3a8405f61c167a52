"""A body copied from an upstream to a client, in both bindings: bytes, framing, cuts, slow clients."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from herd_node.net.copying import copy_body
from herd_node.net.exchange import ClientGone, Exchange, Handler
from herd_node.net.pool import Pool, Upstream, UpstreamCut
from tests.net.scripted import Peer, Script, Scripted, scripted, soon, until
from tests.net.serving import Binding, Serve, served_by

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(params=["asgi", "lane"])
def served(request: pytest.FixtureRequest) -> Serve:
    binding: Binding = request.param
    return partial(served_by, binding)


def copier(pool: Pool, server: Scripted, seen: list[BaseException] | None = None) -> Handler:
    """Answers with what the upstream answers, its content-length included."""

    async def handler(exchange: Exchange) -> None:
        body = await exchange.read_body(100)
        task = asyncio.current_task()
        assert task is not None
        exchange.on_gone(task.cancel)
        upstream: Upstream = await pool.request(server.origin, "POST", "/x", lambda: [], body)
        try:
            await exchange.start(200, [row for row in upstream.headers if row[0] == b"content-length"])
            await copy_body(upstream, exchange)
        except UpstreamCut:
            exchange.abort()
        except (ClientGone, asyncio.CancelledError) as error:
            if seen is not None:
                seen.append(error)
            raise ClientGone("left") from error
        finally:
            upstream.close()

    return handler


def script_of(*parts: bytes) -> Script:
    async def script(peer: Peer) -> None:
        await peer.request()
        for part in parts:
            await peer.send(part)
            await asyncio.sleep(0)
        await asyncio.Event().wait()

    return script


@pytest.mark.parametrize(
    ("parts", "body"),
    [
        ((CHUNKED, b"2\r\nab\r\n", b"1\r\nc\r\n2\r\nde\r\n", b"1\r\nf\r\n0\r\n\r\n"), b"abcdef"),
        ((CHUNKED + b"2\r\nab\r\n0\r\n\r\n",), b"ab"),
        ((CHUNKED + b"2\r\nab\r\n", b"0\r\n\r\n"), b"ab"),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab", b"c"), b"abc"),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",), b""),
    ],
)
async def test_a_body_is_passed_through_and_ended(
    served: Serve, pool: Pool, parts: tuple[bytes, ...], body: bytes
) -> None:
    async with scripted(script_of(*parts)) as server, served(copier(pool, server)) as front:
        back = await soon(pool.request(front.origin, "POST", "/x", lambda: [], b"{}"))
        assert await soon(back.read_all(100)) == body
        assert back.ended
        back.close()
        await until(lambda: pool.idle_count(server.origin) == 1)
        pool.close_idle()


@pytest.mark.parametrize("head", [CHUNKED, b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n"])
async def test_a_body_that_is_cut_is_cut_here_too(served: Serve, pool: Pool, head: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(head + b"2\r\nab\r\n")

    async with scripted(script) as server, served(copier(pool, server)) as front:
        back = await soon(pool.request(front.origin, "POST", "/x", lambda: [], b"{}"))
        with pytest.raises(UpstreamCut):
            await soon(back.read_all(100))
        back.close()


async def test_a_slow_client_bounds_what_is_kept_and_gets_it_all_in_the_end(
    served: Serve, pool: Pool
) -> None:
    piece, count = b"#" * 8192, 2000
    sent = 0

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        peer.writer.write(CHUNKED)
        for _ in range(count):
            peer.writer.write(b"2000\r\n" + piece + b"\r\n")
            await peer.writer.drain()
            sent += 1
        await peer.send(b"0\r\n\r\n")
        await asyncio.Event().wait()

    async with scripted(script) as server, served(copier(pool, server)) as front:
        client = await front.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.post()
        await until(lambda: len(front.state.connections) == 1 and front.connection.flow.write_paused)
        held, turns = -1, 0
        while held != sent or turns < 200:  # until the upstream is not read any more
            held, turns = sent, turns + 1 if held == sent else 0
            await asyncio.sleep(0)
        assert sent < count
        assert front.connection.transport.get_write_buffer_size() < 400 * 1024
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        raw = bytearray()
        while not raw.endswith(b"\r\n0\r\n\r\n"):
            raw += await soon(client.reader.read(1 << 20))
        assert raw.count(b"#") == len(piece) * count


async def test_a_client_that_leaves_cuts_the_upstream_at_once(served: Serve, pool: Pool) -> None:
    seen: list[BaseException] = []
    async with scripted(script_of(CHUNKED + b"2\r\nab\r\n")) as server:
        async with served(copier(pool, server, seen)) as front:
            client = await front.connect()
            await client.post()
            await client.until(b"ab")
            client.leave()
            await soon(server.peers[0].left())
        assert len(seen) == 1
