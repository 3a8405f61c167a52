"""The lane serves what the route table serves: the same rows, the same admission, the same answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from herd.app import Router
from herd.errors import Forbidden
from herd.request import Principal
from herd.web import routes
from herd_node.net.exchange import Exchange
from herd_node.net.lane_exchange import LaneExchange
from herd_node.protocol.routes import FORWARDED, Route
from tests.net.scripted import soon
from tests.net.serving import Client
from tests.router.kit import running, settings

PATHS = [route.path for route in FORWARDED if route.body == "whole"]


@pytest.fixture
async def router(tmp_path: Path) -> AsyncIterator[Router]:
    async with running(Router(settings(tmp_path))) as router:
        yield router


@pytest.fixture
async def client(router: Router) -> AsyncIterator[Client]:
    client = Client(*await asyncio.open_connection("127.0.0.1", router.port))
    yield client
    client.writer.close()
    await client.writer.wait_closed()


def exchange_of(router: Router) -> LaneExchange | None:
    """The last one in the lane, of the only connection that is open."""
    assert router._server is not None
    (connection,) = router._server.server_state.connections
    found = connection._latest  # type: ignore[union-attr]
    assert found is None or isinstance(found, LaneExchange)
    return found


async def ask(client: Client, path: str, body: bytes, *, chunked: bool) -> tuple[bytes, bytes]:
    head = b"POST %b HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\n" % path.encode()
    if chunked:
        await client.send(
            head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        )
    else:
        await client.send(head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body))
    answer = await client.head()
    length = int(answer.partition(b"content-length: ")[2].partition(b"\r\n")[0])
    return answer, await soon(client.reader.readexactly(length))


def status(head: bytes) -> bytes:
    return head.partition(b"\r\n")[0]


def names(head: bytes) -> list[bytes]:
    return sorted(line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:] if line)


@pytest.mark.parametrize("path", PATHS)
async def test_both_bindings_give_every_forwarded_row_the_same_answer(
    router: Router, client: Client, path: str
) -> None:
    statuses = []
    for body in (b"{", b"{}", b'{"model":"m","Model":"n"}'):
        by_lane = await ask(client, path, body, chunked=False)
        exchange = exchange_of(router)
        assert exchange is not None
        assert exchange.path == path
        by_asgi = await ask(client, path, body, chunked=True)
        assert exchange_of(router) is exchange, "the second one did not go through the lane"
        assert status(by_lane[0]) == status(by_asgi[0])
        assert names(by_lane[0]) == names(by_asgi[0])
        statuses.append(status(by_lane[0]))
    assert statuses[0] == statuses[2] == b"HTTP/1.1 400 Bad Request"


async def test_a_body_above_the_limit_is_refused_by_the_same_handler(router: Router, client: Client) -> None:
    too_much = router.settings.max_body_bytes + 1
    await client.send(b"POST /api/chat HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % too_much)
    head = await client.head()
    assert b" 413 " in head
    assert b"connection: close" in head
    assert exchange_of(router) is None


@pytest.mark.parametrize("path", PATHS)
async def test_the_lane_admits_nobody_whom_the_route_table_refuses(path: str) -> None:
    asked: list[tuple[str, str]] = []

    def admit(peer: str, route: Route) -> Principal:
        asked.append((peer, route.path))
        raise Forbidden("not from there")

    async def never(exchange: Exchange, route: Route, principal: Principal) -> None:
        raise AssertionError("the handler was called")

    handlers = routes.inference_handlers(dict.fromkeys(PATHS, never), admit)
    assert list(handlers) == PATHS
    seen = Answered(path)
    await handlers[path](seen)
    assert (seen.status, asked) == (403, [("192.0.2.1", path)])


class Answered:
    """An exchange that keeps the answer."""

    method, peer = "POST", "192.0.2.1"
    target = ""
    headers = ()
    content_length = 2
    started = gone = False

    def __init__(self, path: str) -> None:
        self.path = path
        self.status = 0

    def header(self, name: bytes) -> bytes | None:
        return None

    async def read_body(self, limit_bytes: int) -> bytes:
        raise AssertionError("the body was read before admission")

    async def respond(self, status: int, headers: object, body: bytes) -> None:
        self.status = status
