"""The streaming part of one attempt: what follows the first content record, up to the end. The hot path.

Each read of the upstream's socket goes through the watch and out to the client inside that socket's callback,
while the request's task sleeps. The task is woken by what needs it: a slow client, the end, a failure, and
by its guard. Nothing here retries, writes an end or an error, or records what happened: that is the caller's.
"""

from __future__ import annotations

from herd.dialects import StreamWatch
from herd.proxy.guard import Guard
from herd_node.net.exchange import Exchange
from herd_node.net.pool import Upstream


class Relaying:
    """One answer on its way. Owns no deadline: it tells the guard whose turn it is."""

    __slots__ = ("_exchange", "_gap_s", "_guard", "_left", "_upstream", "_watch", "_write_s")

    def __init__(
        self,
        exchange: Exchange,
        upstream: Upstream,
        watch: StreamWatch,
        guard: Guard,
        *,
        gap_s: float,
        write_s: float,
    ) -> None:
        self._exchange = exchange
        self._upstream = upstream
        self._watch = watch
        self._guard = guard
        self._gap_s = gap_s
        self._write_s = write_s
        self._left = b""

    async def run(self, out: bytes) -> bytes:
        """Send `out` and all that follows. Returns when the watch has seen the end or a failure, or the body
        has ended; what still belongs before an end mark is returned, so that it can leave together with the
        end. Raises UpstreamCut, ClientGone."""
        watch, guard = self._watch, self._guard
        while not watch.ended:
            if out:
                guard.touch("client_stalled", self._write_s)
                await self._exchange.send(out)
            if watch.failed is not None:
                return b""
            guard.touch("gap", self._gap_s)
            if not await self._upstream.pipe(self._pass_on):
                return b""
            out, self._left = self._left, b""
        return out

    def _pass_on(self, piece: bytes) -> bool:
        """Called by the upstream's connection; False wakes the task."""
        watch = self._watch
        out = watch.feed(piece)
        if not watch.ended and watch.failed is None and (not out or self._exchange.push(out)):
            self._guard.again(self._gap_s)
            return True
        self._left = out
        return False
