"""`Exchange` over ASGI: the binding for everything that the route table serves.

Knows ASGI and one fact about uvicorn: an application that returns without the end of its body makes uvicorn
close the connection without the end chunk. That is how `abort` cuts; uvicorn's error line about it is kept
out of the log for these deliberate cuts only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar

from herd_node.net.discard import Message, Receive, Send, discard_body
from herd_node.net.exchange import BodyTooLarge, ClientGone, ExchangeError, Handler, Headers
from herd_node.runtime.tasks import Tasks

_NO_BODY = (204, 304)
_cut_on_purpose: ContextVar[bool] = ContextVar("cut_on_purpose", default=False)


def asgi_endpoint(handler: Handler) -> _Endpoint:
    """An ASGI application that gives every request to `handler`; fit to be a Starlette Route's endpoint."""
    logging.getLogger("uvicorn.error").addFilter(_is_no_deliberate_cut)
    return _Endpoint(handler)


def _is_no_deliberate_cut(record: logging.LogRecord) -> bool:
    # uvicorn logs in the task, and so in the context, of the request that was cut
    return not (_cut_on_purpose.get() and record.msg == "ASGI callable returned without completing response.")


class _Endpoint:
    """An object and not a function: Starlette would wrap a function in its own Request and Response."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._watchers = Tasks("client-watch")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        exchange = AsgiExchange(scope, receive, send, self._watchers)
        try:
            await self._handler(exchange)
        except ClientGone:
            return  # nobody is left to answer
        finally:
            _cut_on_purpose.set(exchange.cut)
            await exchange.end_watch()


class AsgiExchange:
    """See `Exchange`."""

    def __init__(self, scope: Message, receive: Receive, send: Send, watchers: Tasks) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        query: bytes = scope["query_string"]
        target: bytes = scope["raw_path"] + b"?" + query if query else scope["raw_path"]
        self.target = target.decode("latin-1")
        self.headers: Headers = scope["headers"]
        self.peer: str = (scope.get("client") or ("",))[0].removeprefix("::ffff:")
        length = self.header(b"content-length")
        self.content_length = None if length is None else int(length)
        self.started = self.gone = self.cut = self._refused = False
        self._receive = receive
        self._send = send
        self._watchers = watchers
        self._watcher: asyncio.Task[None] | None = None
        self._callbacks, self._ended = list[Callable[[], None]](), False

    def header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self.headers if key == name), None)

    async def read_body(self, limit_bytes: int) -> bytes:
        pieces = [piece async for piece in self.pieces(limit_bytes)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def pieces(self, limit_bytes: int) -> AsyncIterator[bytes]:
        size_bytes, more = 0, True
        while more:
            self._refused = max(size_bytes, self.content_length or 0) > limit_bytes
            if self._refused:
                raise BodyTooLarge(limit_bytes)
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone = True
                raise ClientGone("the client left before its request was complete")
            piece: bytes = message.get("body", b"")
            size_bytes += len(piece)
            more = message.get("more_body", False) or size_bytes > limit_bytes
            if size_bytes <= limit_bytes:
                yield piece

    def on_gone(self, callback: Callable[[], None]) -> None:
        if self.gone:
            callback()
            return
        self._callbacks.append(callback)
        if self._watcher is None:
            self._watcher = self._watchers.spawn(self._watch(), name=self.path)

    async def _watch(self) -> None:
        """ASGI says that the client has left only to somebody who waits for its next message."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._ended:
            self.gone = True
            for callback in self._callbacks:
                callback()

    async def end_watch(self) -> None:
        """The end of the request: whoever leaves now has got everything."""
        self._ended = True
        if self._watcher is not None and not self._watcher.done():
            self._watcher.cancel()
            await asyncio.wait((self._watcher,))

    async def start(self, status: int, headers: Headers) -> None:
        self._check()
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send(self, chunk: bytes) -> None:
        self._check()
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    def push(self, chunk: bytes) -> bool:
        return False  # ASGI's send is awaited

    async def finish(self, chunk: bytes = b"") -> None:
        self._check()
        if self._refused:
            await self.send(chunk)
            await discard_body(self._receive)
            chunk = b""
        self._ended = True
        await self._send({"type": "http.response.body", "body": chunk, "more_body": False})

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        length = () if status in _NO_BODY else ((b"content-length", b"%d" % len(body)),)
        await self.start(status, (*headers, *length))
        await self.finish(body)

    def abort(self) -> None:
        if not self.started:
            raise ExchangeError("nothing has been sent that could be cut: answer with an error instead")
        self.cut = not self._ended
        self._ended = True

    def _check(self) -> None:
        # uvicorn's send returns in silence when nobody listens any more
        if self.gone:
            raise ClientGone("the client has left")
        if self.cut:
            raise ExchangeError("the answer has been cut")
