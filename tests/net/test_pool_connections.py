"""Connections of the pool: keeping them, using them again, the keep-alive race, connecting, closing."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from herd_node.net.pool import (
    ConnectFailed,
    ConnectRefused,
    ConnectTimeout,
    HeadTimeout,
    NotConnected,
    Origin,
    Pool,
    ResetBeforeHead,
    Upstream,
    UpstreamCut,
)
from tests.net.scripted import OK, Peer, Scripted, answer, answer_and_close, scripted, soon, until


async def ask(pool: Pool, server: Scripted, body: bytes = b"{}", **more: object) -> bytes:
    """One whole exchange."""
    upstream = await soon(pool.request(server.origin, "POST", "/x", lambda: [], body, **more))  # type: ignore[arg-type]
    try:
        return await soon(upstream.read_all(1 << 20))
    finally:
        upstream.close()


async def open_answer(pool: Pool, server: Scripted, **more: object) -> Upstream:
    return await soon(pool.request(server.origin, "POST", "/x", lambda: [], b"{}", **more))  # type: ignore[arg-type]


# --- what is sent -------------------------------------------------------------------------------------------


async def test_a_request_carries_its_fields_and_the_pools_own_host_and_length(pool: Pool) -> None:
    async with scripted(answer()) as server:
        upstream = await soon(
            pool.request(
                server.origin,
                "POST",
                "/v1/chat/completions?x=%2F",
                lambda: [(b"content-type", b"application/json"), (b"x-request-id", b"7")],
                b'{"model":"m"}',
            )
        )
        assert upstream.status == 200
        assert upstream.headers == [(b"content-length", b"2")]
        assert upstream.header(b"content-length") == b"2"
        assert upstream.header(b"server") is None
        assert await upstream.read() == b"ok"
        assert await upstream.read() == b""
        upstream.close()
        assert server.peers[0].heads == [
            b"POST /v1/chat/completions?x=%%2F HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n"
            b"content-type: application/json\r\nx-request-id: 7\r\ncontent-length: 13\r\n\r\n"
            % server.origin.port
        ]


def test_an_ipv6_host_stands_in_brackets_and_without_its_zone() -> None:
    assert Origin("::1", 11436).host_header() == b"[::1]:11436"
    assert Origin("fe80::1%eth0", 80).host_header() == b"[fe80::1]:80"
    assert Origin("127.0.0.1", 80).host_header() == b"127.0.0.1:80"
    assert Origin("box.local", 80).host_header() == b"box.local:80"


async def test_ipv6_is_spoken(pool: Pool) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with scripted(answer(), host="::1") as server:
        assert await ask(pool, server) == b"ok"
        assert b"\r\nhost: [::1]:%d\r\n" % server.origin.port in server.peers[0].heads[0]


async def test_small_writes_are_not_held_back(pool: Pool) -> None:
    async with scripted(answer()) as server:
        await ask(pool, server)
        (connection,) = pool._open
        sock = connection._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    ("target", "header"),
    [
        ("/x", (b"x-a", b"1\r\nx-b: 2")),
        ("/x", (b"x-a", b"1\nx-b: 2")),
        ("/x", (b"x-a\r\n", b"1")),
        ("/x\r\nx-b: 2", (b"x-a", b"1")),
        ("/x", (b"x-a", b"1\r")),
    ],
)
async def test_a_line_break_in_a_field_is_refused_and_nothing_is_sent(
    pool: Pool, target: str, header: tuple[bytes, bytes]
) -> None:
    async with scripted(answer()) as server:
        with pytest.raises(ValueError, match="line break"):
            await pool.request(server.origin, "POST", target, lambda: [header], b"")
        await until(lambda: pool.live_count == 0)
        assert not server.peers or server.peers[0].heads == []


# --- use again ----------------------------------------------------------------------------------------------


async def test_a_connection_is_used_again(pool: Pool) -> None:
    async with scripted(answer()) as server:
        for _ in range(5):
            assert await ask(pool, server) == b"ok"
            assert pool.idle_count(server.origin) == 1
            assert pool.live_count == 0
        assert len(server.peers) == 1
        assert len(server.peers[0].heads) == 5


async def test_the_connection_used_last_is_used_next(pool: Pool) -> None:
    async with scripted(answer()) as server:
        first, second = await open_answer(pool, server), await open_answer(pool, server)
        assert pool.live_count == 2
        for upstream in (second, first):
            await upstream.read_all(10)
            upstream.close()
        await ask(pool, server)
        assert [len(peer.heads) for peer in server.peers] == [2, 1]


async def test_origins_do_not_share_connections(pool: Pool) -> None:
    async with scripted(answer()) as one, scripted(answer()) as other:
        await ask(pool, one)
        await ask(pool, other)
        assert (pool.idle_count(one.origin), pool.idle_count(other.origin)) == (1, 1)


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nconnection: Keep-Alive, Close\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 2\r\n\r\nok",
        OK + b"garbage",
        OK + OK,
        OK + b"HTTP/1.1 200",
    ],
)
async def test_an_answer_that_ends_its_connection_or_has_something_behind_it_is_the_last(
    pool: Pool, raw: bytes
) -> None:
    async with scripted(answer(raw)) as server:
        assert await ask(pool, server) == b"ok"
        assert pool.idle_count(server.origin) == 0
        assert await ask(pool, server) == b"ok"
        assert len(server.peers) == 2


async def test_no_reuse_is_a_wish_of_the_caller(pool: Pool) -> None:
    async with scripted(answer()) as server:
        upstream = await open_answer(pool, server)
        await upstream.read_all(10)
        upstream.no_reuse()
        upstream.close()
        await soon(server.peers[0].played.wait())
        assert pool.idle_count(server.origin) == 0
        await ask(pool, server)
        await ask(pool, server, reuse=False)
        assert pool.idle_count(server.origin) == 1
        assert len(server.peers) == 3


async def test_bytes_on_an_idle_connection_spoil_it(pool: Pool) -> None:
    async with scripted(answer()) as server:
        await ask(pool, server)
        await server.peers[0].send(OK)
        await until(lambda: pool.idle_count(server.origin) == 0)
        await ask(pool, server)
        assert len(server.peers) == 2


async def test_bytes_behind_an_answer_that_is_still_open_spoil_it(pool: Pool) -> None:
    async with scripted(answer()) as server:
        upstream = await open_answer(pool, server)
        assert await upstream.read_all(10) == b"ok"
        await server.peers[0].send(b"\r\n")
        await until(lambda: not pool._open)
        assert await upstream.read() == b""
        upstream.close()
        assert pool.idle_count(server.origin) == 0


async def test_an_idle_connection_that_the_other_side_closes_is_forgotten(pool: Pool) -> None:
    calls = []
    async with scripted(answer_and_close(OK)) as server:
        await ask(pool, server)
        await until(lambda: pool.idle_count(server.origin) == 0)
        upstream = await soon(pool.request(server.origin, "GET", "/", lambda: calls.append(1) or [], b""))
        assert await upstream.read_all(10) == b"ok"
        upstream.close()
        assert len(calls) == 1, "no race: it was known that the first connection is gone"


async def test_idle_connections_are_closed_when_they_grow_old() -> None:
    pool = Pool(idle_s=0.02)
    async with scripted(answer()) as server, scripted(answer()) as other:
        first, second = await open_answer(pool, server), await open_answer(pool, server)
        await ask(pool, other)
        for upstream in (first, second):
            await upstream.read_all(10)
            upstream.close()
        for peer in (*server.peers, *other.peers):
            await soon(peer.played.wait())
        await until(lambda: not pool._open)
        assert (pool.idle_count(server.origin), pool.idle_count(other.origin)) == (0, 0)
        assert pool._timer is None
        await ask(pool, server)
        await pool.close()


async def test_idle_connections_of_one_origin_can_be_dropped(pool: Pool) -> None:
    async with scripted(answer()) as one, scripted(answer()) as other:
        await ask(pool, one)
        await ask(pool, other)
        pool.close_idle(one.origin)
        assert (pool.idle_count(one.origin), pool.idle_count(other.origin)) == (0, 1)
        await soon(one.peers[0].played.wait())
        pool.close_idle()
        await soon(other.peers[0].played.wait())


# --- R-6 ----------------------------------------------------------------------------------------------------


async def close_on_second(peer: Peer) -> None:
    await peer.request()
    await peer.send(OK)
    await peer.request()


async def reset_on_second(peer: Peer) -> None:
    await close_on_second(peer)
    peer.reset()


@pytest.mark.parametrize("race", [close_on_second, reset_on_second])
async def test_a_kept_connection_closed_without_a_byte_gets_one_resend_signed_anew(pool: Pool, race) -> None:  # type: ignore[no-untyped-def]
    numbers: Iterator[int] = iter(range(100))
    async with scripted(race, answer()) as server:
        for _ in range(2):
            upstream = await soon(
                pool.request(server.origin, "POST", "/x", lambda: [(b"n", b"%d" % next(numbers))], b"{}")
            )
            assert await upstream.read_all(10) == b"ok"
            upstream.close()
        sent = [[head.split(b"\r\n")[2] for head in peer.heads] for peer in server.peers]
        assert sent == [[b"n: 0", b"n: 1"], [b"n: 2"]]


async def just_close(peer: Peer) -> None:
    await peer.request()


async def just_reset(peer: Peer) -> None:
    await peer.request()
    peer.reset()


@pytest.mark.parametrize("fault", [just_close, just_reset])
async def test_the_resend_is_the_only_one(pool: Pool, fault) -> None:  # type: ignore[no-untyped-def]
    async with scripted(close_on_second, fault) as server:
        await ask(pool, server)
        with pytest.raises(ResetBeforeHead):
            await ask(pool, server)
        assert len(server.peers) == 2


async def test_a_resend_that_cannot_connect_says_so(pool: Pool) -> None:
    async with scripted(close_on_second) as server:
        await ask(pool, server)
        server.stop_listening()
        with pytest.raises(ConnectRefused):
            await ask(pool, server)


async def test_half_a_head_on_a_kept_connection_is_no_keep_alive_race(pool: Pool) -> None:
    async def half_a_head(peer: Peer) -> None:
        await close_on_second(peer)
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-")

    async with scripted(half_a_head, answer()) as server:
        await ask(pool, server)
        with pytest.raises(ResetBeforeHead):
            await ask(pool, server)
        assert len(server.peers) == 1


@pytest.mark.parametrize("fault", [just_close, just_reset])
async def test_a_fresh_connection_closed_before_the_head_is_not_resent(pool: Pool, fault) -> None:  # type: ignore[no-untyped-def]
    async with scripted(fault) as server:
        with pytest.raises(ResetBeforeHead):
            await ask(pool, server)
        assert len(server.peers) == 1


# --- connecting ---------------------------------------------------------------------------------------------


async def test_a_closed_port_is_refused(pool: Pool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    with pytest.raises(ConnectRefused) as caught:
        await soon(pool.request(Origin("127.0.0.1", port), "GET", "/", lambda: [], b""))
    assert isinstance(caught.value, NotConnected)
    assert "127.0.0.1" not in str(caught.value)


async def test_a_name_that_cannot_be_looked_up_is_a_failed_connection(pool: Pool) -> None:
    with pytest.raises(ConnectFailed):
        await soon(pool.request(Origin("a" * 70, 80), "GET", "/", lambda: [], b""))


async def test_a_silent_host_is_given_up_after_the_connect_timeout() -> None:
    pool = Pool(idle_s=60, connect_timeout_s=0.05)
    with ExitStack() as sockets:
        # a full accept queue drops what comes next, as a host that vanished does
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = sockets.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        with pytest.raises(ConnectTimeout):
            await soon(pool.request(Origin(*listener.getsockname()), "GET", "/", lambda: [], b""))
        assert pool.live_count == 0
        await pool.close()


# --- deadlines and cancellation -----------------------------------------------------------------------------


async def test_a_head_that_does_not_come_in_time_cuts_the_connection(pool: Pool) -> None:
    left = asyncio.Event()

    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-")
        await peer.left()
        left.set()

    async with scripted(silent) as server:
        with pytest.raises(HeadTimeout):
            await ask(pool, server, head_timeout_s=0.02)
        await soon(left.wait())


async def test_a_head_timeout_on_a_kept_connection_is_not_resent(pool: Pool) -> None:
    async def silent_on_second(peer: Peer) -> None:
        await close_on_second(peer)
        await peer.left()

    async with scripted(silent_on_second) as server:
        await ask(pool, server)
        with pytest.raises(HeadTimeout):
            await ask(pool, server, head_timeout_s=0.02)
        assert len(server.peers) == 1


async def test_a_head_that_comes_in_time_stops_the_clock(pool: Pool) -> None:
    go_on = asyncio.Event()

    async def slow_body(peer: Peer) -> None:
        await peer.request()
        await peer.send(OK[:-1])
        await go_on.wait()
        await peer.send(OK[-1:])
        await peer.left()

    async with scripted(slow_body) as server:
        upstream = await open_answer(pool, server, head_timeout_s=0.02)
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        assert await soon(upstream.read_all(10)) == b"ok"
        upstream.close()
        await until(lambda: pool.idle_count(server.origin) == 1)


@pytest.mark.parametrize("when", ["connecting", "head", "body", "sending"])
async def test_a_cancelled_caller_leaves_no_connection(pool: Pool, when: str) -> None:
    reached, left = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        if when != "connecting":
            await peer.head()
        if when == "body":
            await peer.send(OK[:-1])
        reached.set()
        if when == "sending":
            await soon(cancelled.wait())
        await peer.left()
        left.set()

    async def caller() -> None:
        body = b"x" * (16 << 20) if when == "sending" else b"{}"
        upstream = await pool.request(server.origin, "POST", "/x", lambda: [], body)
        while await upstream.read():
            started_reading.set()

    started_reading, cancelled = asyncio.Event(), asyncio.Event()
    async with scripted(script) as server:
        task = asyncio.create_task(caller())
        if when == "connecting":
            await asyncio.sleep(0)
        elif when == "body":
            await soon(started_reading.wait())
        else:
            await soon(reached.wait())
        task.cancel()
        cancelled.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: not pool._open)
        await soon(left.wait())


# --- closing ------------------------------------------------------------------------------------------------


async def stall_in_body(peer: Peer) -> None:
    await peer.request()
    await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nok")
    await peer.left()


async def test_closing_an_unfinished_answer_cuts_the_connection_at_once(pool: Pool) -> None:
    async with scripted(stall_in_body) as server:
        upstream = await open_answer(pool, server)
        upstream.close()
        upstream.close()
        await soon(server.peers[0].played.wait())
        with pytest.raises(UpstreamCut):
            await upstream.read()


async def test_closing_ends_a_read_that_waits(pool: Pool) -> None:
    async with scripted(stall_in_body) as server:
        upstream = await open_answer(pool, server)
        assert await upstream.read() == b"ok"
        reading = asyncio.create_task(upstream.read())
        await asyncio.sleep(0)
        upstream.close()
        with pytest.raises(UpstreamCut):
            await soon(reading)


async def test_an_answer_that_has_come_whole_need_not_be_read_to_keep_its_connection(pool: Pool) -> None:
    async with scripted(answer()) as server:
        upstream = await open_answer(pool, server)
        await until(lambda: upstream.ended)
        upstream.close()
        upstream.close()
        assert pool.idle_count(server.origin) == 1


async def test_closing_the_pool_leaves_live_answers_to_their_owners(pool: Pool) -> None:
    async with scripted(answer(), stall_in_body, stall_in_body) as server:
        await ask(pool, server)
        idle = pool.idle_count(server.origin)
        live = await open_answer(pool, server, reuse=False)
        await pool.close()
        assert (idle, pool.idle_count(server.origin), pool.live_count) == (1, 0, 1)
        await soon(server.peers[0].played.wait())
        assert await live.read() == b"ok"
        with pytest.raises(RuntimeError, match="closed"):
            await open_answer(pool, server)
        await pool.close(force=True)
        assert pool.live_count == 0
        with pytest.raises(UpstreamCut):
            await live.read()
        live.close()


async def test_a_connection_that_comes_back_to_a_closed_pool_is_closed(pool: Pool) -> None:
    async with scripted(answer()) as server:
        upstream = await open_answer(pool, server)
        await upstream.read_all(10)
        await pool.close()
        upstream.close()
        await soon(server.peers[0].played.wait())
        await until(lambda: not pool._open)


async def test_a_forced_close_is_no_keep_alive_race(pool: Pool) -> None:
    async def silent_on_second(peer: Peer) -> None:
        await close_on_second(peer)
        await peer.left()

    async with scripted(silent_on_second, answer()) as server:
        await ask(pool, server)
        asking = asyncio.create_task(ask(pool, server))
        await until(lambda: len(server.peers[0].heads) == 2)
        await pool.close(force=True)
        with pytest.raises(ResetBeforeHead):
            await asking
        assert len(server.peers) == 1


async def test_headers_that_cannot_be_made_leak_nothing(pool: Pool) -> None:
    def broken() -> list[tuple[bytes, bytes]]:
        raise KeyError("no key")

    async with scripted(answer()) as server:
        await ask(pool, server)
        with pytest.raises(KeyError):
            await pool.request(server.origin, "GET", "/", broken, b"")
        await until(lambda: not pool._open)
