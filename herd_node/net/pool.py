"""The way out: HTTP/1.1 connections to nodes and backends, kept open and used again. The hot path.

An asyncio Protocol feeds llhttp (httptools); a request costs no task and one future for each thing that is
awaited. One rule of retrying lives here because only this module can see it: a kept connection that the other
side closed without a byte of an answer is not a failure, the request is sent once more on a fresh connection
(docs/behaviour.md R-6). All other retries are the callers'.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable

from herd_node.net.exchange import Headers
from herd_node.net.outbox import Outbox
from herd_node.net.upstream import (
    READ_BYTES,
    BadResponse,
    ConnectFailed,
    Connection,
    ConnectRefused,
    ConnectTimeout,
    HeadTimeout,
    NotConnected,
    Origin,
    PoolError,
    ResetBeforeHead,
    Upstream,
    UpstreamCut,
)
from herd_node.protocol.forms import Body

__all__ = [
    "BadResponse",
    "ConnectFailed",
    "ConnectRefused",
    "ConnectTimeout",
    "HeadTimeout",
    "NotConnected",
    "Origin",
    "Pool",
    "PoolError",
    "ResetBeforeHead",
    "Upstream",
    "UpstreamCut",
]


class Pool:
    """Connections to any number of origins. `headers` of a request are asked for once for each time that it
    is sent, so that a signature is never sent twice; Host and Content-Length are the pool's own.
    """

    def __init__(
        self,
        *,
        idle_s: float,
        connect_timeout_s: float = 2.0,
        unheard_timeout_s: float | None = None,
        max_head_bytes: int = 65536,
        max_buffer_bytes: int = 65536,
        outbox: Outbox | None = None,
    ) -> None:
        self.max_head_bytes = max_head_bytes
        self.max_buffer_bytes = max_buffer_bytes
        self.unheard_timeout_s = unheard_timeout_s
        """What was sent and not acknowledged for so long is taken for a connection that never came about: a
        kept one leads nowhere once the host behind it, or our own address, is gone (Linux)."""
        self._idle_s = idle_s
        self._connect_timeout_s = connect_timeout_s
        self.outbox = outbox or Outbox()
        self.read_buffer = memoryview(bytearray(READ_BYTES))
        self._open: set[Connection] = set()
        self._idle: dict[Origin, list[Connection]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def request(
        self,
        origin: Origin,
        method: str,
        target: str,
        headers: Callable[[], Headers],
        body: Body,
        *,
        head_timeout_s: float | None = None,
        reuse: bool = True,
    ) -> Upstream:
        """Send one request; returns when the head of the answer is there.

        `head_timeout_s` counts from the sending, not from the connecting. `reuse=False`: a fresh connection,
        that is not kept.
        """
        if self._closed:
            raise RuntimeError("the pool is closed")
        connection = self._take_idle(origin) if reuse else None
        if connection is not None:
            upstream = connection.send(method, target, headers, body)
            try:
                await upstream.head(head_timeout_s)
                return upstream
            except ResetBeforeHead:
                if connection.answered or self._closed:
                    raise
        connection = await self._connect(origin)
        upstream = connection.send(method, target, headers, body)
        await upstream.head(head_timeout_s)
        if not reuse:
            upstream.no_reuse()
        return upstream

    def idle_count(self, origin: Origin) -> int:
        return len(self._idle.get(origin, ()))

    @property
    def live_count(self) -> int:
        """Connections in use."""
        return len(self._open) - sum(map(len, self._idle.values()))

    def close_idle(self, origin: Origin | None = None) -> None:
        """Close the kept connections of one origin, or all."""
        for key in [origin] if origin is not None else list(self._idle):
            for connection in self._idle.pop(key, ()):
                connection.abort()

    async def close(self, *, force: bool = False) -> None:
        """No new requests; kept connections are closed. Live ones go on until their owners close them, unless
        `force` cuts them."""
        self._closed = True
        self.close_idle()
        if self._timer is not None:
            self._timer.cancel()
        for connection in tuple(self._open) if force else ():
            connection.abort()
        if leaving := [connection.lost() for connection in self._open if connection.closing]:
            await asyncio.wait(leaving)

    async def _connect(self, origin: Origin) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await loop.create_connection(
                    lambda: Connection(self, origin), origin.host, origin.port
                )
        except TimeoutError:
            raise ConnectTimeout(f"no connection within {self._connect_timeout_s:g} s") from None
        except ConnectionRefusedError:
            raise ConnectRefused("the connection was refused") from None
        except socket.gaierror as error:
            raise ConnectFailed(f"no connection: {error.strerror}") from error
        except (OSError, UnicodeError) as error:
            number = getattr(error, "errno", None)  # the text would name the address
            raise ConnectFailed(f"no connection: {os.strerror(number or errno.EHOSTUNREACH)}") from error
        return connection

    def _take_idle(self, origin: Origin) -> Connection | None:
        """The one that was used last: the others get a chance to grow old."""
        idle = self._idle.get(origin)
        while idle:
            connection = idle.pop()
            if not connection.closing:
                return connection
        return None

    # --- called by connections ----------------------------------------------------------------------------

    def opened(self, connection: Connection) -> None:
        self._open.add(connection)

    def closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        idle = self._idle.get(connection.origin, [])
        if connection in idle:
            idle.remove(connection)
        if not idle:
            self._idle.pop(connection.origin, None)

    def keep(self, connection: Connection) -> None:
        if self._closed:
            connection.abort()
            return
        self._idle.setdefault(connection.origin, []).append(connection)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._idle_s, self._close_old)

    def _close_old(self) -> None:
        """One timer for the whole pool: each list is ordered by age, the oldest first."""
        loop = asyncio.get_running_loop()
        self._timer = None
        oldest_s: float | None = None
        for idle in self._idle.values():
            while idle and idle[0].idle_since_s + self._idle_s <= loop.time():
                idle.pop(0).abort()
            if idle and (oldest_s is None or idle[0].idle_since_s < oldest_s):
                oldest_s = idle[0].idle_since_s
        if oldest_s is not None:
            self._timer = loop.call_at(oldest_s + self._idle_s, self._close_old)
