"""One HTTP request of a client, as the handlers of both programs see it.

Handlers are written against `Exchange` alone; `asgi` binds it to uvicorn's ASGI interface, `lane` to its
protocol class. Nothing that protects (admission, limits, keys) belongs here: that is a function which every
binding's handler calls.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

Headers = Sequence[tuple[bytes, bytes]]


class ExchangeError(Exception):
    """The exchange cannot go on as it was meant to."""


class ClientGone(ExchangeError):
    """The client has left; whatever is sent now reaches nobody."""


class BodyTooLarge(ExchangeError):
    """The body is longer than the limit. Nothing beyond the limit was kept; answer 413."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the request body is larger than {limit_bytes} bytes")
        self.limit_bytes = limit_bytes


class Exchange(Protocol):
    """Request head and body in; head, chunks and end out.

    Order: `read_body` or `pieces` (at most once), `on_gone`, then `start`, `send` or `push`…, `finish`, or
    `respond`, or `abort`.
    """

    method: str
    path: str
    """Percent-decoded, without the query."""
    target: str
    """Path and query as they were sent."""
    headers: Headers
    """Names in lower case."""
    peer: str
    """The client's IP address, "" when unknown."""
    content_length: int | None
    started: bool
    """The response head has been sent."""
    gone: bool
    """The client is known to have left."""

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header; `name` in lower case."""

    async def read_body(self, limit_bytes: int) -> bytes:
        """The whole body. Raises BodyTooLarge, without reading on, and ClientGone."""

    def pieces(self, limit_bytes: int) -> AsyncIterator[bytes]:
        """The body as it comes, for what may be too large to be kept. Raises as `read_body` does."""

    def on_gone(self, callback: Callable[[], None]) -> None:
        """Call back once when the client leaves before the response has ended; at once if it already has.

        Only after the body was read.
        """

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head; names in lower case. Without a content-length the body is chunked."""

    async def send(self, chunk: bytes) -> None:
        """Send a piece of the body; waits while the client is slow. Raises ClientGone."""

    def push(self, chunk: bytes) -> bool:
        """Send a piece of the body here and now. False: that cannot be done (the client is slow or has left,
        or the binding has to wait), nothing was sent, `send` it."""

    async def finish(self, chunk: bytes = b"") -> None:
        """End the body properly, after a last piece."""

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """A whole answer; content-length is added."""

    def abort(self) -> None:
        """After `start`: the body ends here, improperly, so that the client sees it was cut."""


Handler = Callable[[Exchange], Awaitable[None]]
