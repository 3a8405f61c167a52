"""Writes of one turn leave together, and none is lost, late, or in another order than it was said."""

from __future__ import annotations

import asyncio
import socket
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from herd_node.net.exchange import Exchange
from herd_node.net.outbox import Outbox
from herd_node.net.pool import Origin, Pool
from tests.net.scripted import answer, scripted, soon, until
from tests.net.serving import Client, Served, served_by

in_lane = partial(served_by, "lane")


class Together:
    """A handler whose answers are given by all waiting requests in one turn of the loop."""

    def __init__(self) -> None:
        self.inside = 0
        self.go = asyncio.Event()
        self.unsaid: list[bool] = []
        """For each answer, whether its connection had nothing to write right after it was given."""

    async def __call__(self, exchange: Exchange) -> None:
        body = await exchange.read_body(1 << 20)
        self.inside += 1
        await self.go.wait()
        await exchange.respond(200, [(b"connection", b"close")] if body == b"last" else [], body)

    async def when(self, count: int) -> None:
        await until(lambda: self.inside == count)


async def clients(server: Served, *bodies: bytes) -> list[Client]:
    found = []
    for body in bodies:
        client = await server.connect()
        await client.post(body)
        found.append(client)
    return found


async def body_of(client: Client, length: int) -> bytes:
    await client.head()
    return await soon(client.reader.readexactly(length))


async def turn() -> None:
    """Let all run that is ready, and no more."""
    await asyncio.sleep(0)


# --- the outbox alone ---------------------------------------------------------------------------------------


class Pair:
    """A transport to write to, and the socket where it comes out."""

    def __init__(self) -> None:
        self.far, near = socket.socketpair()
        self.far.setblocking(False)
        self.near = near

    async def __aenter__(self) -> Pair:
        self.near.setblocking(False)
        self.transport, _ = await asyncio.get_running_loop().create_connection(
            asyncio.Protocol, sock=self.near
        )
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.transport.abort()
        await turn()
        self.far.close()

    def arrived(self) -> bytes:
        try:
            return self.far.recv(1 << 20)
        except BlockingIOError:
            return b""


async def test_what_is_said_in_one_turn_is_written_at_its_end() -> None:
    box = Outbox()
    box.in_work = (1, 2)
    async with Pair() as one, Pair() as other:
        box.write(one.transport, b"a")
        box.write(other.transport, b"b")
        assert (one.arrived(), other.arrived()) == (b"", b"")
        await turn()
        assert (one.arrived(), other.arrived()) == (b"a", b"b")


async def test_who_is_alone_waits_for_nobody() -> None:
    box = Outbox()
    box.in_work = (1,)
    async with Pair() as one:
        box.write(one.transport, b"a")
        assert one.arrived() == b"a"


async def test_a_long_piece_is_not_gathered_and_takes_along_what_stands_before_it() -> None:
    box = Outbox()
    box.in_work = (1, 2)
    async with Pair() as one, Pair() as other:
        box.write(one.transport, b"a")
        box.write(other.transport, b"b" * 65537)
        assert one.arrived() == b"a"
        assert other.arrived()
        assert not box.waiting


async def test_many_short_pieces_are_not_gathered_without_end() -> None:
    """A slow peer is noticed by its transport: what the loop reads in one turn can be megabytes."""
    box = Outbox()
    box.in_work = (1, 2)
    async with Pair() as one:
        for _ in range(17):
            box.write(one.transport, b"a" * 4096)
        assert one.arrived()
        assert not box.waiting


async def test_a_transport_that_closes_meanwhile_takes_nobody_elses_words_away() -> None:
    box = Outbox()
    box.in_work = (1, 2)
    async with Pair() as one, Pair() as other:
        box.write(one.transport, b"a")
        box.write(other.transport, b"b")
        one.transport.abort()
        await turn()
        assert (one.arrived(), other.arrived()) == (b"", b"b")


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.booleans()), max_size=30))
def test_words_to_one_peer_come_in_the_order_in_which_they_were_said(
    steps: list[tuple[int, bool, bool]],
) -> None:
    """Whoever is alone, whenever the loop turns."""

    async def run() -> None:
        box, said, heard = Outbox(), [b"", b"", b""], [b"", b"", b""]
        async with Pair() as a, Pair() as b, Pair() as c:
            pairs = (a, b, c)
            for number, (who, alone, turns) in enumerate(steps):
                word = b"%d " % number
                box.in_work = (1,) if alone else (1, 2)
                box.write(pairs[who].transport, word)
                said[who] += word
                if turns:
                    await turn()
            await turn()
            for who, pair in enumerate(pairs):
                heard[who] = pair.arrived()
        assert heard == said

    asyncio.run(run())


# --- answers ------------------------------------------------------------------------------------------------


async def test_a_connection_tells_how_many_are_in_work() -> None:
    handler = Together()
    async with in_lane(handler) as server:
        await clients(server, b"one", b"two")
        await handler.when(2)
        (lane,) = {type(connection) for connection in server.state.connections}
        assert len(lane.outbox.in_work) == 2
        handler.go.set()


async def test_answers_of_one_turn_reach_their_callers() -> None:
    handler = Together()
    async with in_lane(handler) as server:
        asking = await clients(server, b"one", b"two", b"six")
        await handler.when(3)
        handler.go.set()
        assert [await body_of(client, 3) for client in asking] == [b"one", b"two", b"six"]


async def test_an_answer_is_whole_although_its_connection_ends_with_it() -> None:
    handler = Together()
    async with in_lane(handler) as server:
        asking = await clients(server, b"more", b"last")
        await handler.when(2)
        handler.go.set()
        assert (await asking[1].rest()).endswith(b"\r\n\r\nlast")
        assert await body_of(asking[0], 4) == b"more"


@pytest.mark.parametrize("ends", ["shutdown", "eof_received", "bad_request"])
async def test_an_answer_that_was_given_goes_before_the_connection_ends(ends: str) -> None:
    """A stop, the client's end of sending, and bytes that are no request, all in the turn of the answer."""
    handler = Together()
    async with in_lane(handler) as server:
        asking = await clients(server, b"one", b"two")
        await handler.when(2)
        connections = [x for x in server.state.connections if isinstance(x, HttpToolsProtocol)]

        async def end() -> None:
            await handler.go.wait()
            for connection in connections:
                if ends == "bad_request":
                    connection.data_received(b"\0\0\r\n\r\n")
                elif ends == "shutdown":
                    connection.shutdown()
                elif not connection.eof_received():
                    connection.transport.close()  # as a transport does

        task = asyncio.create_task(end())  # it waits behind both handlers, so it runs right after them
        await turn()
        handler.go.set()
        heard = [await client.rest() for client in asking]
        await task
        assert all(x.startswith(b"HTTP/1.1 200 OK\r\n") for x in heard)
        if ends == "bad_request":
            assert all(x.count(b"HTTP/1.1 400 ") == 1 for x in heard)


async def test_pieces_of_streams_that_begin_alone_and_end_in_company_stay_in_order() -> None:
    company = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        if await exchange.read_body(100) == b"other":
            company.set()
            await exchange.respond(200, [], b"")
            return
        await exchange.start(200, [])
        await exchange.send(b"1")
        await company.wait()
        for word in (b"2", b"3"):
            assert exchange.push(word)
        await exchange.finish(b"4")

    async with in_lane(handler) as server:
        client, other = await server.connect(), await server.connect()
        await client.post()
        await client.until(b"1\r\n1\r\n")
        await other.post(b"other")
        assert await client.until(b"0\r\n\r\n") == b"1\r\n2\r\n1\r\n3\r\n1\r\n4\r\n0\r\n\r\n"


# --- requests -----------------------------------------------------------------------------------------------


async def test_requests_of_one_turn_reach_the_upstream(pool: Pool) -> None:
    pool.outbox.in_work = (1, 2)

    async def ask(origin: Origin, body: bytes) -> bytes:
        upstream = await pool.request(origin, "POST", "/", lambda: [], body)
        try:
            return await upstream.read_all(100)
        finally:
            upstream.close()

    async with scripted(answer()) as peers:
        origin = peers.origin
        for _ in range(2):  # on fresh connections, then on kept ones
            answers = await soon(asyncio.gather(*(ask(origin, b"%d" % n) for n in range(5))))
            assert answers == [b"ok"] * 5
        assert pool.idle_count(origin) == 5


async def test_a_request_that_is_given_up_in_its_turn_is_never_written(pool: Pool) -> None:
    pool.outbox.in_work = (1, 2)

    async with scripted(answer()) as peers:
        origin = peers.origin
        first = await pool.request(origin, "POST", "/", lambda: [], b"1")
        second = await pool.request(origin, "POST", "/", lambda: [], b"2")
        for upstream in (first, second):
            await upstream.read_all(100)
            upstream.close()
        asking = [asyncio.create_task(pool.request(origin, "POST", "/", lambda: [], b"3")) for _ in range(2)]
        await turn()
        assert pool.outbox.waiting
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        assert pool.idle_count(origin) == 0
