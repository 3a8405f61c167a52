"""Every behaviour of Exchange, in both bindings, over uvicorn and real sockets."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

import pytest

from herd_node.net.exchange import BodyTooLarge, ClientGone, Exchange, ExchangeError
from herd_node.net.pool import Pool, UpstreamCut
from tests.net.scripted import soon, until
from tests.net.serving import Binding, Serve, served_by

POST = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"


@pytest.fixture(params=["asgi", "lane"])
def binding(request: pytest.FixtureRequest) -> Binding:
    found: Binding = request.param
    return found


@pytest.fixture
def served(binding: Binding) -> Serve:
    return partial(served_by, binding)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING)
    return caplog


# --- the request --------------------------------------------------------------------------------------------


async def test_a_handler_sees_the_request_as_it_was_sent(served: Serve) -> None:
    seen: list[Any] = []

    async def handler(exchange: Exchange) -> None:
        seen.append((exchange.method, exchange.path, exchange.target, exchange.peer, exchange.content_length))
        seen.append((exchange.header(b"x-a"), exchange.header(b"x-b"), exchange.started, exchange.gone))
        seen.append(await exchange.read_body(10))
        await exchange.respond(200, [(b"x-c", b"1")], b"yes")

    async with served(handler) as server:
        client = await server.connect()
        await client.send(
            b"POST /v1/models/a%2Fb%20c?q=%31 HTTP/1.1\r\nHost: h\r\nX-A: 1\r\nContent-Length: 2\r\n\r\n{}"
        )
        head = await client.head()
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"x-c: 1\r\ncontent-length: 3\r\n" in head
        assert await client.until(b"yes") == b"yes"
    assert seen == [
        ("POST", "/v1/models/a/b c", "/v1/models/a%2Fb%20c?q=%31", "127.0.0.1", 2),
        (b"1", None, False, False),
        b"{}",
    ]


async def test_the_peer_of_a_socket_for_both_families_is_its_plain_address(served: Serve) -> None:
    seen: list[str] = []

    async def handler(exchange: Exchange) -> None:
        seen.append(exchange.peer)
        await exchange.respond(200, [], b"")

    async with served(handler) as server:
        client = await server.connect()
        await until(lambda: len(server.state.connections) == 1)
        server.connection.client = ("::ffff:192.0.2.1", 4000)
        await client.send(POST)
        await client.head()
    assert seen == ["192.0.2.1"]


async def echo(exchange: Exchange) -> None:
    try:
        body = await exchange.read_body(16)
    except BodyTooLarge as error:
        await exchange.respond(413, [], str(error).encode())
    else:
        await exchange.respond(200, [], body)


async def test_a_chunked_body_is_read(served: Serve) -> None:
    async with served(echo) as server:
        client = await server.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n")
        await client.send(b"3\r\ncde\r\n0\r\n\r\n")
        assert b" 200 " in await client.head()
        assert await client.until(b"e") == b"abcde"


async def test_a_body_as_long_as_the_limit_is_read(served: Serve) -> None:
    async with served(echo) as server:
        client = await server.connect()
        await client.post(b"x" * 16)
        assert b" 200 " in await client.head()
        await client.until(b"x" * 16)
        await client.post(b"second")
        assert b" 200 " in await client.head(), "the connection is used again"


async def test_a_body_that_announces_too_much_is_not_waited_for(served: Serve) -> None:
    async with served(echo) as server:
        client = await server.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 17\r\n\r\n")
        assert b" 413 " in await client.head()


async def test_a_chunked_body_stops_at_the_limit(served: Serve) -> None:
    async with served(echo) as server:
        client = await server.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        await client.send(b"11\r\n" + b"x" * 17 + b"\r\n")
        assert b" 413 " in await client.head()


async def test_a_client_that_asks_first_is_told_to_go_on_unless_its_body_is_refused(served: Serve) -> None:
    async with served(echo) as server:
        for length, answer in ((2, b"HTTP/1.1 100 Continue\r\n\r\n"), (17, b"HTTP/1.1 413 ")):
            client = await server.connect()
            await client.send(
                b"POST / HTTP/1.1\r\nHost: h\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % length
            )
            assert (await client.head()).startswith(answer)


async def test_a_client_that_leaves_inside_its_body_is_gone(served: Serve) -> None:
    ended: list[type[BaseException]] = []

    async def handler(exchange: Exchange) -> None:
        try:
            await exchange.read_body(100)
        except BaseException as error:
            ended.append(type(error))
            raise

    async with served(handler) as server:
        client = await server.connect()
        await client.send(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\nab")
        client.leave()
        await until(lambda: bool(ended))
    assert ended == [ClientGone]


# --- the answer ---------------------------------------------------------------------------------------------


async def test_a_stream_goes_out_piece_by_piece_and_ends_properly(served: Serve) -> None:
    go_on = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        await exchange.start(200, [(b"content-type", b"text/event-stream")])
        assert exchange.started
        await exchange.send(b"one")
        await soon(go_on.wait())
        await exchange.finish(b"two")

    async with served(handler) as server:
        client = await server.connect()
        await client.post()
        assert b"transfer-encoding: chunked" in await client.head()
        assert await client.until(b"one\r\n") == b"3\r\none\r\n"
        go_on.set()
        assert await client.until(b"0\r\n\r\n") == b"3\r\ntwo\r\n0\r\n\r\n"


async def test_the_answer_to_head_has_headers_only(served: Serve) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.respond(200, [], b"Ollama is running")

    async with served(handler) as server:
        client = await server.connect()
        await client.send(b"HEAD / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
        raw = await client.rest()
        assert b"content-length: 17\r\n" in raw
        assert raw.endswith(b"\r\n\r\n")


async def test_a_status_without_body_gets_no_length(served: Serve) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.respond(204, [], b"")

    async with served(handler) as server:
        client = await server.connect()
        for request in (b"GET / HTTP/1.1\r\nHost: h\r\n\r\n", POST):
            await client.send(request)
            head = await client.head()
            assert b"content-length" not in head
            assert b"transfer-encoding" not in head


async def test_sending_waits_for_a_slow_client(served: Serve) -> None:
    sent: list[int] = []
    finished = asyncio.Event()
    size, count = 256 * 1024, 64

    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        await exchange.start(200, [])
        for n in range(count):
            await exchange.send(b"x" * size)
            sent.append(n)
        await exchange.finish()
        finished.set()

    async with served(handler) as server:
        client = await server.connect()
        await client.post()
        (connection,) = server.state.connections
        await until(lambda: connection.flow.write_paused)
        for _ in range(100):
            await asyncio.sleep(0)
        held_at = len(sent)
        assert held_at < count
        total = 0
        while total < size * count:  # the chunks' own framing makes it a little more
            total += len(await soon(client.reader.read(1 << 20)))
        await soon(finished.wait())
        assert len(sent) == count


async def test_what_was_sent_before_a_slow_client_is_bounded(served: Serve) -> None:
    sent_bytes = 0

    async def handler(exchange: Exchange) -> None:
        nonlocal sent_bytes
        await exchange.read_body(100)
        exchange.on_gone(lambda: None)
        await exchange.start(200, [])
        while True:
            await exchange.send(b"x" * 200)
            sent_bytes += 200
            await asyncio.sleep(0)

    async with served(handler) as server:
        client = await server.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.post()
        await until(lambda: server.connection.flow.write_paused)
        held_at, kept_bytes = sent_bytes, server.connection.transport.get_write_buffer_size()
        for _ in range(100):
            await asyncio.sleep(0)
        assert kept_bytes < 80 * 1024
        assert sent_bytes == held_at


async def send(exchange: Exchange, piece: bytes) -> bool:
    """Whether it could be pushed."""
    if exchange.push(piece):
        return True
    await exchange.send(piece)
    return False


async def test_pieces_that_are_pushed_arrive_in_order_with_those_that_are_sent(
    served: Serve, binding: Binding
) -> None:
    pushed: list[bool] = []

    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        await exchange.start(200, [])
        for piece in (b"one", b"two", b"", b"three"):
            pushed.append(await send(exchange, piece))
        await exchange.finish(b"end")

    async with served(handler) as server:
        client = await server.connect()
        await client.post()
        await client.head()
        body = await client.until(b"0\r\n\r\n")
        assert body == b"3\r\none\r\n3\r\ntwo\r\n5\r\nthree\r\n3\r\nend\r\n0\r\n\r\n"
    # the first piece takes the head along; ASGI's send is awaited, always
    assert pushed == ([False, True, True, True] if binding == "lane" else [False] * 4)


async def test_a_push_has_the_length_that_the_head_says(served: Serve, log: pytest.LogCaptureFixture) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        await exchange.start(200, [(b"content-length", b"3")])
        for piece in (b"on", b"e", b"more"):
            await send(exchange, piece)

    async with served(handler) as server:
        client = await server.connect()
        await client.post()
        assert (await client.rest()).endswith(b"\r\n\r\none")
    assert len(log.records) == 1


async def test_nothing_is_pushed_to_a_slow_client_nor_to_one_that_has_left(served: Serve) -> None:
    refused, sent_bytes = asyncio.Event(), 0
    ended: list[bool] = []

    async def handler(exchange: Exchange) -> None:
        nonlocal sent_bytes
        await exchange.read_body(100)
        left = asyncio.Event()
        exchange.on_gone(left.set)
        await exchange.start(200, [])
        await exchange.send(b"x")
        while exchange.push(b"x" * 20_000):
            sent_bytes += 20_000
            await asyncio.sleep(0)
        refused.set()
        await soon(left.wait())
        ended.append(exchange.push(b"y"))
        with pytest.raises(ClientGone):
            await exchange.send(b"y")

    async with served(handler) as server:
        client = await server.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        await client.post()
        await soon(refused.wait())
        assert server.connection.transport.get_write_buffer_size() < 90_000
        client.leave()
        await until(lambda: bool(ended))
    assert ended == [False]


async def test_the_head_goes_out_although_no_piece_follows_yet(served: Serve) -> None:
    go_on = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.start(200, [(b"content-length", b"3")])
        await soon(go_on.wait())
        await exchange.send(b"on")
        await exchange.finish(b"e")

    async with served(handler) as server:
        client = await server.connect()
        await client.post()
        assert b"content-length: 3\r\n" in await client.head()
        go_on.set()
        assert await client.until(b"e") == b"one"
        await client.post()
        assert b" 200 " in await client.head()


@pytest.mark.parametrize("pieces", [[b"four"], [b"four", b""], [b"2c"], [b"2", b"c"], [b""]])
async def test_an_answer_that_is_not_as_long_as_it_says_is_cut(
    served: Serve, log: pytest.LogCaptureFixture, pieces: list[bytes]
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        await exchange.start(200, [(b"content-length", b"3")])
        for piece in pieces[:-1]:
            await exchange.send(piece)
        await exchange.finish(pieces[-1])

    async with served(handler) as server:
        client = await server.connect()
        await client.post()
        head, _, rest = (await client.rest()).partition(b"\r\n\r\n")
        assert b"content-length: 3" in head
        assert len(rest) < 3
    assert len(log.records) == 1


@pytest.mark.parametrize("value", [b"a\r\nx-b: 1", b"a\nb", b"a\x00b", b"\x7f"])
async def test_a_header_that_would_become_two_is_not_sent(
    served: Serve, log: pytest.LogCaptureFixture, value: bytes
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        await exchange.respond(200, [(b"x-a", value)], b"")

    async with served(handler) as server:
        client = await server.connect()
        await client.post()
        assert b"x-a" not in await client.rest()
    assert len(log.records) >= 1


async def test_a_large_answer_arrives_whole(served: Serve) -> None:
    body = bytes(range(256)) * 8192

    async def handler(exchange: Exchange) -> None:
        await exchange.respond(200, [], await exchange.read_body(len(body)))

    async with served(handler) as server:
        client = await server.connect()
        sending = asyncio.ensure_future(client.post(body))
        await client.head()
        assert await soon(client.reader.readexactly(len(body))) == body
        await sending


async def test_a_large_body_that_nobody_asks_for_is_not_read(served: Serve) -> None:
    asked, arrived = asyncio.Event(), asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        arrived.set()
        await asked.wait()
        await exchange.respond(200, [], b"%d" % len(await exchange.read_body(4 << 20)))

    async with served(handler) as server:
        client = await server.connect()
        sending = asyncio.ensure_future(client.post(b"x" * (4 << 20)))
        await soon(arrived.wait())
        await until(lambda: server.connection.flow.read_paused)
        asked.set()
        assert b" 200 " in await client.head()
        assert await client.until(b"4194304") == b"4194304"
        await sending


# --- the client leaves --------------------------------------------------------------------------------------


async def test_a_client_that_leaves_in_the_middle_of_a_stream_is_noticed_once(served: Serve) -> None:
    gone = asyncio.Event()
    calls: list[str] = []
    errors: list[type[BaseException]] = []

    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        exchange.on_gone(lambda: calls.append("first"))
        exchange.on_gone(gone.set)
        await exchange.start(200, [])
        await exchange.send(b"one")
        await soon(gone.wait())
        assert exchange.gone
        exchange.on_gone(lambda: calls.append("late"))
        try:
            await exchange.send(b"two")
        except ClientGone as error:
            errors.append(type(error))
            raise

    async with served(handler) as server:
        client = await server.connect()
        await client.post()
        await client.until(b"one")
        client.leave()
        await until(lambda: bool(errors))
    assert calls == ["first", "late"]


async def test_a_client_that_leaves_while_nothing_has_been_sent_is_noticed(served: Serve) -> None:
    began, gone, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        exchange.on_gone(gone.set)
        began.set()
        await soon(gone.wait())
        ended.set()
        await exchange.respond(200, [], b"")

    async with served(handler) as server:
        client = await server.connect()
        await client.post()
        await soon(began.wait())
        client.leave()
        await soon(ended.wait())


async def test_a_client_that_leaves_while_a_send_waits_does_not_hold_it(served: Serve) -> None:
    gone, ended = asyncio.Event(), asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        exchange.on_gone(gone.set)
        await exchange.start(200, [])
        try:
            while True:
                await exchange.send(b"x" * (1 << 20))
        except ClientGone:
            ended.set()
            raise

    async with served(handler) as server:
        client = await server.connect()
        await client.post()
        await client.head()
        client.leave()
        await soon(ended.wait())
        assert gone.is_set()


async def test_nobody_is_gone_when_the_answer_has_ended(served: Serve, log: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        exchange.on_gone(lambda: calls.append(1))
        await exchange.respond(200, [], b"ok")
        for _ in range(5):
            await asyncio.sleep(0)

    async with served(handler) as server:
        client = await server.connect()
        for _ in range(3):
            await client.post()
            await client.head()
            await client.until(b"ok")
            await until(lambda: len(server.endpoint._watchers) == 0)
    assert calls == []
    assert log.records == []


# --- the answer breaks off ----------------------------------------------------------------------------------


async def cut(exchange: Exchange) -> None:
    await exchange.read_body(100)
    exchange.on_gone(lambda: None)
    await exchange.start(200, [])
    await exchange.send(b"one")
    exchange.abort()
    with pytest.raises(ExchangeError):
        await exchange.send(b"two")


async def test_an_aborted_answer_ends_without_its_end_chunk_and_without_noise(
    served: Serve,
    log: pytest.LogCaptureFixture,
) -> None:
    async with served(cut) as server:
        client = await server.connect()
        await client.post()
        await client.head()
        assert await client.rest() == b"3\r\none\r\n"
    assert log.records == []


async def test_the_pool_sees_an_aborted_answer_as_cut(served: Serve) -> None:
    pool = Pool(idle_s=60)
    async with served(cut) as server:
        upstream = await soon(pool.request(server.origin, "POST", "/x", lambda: [], b"{}"))
        assert await soon(upstream.read()) == b"one"
        with pytest.raises(UpstreamCut):
            await soon(upstream.read())
        upstream.close()
    await pool.close()


async def test_an_answer_that_a_handler_forgets_to_end_is_still_reported(
    served: Serve,
    binding: Binding,
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.start(200, [])
        await exchange.send(b"one")

    async with served(handler) as server:
        client = await server.connect()
        await client.post()
        assert (await client.rest()).endswith(b"3\r\none\r\n")
    sentences = {
        "asgi": "ASGI callable returned without completing response.",
        "lane": "error in the handler of /x",
    }
    assert [record.message for record in log.records] == [sentences[binding]]


async def test_nothing_can_be_cut_before_it_has_begun(served: Serve) -> None:
    async def handler(exchange: Exchange) -> None:
        with pytest.raises(ExchangeError):
            exchange.abort()
        await exchange.respond(503, [], b"no")
        exchange.abort()  # and after its end it does nothing

    async with served(handler) as server:
        client = await server.connect()
        await client.post()
        assert b" 503 " in await client.head()
        await client.until(b"no")


async def test_a_handler_that_fails_leaves_no_watcher(served: Serve, log: pytest.LogCaptureFixture) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.read_body(100)
        exchange.on_gone(lambda: None)
        raise KeyError("a bug")

    async with served(handler) as server:
        client = await server.connect()
        await client.post()
        assert b" 500 " in await client.head()
        await until(lambda: len(server.endpoint._watchers) == 0)
    assert "KeyError: 'a bug'" in log.text
