"""uvicorn made quiet: our own sockets, signals that let `finally` run, a stop that is graceful or at once."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from herd_node.net.asgi import asgi_endpoint
from herd_node.net.exchange import Exchange
from herd_node.net.server import QuietServer, StartPortTaken, bind, catch_signals, port_of, serve
from herd_node.runtime.tasks import Tasks
from tests.agent.agent_kit import Line


def close(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


def has_ipv6() -> bool:
    try:
        close(bind("::1", 0))
    except StartPortTaken:
        return False
    return True


def test_all_interfaces_are_both_families_on_one_port() -> None:
    sockets = bind("*", 0)
    ports = {sock.getsockname()[1] for sock in sockets}
    families = {sock.family for sock in sockets}
    close(sockets)
    assert len(ports) == 1
    assert families == ({socket.AF_INET, socket.AF_INET6} if has_ipv6() else {socket.AF_INET})


def test_the_ipv6_socket_leaves_ipv4_to_the_other_one() -> None:
    if not has_ipv6():
        pytest.skip("no IPv6 here")
    sockets = bind("", 0)
    six = [sock for sock in sockets if sock.family == socket.AF_INET6]
    only = [sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) for sock in six]
    close(sockets)
    assert only == [1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "*"])
def test_a_taken_port_is_one_sentence(host: str) -> None:
    taken = bind("127.0.0.1", 0)
    port = port_of(taken)
    with pytest.raises(StartPortTaken, match=f"^Port {port} is already in use on this machine; .*--port.$"):
        bind(host, port)
    close(taken)


def test_a_port_that_is_free_again_can_be_taken_at_once() -> None:
    first = bind("127.0.0.1", 0)
    port = port_of(first)
    with socket.create_connection(("127.0.0.1", port)):
        accepted, _ = first[0].accept() if first[0].getblocking() else _accept(first[0])
        accepted.close()
    close(first)
    close(bind("127.0.0.1", port))


def _accept(sock: socket.socket) -> tuple[socket.socket, object]:
    sock.setblocking(True)
    return sock.accept()


def test_an_address_that_is_not_ours_is_one_sentence() -> None:
    with pytest.raises(StartPortTaken, match=r"^Cannot listen on port 1234 of 198\.51\.100\.1: "):
        bind("198.51.100.1", 1234)


def test_a_name_that_does_not_resolve_is_one_sentence() -> None:
    with pytest.raises(StartPortTaken, match="is not an address of this machine"):
        bind("no such host", 1234)


class Place:
    """A server with one handler."""

    def __init__(self, *, hold: bool = False, graceful_s: float = 5) -> None:
        self.release = asyncio.Event()
        self.entered = asyncio.Event()
        self.stops: list[int] = []
        self.sockets = bind("127.0.0.1", 0)
        self.port = port_of(self.sockets)
        self.server = QuietServer(
            asgi_endpoint(self._handle), on_stop=self.stops.append, graceful_s=graceful_s, hold=hold
        )
        self.tasks = Tasks("place")
        self.lines: list[Line] = []

    async def _handle(self, exchange: Exchange) -> None:
        await exchange.read_body(1000)
        if exchange.path == "/wait":
            await exchange.start(200, [(b"content-type", b"text/plain")])
            await exchange.send(b"a")
            self.entered.set()
            await self.release.wait()
            await exchange.finish(b"b")
            return
        await exchange.respond(200, [(b"content-type", b"text/plain")], b"ok")

    async def line(self, path: str) -> Line:
        line = await Line.open(self.port)
        line.send("GET", path, {})
        self.lines.append(line)
        return line


@pytest.fixture
async def make_place() -> AsyncIterator[Callable[..., Place]]:
    places: list[Place] = []

    def make(**options: bool | float) -> Place:
        place = Place(**options)  # type: ignore[arg-type]
        place.serving = place.tasks.spawn(place.server.serve(place.sockets), name="serve")  # type: ignore[attr-defined]
        places.append(place)
        return place

    yield make
    for place in places:
        place.server.force()
        for line in place.lines:
            await line.close()
        await place.serving  # type: ignore[attr-defined]
        await place.tasks.close()


async def test_the_first_signal_lets_what_runs_finish_and_closes_the_port_at_once(
    make_place: Callable[..., Place],
) -> None:
    place = make_place()
    line = await place.line("/wait")
    await place.entered.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(2):
        while True:
            try:
                late = await Line.open(place.port)
            except ConnectionRefusedError:
                break
            await late.close()
            await asyncio.sleep(0)
    assert place.stops == [1]
    place.release.set()
    answer = await line.answer()
    assert (answer.body, answer.whole) == (b"ab", True)
    await asyncio.wait_for(place.serving, 2)  # type: ignore[attr-defined]


async def test_the_second_signal_cuts_everything(make_place: Callable[..., Place]) -> None:
    place = make_place()
    line = await place.line("/wait")
    await place.entered.wait()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.wait_for(asyncio.shield(place.serving), 2)  # type: ignore[attr-defined]
    assert place.stops == [1, 2]
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await line.head()
        await line.chunk()
        await line.chunk()
    place.release.set()


async def test_while_it_holds_it_goes_on_serving_until_it_is_told(make_place: Callable[..., Place]) -> None:
    place = make_place(hold=True)
    assert (await (await place.line("/")).answer()).body == b"ok"
    os.kill(os.getpid(), signal.SIGTERM)
    line = await place.line("/")
    assert (await line.answer()).body == b"ok"
    assert place.stops == [1]
    place.server.stop()
    await asyncio.wait_for(asyncio.shield(place.serving), 2)  # type: ignore[attr-defined]


async def test_what_outlasts_the_graceful_time_is_cut(make_place: Callable[..., Place]) -> None:
    place = make_place(graceful_s=1)
    line = await place.line("/wait")
    await place.entered.wait()
    place.server.stop()
    await asyncio.wait_for(asyncio.shield(place.serving), 3)  # type: ignore[attr-defined]
    assert not (await line.answer()).whole


async def test_the_old_signal_handlers_are_put_back_and_finally_runs() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    sockets = bind("127.0.0.1", 0)
    ran = []

    async def hello(exchange: Exchange) -> None:
        await exchange.respond(200, [], b"ok")

    async def whole() -> None:
        try:
            await serve(asgi_endpoint(hello), sockets, on_stop=ran.append, graceful_s=1)
        finally:
            ran.append(9)

    tasks = Tasks("t")
    serving = tasks.spawn(whole(), name="whole")
    line = await Line.open(port_of(sockets))
    line.send("GET", "/", {})
    assert (await line.answer()).body == b"ok"  # it serves, so the handlers are in place
    await line.close()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(serving, 2)
    assert ran == [1, 9]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


async def test_signals_are_heard_inside_the_loop() -> None:
    heard: asyncio.Queue[int] = asyncio.Queue()
    with catch_signals(heard.put_nowait):
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(heard.get(), 1) == signal.SIGTERM


async def test_garbage_from_a_stranger_leaves_no_line_in_the_log(
    make_place: Callable[..., Place], caplog: pytest.LogCaptureFixture
) -> None:
    place = make_place()
    line = await Line.open(place.port)
    place.lines.append(line)
    with caplog.at_level(logging.WARNING):
        line.writer.write(b"\x16\x03\x01 not http\r\n\r\n")
        assert (await line.head())[0] == 400
    assert caplog.records == []
