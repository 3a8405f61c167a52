"""`Exchange` straight on uvicorn's protocol class: the lane, for the requests that the project exists for.

It leaves out what ASGI costs: scope, messages, the route table, a task that watches the client. It takes a
plain POST to one of its paths while nothing else runs on the connection; all else goes on to ASGI, where the
same handlers stand. So it may refuse nothing and protect nothing: whatever protects is in the handlers.

A request's exchange stands in for uvicorn's `cycle`, so drain, hang-up, pipelining and keep-alive stay
uvicorn's. What is used of it is pinned by tests/net/test_uvicorn_contract.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from herd_node.net.exchange import Handler
from herd_node.net.lane_exchange import LaneExchange
from herd_node.net.outbox import Outbox

#: Expect and Upgrade are conversations; a body without a length is counted while it comes. Not for the lane.
_NOT_PLAIN = frozenset({b"expect", b"upgrade", b"transfer-encoding"})

#: What may wait in a transport until its client counts as slow: half of the usual. Each slow client costs it.
MOST_UNSENT_BYTES = 32 * 1024


def lane_protocol(
    routes: Mapping[str, Handler], max_body_bytes: int, outbox: Outbox | None = None
) -> type[asyncio.Protocol]:
    """A protocol class for uvicorn's `http=`. POSTs to the paths of `routes`, with a body up to the limit, go
    to these handlers; everything else to the server's ASGI application, where the same should stand."""

    shared = outbox or Outbox()

    class Lane(_Lane):
        routes_by_url: ClassVar = {path.encode(): (path, handler) for path, handler in routes.items()}
        most_bytes: ClassVar = max_body_bytes
        outbox: ClassVar = shared

    return Lane


class _Lane(HttpToolsProtocol):
    """One connection of a client."""

    routes_by_url: ClassVar[dict[bytes, tuple[str, Handler]]]
    most_bytes: ClassVar[int]
    outbox: ClassVar[Outbox]
    _latest: LaneExchange | None = None
    _taking: LaneExchange | None = None
    """Whose body comes in; None while it is one for ASGI."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(MOST_UNSENT_BYTES)
        self.outbox.in_work = self.tasks  # uvicorn's, of all connections

    def on_message_begin(self) -> None:
        self.url, self.headers, self.expect_100_continue = b"", [], False  # no scope: most need none

    def on_headers_complete(self) -> None:
        found = self.routes_by_url.get(self.url.partition(b"?")[0])
        length = self._plain_length() if found is not None else None
        if found is None or length is None:
            self._go_on_to_asgi()
            return
        path, handler = found
        old = self.parser.get_http_version() == "1.0"
        keep_alive = not old and self.parser.should_keep_alive()
        exchange = self._latest = self._taking = LaneExchange(
            self, self.outbox, path, length, keep_alive, not old
        )
        self.cycle = exchange  # type: ignore[assignment]
        task = self.loop.create_task(exchange.run(handler), name=path)
        self.tasks.add(task)  # uvicorn's: a graceful stop waits for them, a forced one cancels them
        task.add_done_callback(self.tasks.discard)

    def on_body(self, body: bytes) -> None:
        if self._taking is not None:
            self._taking.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._taking is not None:
            self._taking.fed()
        else:
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._latest is not None:
            self._latest.leave()
            # They hold each other: else only the garbage collector would free them.
            self.cycle = self._latest = self._taking = None  # type: ignore[assignment]

    # What ends the connection or writes past the exchange: first goes what was said before.

    def eof_received(self) -> None:
        self.outbox.flush()
        super().eof_received()

    def shutdown(self) -> None:
        self.outbox.flush()
        super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self.outbox.flush()
        super().send_400_response(msg)

    def _plain_length(self) -> int | None:
        """The length of the body if this is a request for the lane."""
        if self.parser.get_method() != b"POST" or not (self.cycle is None or self.cycle.response_complete):
            return None
        length = None
        for name, value in self.headers:
            if name in _NOT_PLAIN:
                return None
            if name == b"content-length":
                length = int(value)  # llhttp has made sure that it is one number, and the only one
        return length if length is not None and length <= self.most_bytes else None

    def _go_on_to_asgi(self) -> None:
        """What `on_message_begin` left out, then what uvicorn does."""
        self._taking = None
        url, headers, expects = self.url, self.headers, self.expect_100_continue
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expects
        self.headers.extend(headers)  # the list that the scope holds
        super().on_headers_complete()
