"""Small writes of one turn of the event loop, made together at its end.

Each write to a peer that sleeps wakes it up, and that can cost more than the write: on a virtual machine an
interrupt of another core, 10 µs. Made one behind the other they find it awake. So while several requests are
in work, what each has to say waits until all who are ready have spoken, and for nothing else.

Whoever closes a transport, or writes to it past this, calls `flush` before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sized
from typing import Final

#: More than this is not gathered: a transport must hear of it to say that its peer is slow.
_MOST_BYTES: Final = 64 * 1024


class Outbox:
    """One for all connections of a program that write at the same time. Of one event loop."""

    __slots__ = ("_waiting_bytes", "in_work", "waiting")

    def __init__(self) -> None:
        self.in_work: Sized = ()
        """The requests in work, set by whoever serves them. With less than two every write is made at once:
        there are no others that could go along."""
        self.waiting: list[tuple[asyncio.Transport, bytes]] = []
        """To be read only, for whether there is anything to flush."""
        self._waiting_bytes = 0

    def write(self, transport: asyncio.Transport, data: bytes) -> None:
        """Like the transport's own `write`, a little later."""
        waiting = self.waiting
        if not waiting:
            if len(self.in_work) < 2 or len(data) > _MOST_BYTES:
                transport.write(data)
                return
            asyncio.get_running_loop().call_soon(self.flush)
        waiting.append((transport, data))
        self._waiting_bytes += len(data)
        if self._waiting_bytes > _MOST_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write all of it now, in order. What was for a connection that is closing or lost is let go."""
        waiting, self.waiting, self._waiting_bytes = self.waiting, [], 0
        for transport, data in waiting:
            if not transport.is_closing():
                transport.write(data)
