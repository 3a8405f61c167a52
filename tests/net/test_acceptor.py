"""Many clients at once are let in within a few turns of the loop, and a full house does not make it spin."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import struct
from collections.abc import AsyncIterator, Iterator

import pytest

from herd_node.net.acceptor import Acceptor
from herd_node.net.asgi import asgi_endpoint
from herd_node.net.exchange import Exchange
from herd_node.net.server import QuietServer, StartPortTaken, bind, port_of
from tests.net.scripted import soon, until


class Door(socket.socket):
    """A listening socket that counts who asks, and can have no descriptor left."""

    asked = 0
    error: OSError | None = None

    def accept(self) -> tuple[socket.socket, object]:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return super().accept()


class Guest(asyncio.Protocol):
    """One who was let in."""

    def __init__(self, guests: list[Guest]) -> None:
        self.guests = guests
        self.heard = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.guests.append(self)

    def data_received(self, data: bytes) -> None:
        self.heard += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.guests.remove(self)


class House:
    """A door, its acceptor, and who is inside."""

    def __init__(self) -> None:
        self.door = Door(socket.AF_INET, socket.SOCK_STREAM)
        self.door.bind(("127.0.0.1", 0))
        self.door.listen(512)
        self.door.setblocking(False)
        self.guests: list[Guest] = []
        self.acceptor = Acceptor(self.door, lambda: Guest(self.guests), pause_s=0.01)

    def ring(self) -> socket.socket:
        return socket.create_connection(self.door.getsockname())


@pytest.fixture
async def house() -> AsyncIterator[House]:
    """A house that must end without a task of its own."""
    house = House()
    yield house
    await house.acceptor.close()
    house.door.close()
    for guest in list(house.guests):
        guest.transport.abort()  # type: ignore[attr-defined]
    await until(lambda: not house.guests)
    assert handing_over() == []


@pytest.fixture
def clients() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def handing_over() -> list[asyncio.Task[object]]:
    return [task for task in asyncio.all_tasks() if task.get_name() == "accepted"]


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def test_who_comes_together_comes_in_together(house: House, clients: contextlib.ExitStack) -> None:
    for _ in range(96):
        clients.enter_context(house.ring())
    await turns(8)
    assert len(house.guests) == 96


async def test_what_they_send_is_heard(house: House, clients: contextlib.ExitStack) -> None:
    for number in range(8):
        clients.enter_context(house.ring()).sendall(b"%d" % number)
    await until(lambda: sorted(guest.heard for guest in house.guests) == [b"%d" % n for n in range(8)])


async def test_who_leaves_before_the_door_opens_does_no_harm(
    house: House, clients: contextlib.ExitStack
) -> None:
    left = house.ring()
    left.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    left.close()
    clients.enter_context(house.ring())
    await until(lambda: len(house.guests) == 1)


async def test_one_that_gave_up_is_passed_over(house: House, clients: contextlib.ExitStack) -> None:
    """BSD and macOS say so; Linux lets it in."""
    house.door.error = ConnectionAbortedError(errno.ECONNABORTED, "it left")
    clients.enter_context(house.ring())
    await until(lambda: house.door.asked > 0)
    house.door.error = None
    await until(lambda: len(house.guests) == 1)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
async def test_without_descriptors_it_pauses_says_so_once_and_goes_on(
    house: House, clients: contextlib.ExitStack, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    house.door.error = OSError(number, "too many open files")
    with caplog.at_level(logging.WARNING):
        clients.enter_context(house.ring())
        await until(lambda: house.door.asked == 1)
        await turns(10)
        assert house.door.asked == 1, "it spins"
        await until(lambda: house.door.asked == 3)
        house.door.error = None
        await until(lambda: len(house.guests) == 1)
    assert [record.getMessage() for record in caplog.records] == [
        "new connections have to wait: too many open files"
    ]


async def test_the_next_shortage_is_told_again(
    house: House, clients: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            house.door.error = OSError(errno.EMFILE, "too many open files")
            clients.enter_context(house.ring())
            await until(lambda told=number: len(caplog.records) == told)  # type: ignore[misc]
            house.door.error = None
            await until(lambda inside=number: len(house.guests) == inside)  # type: ignore[misc]


async def test_a_closed_door_lets_nobody_in_and_leaves_who_is_inside(
    house: House, clients: contextlib.ExitStack
) -> None:
    inside = clients.enter_context(house.ring())
    await until(lambda: house.door.asked > 0)
    await house.acceptor.close()
    assert len(house.guests) == 1, "close returned before who had come had a protocol"
    clients.enter_context(house.ring())
    inside.sendall(b"still here")
    await until(lambda: house.guests[0].heard == b"still here")
    assert len(house.guests) == 1


async def test_it_can_be_closed_while_it_pauses(house: House, clients: contextlib.ExitStack) -> None:
    house.door.error = OSError(errno.EMFILE, "too many open files")
    clients.enter_context(house.ring())
    await until(lambda: house.door.asked == 1)
    await house.acceptor.close()
    loop = asyncio.get_running_loop()
    past_s = loop.time() + 0.03
    await until(lambda: loop.time() > past_s)
    assert house.door.asked == 1


# --- in the server ------------------------------------------------------------------------------------------


async def answer(exchange: Exchange) -> None:
    await exchange.respond(200, [], b"")


def quiet_server() -> QuietServer:
    return QuietServer(asgi_endpoint(answer), on_stop=lambda _: None, graceful_s=1)


async def test_a_server_lets_in_by_the_dozen_and_a_stop_closes_its_port(
    clients: contextlib.ExitStack,
) -> None:
    server, sockets = quiet_server(), bind("127.0.0.1", 0)
    port = port_of(sockets)
    serving = asyncio.ensure_future(server.serve(sockets))
    await until(lambda: server.started)
    for _ in range(96):
        clients.enter_context(socket.create_connection(("127.0.0.1", port)))
    await turns(8)
    assert len(server.server_state.connections) == 96
    server.stop()
    await soon(serving)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    assert handing_over() == []


async def test_a_server_that_is_cancelled_leaves_no_port_open() -> None:
    server, sockets = quiet_server(), bind("127.0.0.1", 0)
    port = port_of(sockets)
    serving = asyncio.ensure_future(server.serve(sockets))
    await until(lambda: server.started)
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


async def test_both_families_are_let_in(clients: contextlib.ExitStack) -> None:
    try:
        bind("::1", 0)[0].close()
    except StartPortTaken:
        pytest.skip("no IPv6 here")
    server, sockets = quiet_server(), bind("localhost", 0)
    serving = asyncio.ensure_future(server.serve(sockets))
    await until(lambda: server.started)
    for host in ("127.0.0.1", "::1"):
        clients.enter_context(socket.create_connection((host, port_of(sockets))))
    await until(lambda: len(server.server_state.connections) == 2)
    server.stop()
    await soon(serving)
