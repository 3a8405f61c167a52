"""What the lane takes, what it leaves to ASGI, and what stays uvicorn's."""

from __future__ import annotations

import asyncio
import gc
import weakref
from functools import partial

import pytest
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from herd_node.net import lane_exchange
from herd_node.net.asgi import asgi_endpoint
from herd_node.net.exchange import ClientGone, Exchange
from herd_node.net.lane import lane_protocol
from herd_node.net.lane_exchange import LaneExchange
from herd_node.net.pool import Origin, Pool, UpstreamCut
from herd_node.net.server import QuietServer, bind, port_of
from tests.net.scripted import Peer, scripted, soon, until
from tests.net.serving import Client, served_by

in_lane = partial(served_by, "lane")
HEAD = b"POST /x HTTP/1.1\r\nHost: h\r\n"


async def echo(exchange: Exchange) -> None:
    await exchange.respond(200, [], await exchange.read_body(1 << 20))


async def answer(client: Client) -> tuple[bytes, bytes]:
    """Head and body of an answer with a content-length."""
    head = await client.head()
    length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return head, await soon(client.reader.readexactly(length))


# --- what it takes ------------------------------------------------------------------------------------------


async def test_a_plain_post_is_taken_with_its_query() -> None:
    seen: list[tuple[str, str, str, str]] = []

    async def handler(exchange: Exchange) -> None:
        seen.append((exchange.method, exchange.path, exchange.target, exchange.peer))
        await echo(exchange)

    async with in_lane(handler) as server:
        client = await server.connect()
        await client.post(b"{}", b"/x?beta=true")
        assert (await answer(client))[1] == b"{}"
        assert server.took == ["lane"]
    assert seen == [("POST", "/x", "/x?beta=true", "127.0.0.1")]


async def test_a_connection_is_used_again_and_again_by_both_bindings() -> None:
    async with in_lane(echo) as server:
        client = await server.connect()
        for n in range(3):
            await client.post(b"%d" % n)
            head, body = await answer(client)
            assert (body, head.count(b"\r\ndate: ")) == (b"%d" % n, len(server.state.default_headers))
            await client.send(HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n")
            assert (await answer(client))[1] == b"ab"
        assert server.took == ["lane", "asgi"] * 3
        assert server.state.total_requests == 6


@pytest.mark.parametrize(
    "raw",
    [
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\nab",
        HEAD + b"Content-Length: 2\r\nUpgrade: h2c\r\n\r\nab",
        HEAD + b"\r\n",
        b"POST /%78 HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nab",
        b"POST http://h/x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nab",
        b"POST /elsewhere HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nab",
        b"PUT /x HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nab",
        b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n",
        b"HEAD /x HTTP/1.1\r\nHost: h\r\n\r\n",
    ],
    ids=["chunked", "expect", "upgrade", "no-length", "escaped", "absolute", "path", "put", "get", "head"],
)
async def test_the_rest_goes_on_to_asgi(raw: bytes) -> None:
    async with in_lane(echo) as server:
        client = await server.connect()
        await client.send(raw)
        while (head := await client.head()).startswith(b"HTTP/1.1 100 "):
            pass
        assert b" 200 " in head
        assert server.took == ["asgi"]


async def test_a_body_above_the_limit_goes_on_to_asgi() -> None:
    async with in_lane(echo, 4) as server:
        client = await server.connect()
        for body, binding in ((b"four", "lane"), (b"fives", "asgi")):
            await client.post(body)
            assert (await answer(client))[1] == body
            assert server.took[-1] == binding


@pytest.mark.parametrize("tail", [b"\r\n", b"Connection: keep-alive\r\n\r\n"])
async def test_http_1_0_gets_one_answer_that_ends_with_the_connection(tail: bytes) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        await exchange.start(200, [])
        await exchange.send(b"one")
        await exchange.finish(b"two")

    async with in_lane(handler) as server:
        client = await server.connect()
        await client.send(b"POST /x HTTP/1.0\r\nContent-Length: 2\r\n" + tail + b"ab")
        head, _, body = (await client.rest()).partition(b"\r\n\r\n")
        assert b"\r\nconnection: close" in head
        assert b"transfer-encoding" not in head
        assert (body, server.took) == (b"onetwo", ["lane"])


async def test_a_client_that_asks_to_close_is_closed_after_its_answer() -> None:
    async with in_lane(echo) as server:
        client = await server.connect()
        await client.send(HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\nab")
        raw = await client.rest()
        assert b"\r\nconnection: close\r\n" in raw
        assert raw.endswith(b"\r\n\r\nab")
        assert server.took == ["lane"]


async def test_an_answer_that_says_close_closes() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.respond(413, [(b"connection", b"close")], b"no")

    async with in_lane(handler) as server:
        client = await server.connect()
        await client.send(HEAD + b"Content-Length: 9000\r\n\r\nab")
        raw = await client.rest()
        assert (raw.count(b"connection: close"), raw[-2:]) == (1, b"no")


async def test_a_request_that_drips_byte_by_byte_is_one_request() -> None:
    async with in_lane(echo) as server:
        client = await server.connect()
        await client.drip(HEAD + b"X-A: 1\r\nContent-Length: 12\r\n\r\nhello, world")
        assert (await answer(client))[1] == b"hello, world"
        assert server.took == ["lane"]


# --- what it keeps ------------------------------------------------------------------------------------------


class Held:
    """Something that a request holds."""


async def test_an_idle_connection_keeps_nothing_of_its_last_request() -> None:
    held: list[weakref.ref[Held]] = []
    exchanges: list[Exchange] = []

    async def handler(exchange: Exchange) -> None:
        one = Held()
        held.append(weakref.ref(one))
        exchanges.append(exchange)
        await exchange.read_body(100)
        exchange.on_gone(partial(str, one))
        await exchange.respond(200, [], b"ok")

    async with in_lane(handler) as server:
        client = await server.connect()
        await client.post()
        await answer(client)
        await until(lambda: not server.state.tasks)
        assert held[0]() is None
        client.leave()
        await until(lambda: not server.state.connections)
        assert not exchanges[0].gone, "it had got everything"


async def test_the_rest_of_a_request_that_has_been_answered_is_dropped() -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.respond(403, [], b"no")

    async with in_lane(handler) as server:
        client = await server.connect()
        await client.send(HEAD + b"Content-Length: 200000\r\n\r\n")
        assert (await answer(client))[1] == b"no"
        first = server.connection.cycle
        assert isinstance(first, LaneExchange)
        await client.send(b"x" * 200000 + HEAD + b"Content-Length: 0\r\n\r\n")
        assert (await answer(client))[1] == b"no"
        assert first._pieces == []
        assert server.took == ["lane", "lane"]


async def test_nothing_is_written_to_a_connection_that_was_lost_before_its_head_went_out() -> None:
    async def handler(exchange: Exchange) -> None:
        assert isinstance(exchange, LaneExchange)
        await exchange.start(200, [])
        exchange.leave()
        await asyncio.sleep(0)
        server.connection.transport.close()
        raise ClientGone

    async with in_lane(handler) as server:
        client = await server.connect()
        await client.post()
        assert await client.rest() == b""


async def test_a_cut_answer_that_the_client_does_not_read_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lane_exchange, "_LINGER_S", 0.01)

    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        await exchange.start(200, [])
        while not server.connection.flow.write_paused:
            await exchange.send(b"x" * 65536)
        exchange.abort()

    async with in_lane(handler) as server:
        client = await server.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.post()
        await until(lambda: server.took == ["lane"])
        await until(lambda: not server.state.connections)


# --- several requests at once -------------------------------------------------------------------------------


async def test_pipelined_requests_are_answered_one_at_a_time_in_order() -> None:
    running, most = 0, 0

    async def handler(exchange: Exchange) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        body = await exchange.read_body(100)
        await asyncio.sleep(0)
        running -= 1
        await exchange.respond(200, [], body)

    async with in_lane(handler) as server:
        client = await server.connect()
        await client.send(b"".join(HEAD + b"Content-Length: 1\r\n\r\n%d" % n for n in range(4)))
        assert [(await answer(client))[1] for _ in range(4)] == [b"0", b"1", b"2", b"3"]
        assert (most, server.took) == (1, ["lane", "asgi", "asgi", "asgi"])
        await client.post(b"after")
        assert (await answer(client))[1] == b"after"
        assert server.took[-1] == "lane"


async def test_reading_stops_while_a_pipelined_request_waits() -> None:
    go_on = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        await soon(go_on.wait())
        await exchange.respond(200, [], b"ok")

    async with in_lane(handler) as server:
        client = await server.connect()
        await client.post()
        await until(lambda: server.took == ["lane"])
        assert not server.connection.flow.read_paused
        await client.post()
        await until(lambda: server.connection.flow.read_paused)
        go_on.set()
        assert [(await answer(client))[1] for _ in range(2)] == [b"ok", b"ok"]
        assert not server.connection.flow.read_paused


async def test_a_client_that_leaves_while_another_request_waits_behind_is_noticed_by_writing() -> None:
    ended: list[bool] = []

    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        exchange.on_gone(lambda: ended.append(exchange.gone))
        await exchange.start(200, [])
        while True:
            await exchange.send(b"x" * 65536)
            await asyncio.sleep(0)

    async with in_lane(handler) as server:
        client = await server.connect()
        await client.post()
        await client.post()
        await until(lambda: bool(server.state.connections) and server.connection.flow.read_paused)
        client.leave()
        await until(lambda: not server.state.tasks)
        assert (ended, server.took) == ([True], ["lane"])


# --- framing attacks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        b"Content-Length: 2\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 2",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked, identity",
        b"Content-Length: 2\r\nContent-Length: 2",
        b"Content-Length: 2\r\nContent-Length: 0",
        b"Content-Length: 2, 2",
        b"Content-Length: 2 2",
        b"Content-Length: +2",
        b"Content-Length: -2",
        b"Content-Length: 0x2",
        b"Content-Length: 2_0",
        b"Content-Length: ",
        b"Content-Length: 99999999999999999999",
        b"Content-Length : 2",
        b"Content-Length: 2\r\n X: folded",
        b"X: a\x00b\r\nContent-Length: 2",
        b"X: a\rContent-Length: 2",
    ],
)
@pytest.mark.parametrize("binding", ["asgi", "lane"])
async def test_framing_that_contradicts_itself_gives_no_handler_a_body(binding: str, fields: bytes) -> None:
    bodies: list[bytes] = []

    async def handler(exchange: Exchange) -> None:
        bodies.append(await exchange.read_body(100))
        await exchange.respond(200, [], b"")

    async with served_by("lane" if binding == "lane" else "asgi", handler) as server:
        client = await server.connect()
        await client.send(HEAD + fields + b"\r\n\r\n0\r\n\r\n" + HEAD + b"Content-Length: 0\r\n\r\n")
        raw = await client.rest()
        assert raw.startswith(b"HTTP/1.1 400 ")
        assert raw.count(b"HTTP/1.1") == 1
    assert bodies == []


# --- what stays uvicorn's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
async def test_a_connection_that_has_ended_does_not_wait_for_the_collector(whole: bool) -> None:
    ends: list[weakref.ref[HttpToolsProtocol]] = []

    async def handler(exchange: Exchange) -> None:
        assert isinstance(exchange, LaneExchange)
        ends.append(weakref.ref(exchange._lane))
        await exchange.read_body(100)
        await exchange.start(200, [])
        await exchange.send(b"one")
        if whole:
            await exchange.finish(b"two")
        else:
            await until(lambda: exchange.gone)
            exchange.abort()

    gc.collect()
    gc.disable()
    try:
        async with in_lane(handler) as server:
            client = await server.connect()
            await client.post()
            await client.until(b"one\r\n")
            client.leave()
            await until(lambda: ends[0]() is None)
    finally:
        gc.enable()


async def test_an_idle_connection_is_closed_after_its_time() -> None:
    async with in_lane(echo) as server:
        server.config.timeout_keep_alive = 0
        client = await server.connect()
        await client.post()
        await answer(client)
        assert await client.rest() == b""


@pytest.mark.slow
async def test_a_stop_lets_a_stream_finish_and_closes_idle_connections() -> None:
    go_on = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        await exchange.start(200, [])
        await exchange.send(b"one")
        await soon(go_on.wait())
        await exchange.finish(b"two")

    sockets = bind("127.0.0.1", 0)
    server = QuietServer(
        asgi_endpoint(handler),
        on_stop=lambda count: None,
        graceful_s=5,
        http=lane_protocol({"/x": handler}, 1 << 20),
    )
    assert server.config.limit_concurrency is None, "the lane would pass it by"
    serving = asyncio.ensure_future(server.serve(sockets))
    streaming, idle = [
        Client(*await asyncio.open_connection("127.0.0.1", port_of(sockets))) for _ in range(2)
    ]
    await streaming.post()
    await streaming.until(b"one\r\n")
    server.stop()
    assert await idle.rest() == b""
    assert not serving.done()
    go_on.set()
    assert await streaming.rest() == b"3\r\ntwo\r\n0\r\n\r\n"
    await soon(serving)
    idle.leave()
    streaming.leave()


@pytest.mark.slow
async def test_a_forced_end_cancels_what_runs() -> None:
    began = asyncio.Event()
    ended: list[type[BaseException]] = []

    async def handler(exchange: Exchange) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except BaseException as error:
            ended.append(type(error))
            raise

    async with in_lane(handler) as server:
        client = await server.connect()
        await client.post()
        await soon(began.wait())
        for task in server.state.tasks:
            task.cancel()
        assert await client.rest() == b""
    assert ended == [asyncio.CancelledError]


# --- back-pressure through both ends ------------------------------------------------------------------------


async def test_a_client_that_reads_nothing_costs_a_bounded_buffer() -> None:
    """From the upstream's socket to the client's: what is held for one request that nobody reads."""
    stop = asyncio.Event()

    async def endless(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        try:
            while not stop.is_set():
                await peer.send(b"c8\r\n" + b"x" * 200 + b"\r\n")
                await asyncio.sleep(0)
        except ConnectionError:
            pass

    pool = Pool(idle_s=60)
    held: list[int] = []

    async with scripted(endless) as source:
        async with in_lane(partial(_relay, pool, source.origin)) as server:
            client = await server.connect()
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await client.post()
            await until(lambda: bool(server.state.connections) and server.connection.flow.write_paused)
            (upstream,) = [one.upstream for one in pool._open]
            assert upstream is not None
            await until(lambda: upstream._paused)
            held.append(upstream._buffered_bytes + server.connection.transport.get_write_buffer_size())
        stop.set()
        await pool.close(force=True)
    assert held[0] <= 256 * 1024


async def _relay(pool: Pool, origin: Origin, exchange: Exchange) -> None:
    upstream = await pool.request(origin, "POST", "/", lambda: [], await exchange.read_body(100))
    try:
        await exchange.start(200, [])
        while piece := await upstream.read():
            await exchange.send(piece)
    except UpstreamCut:
        exchange.abort()
    finally:
        upstream.close()
