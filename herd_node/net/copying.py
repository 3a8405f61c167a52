"""An answer passed through: the body of an upstream copied to a client, byte for byte and as it comes.

It knows of no deadline and looks at nothing that it copies. A cut body is not ended: UpstreamCut passes.
"""

from __future__ import annotations

from herd_node.net.exchange import Exchange
from herd_node.net.upstream import Upstream


async def copy_body(upstream: Upstream, exchange: Exchange) -> None:
    """After `start`: all of the body, then its end, together with the last piece if they came together.

    While the client takes it, each read is passed on inside the upstream's callback; while it does not, the
    upstream is not read. Raises UpstreamCut, ClientGone.
    """
    left, is_last = b"", False

    def push(piece: bytes) -> bool:
        nonlocal left, is_last
        is_last = upstream.ended  # asked now: once the task runs, more may have come, and the end with it
        if not is_last and exchange.push(piece):
            return True
        left = piece
        return False

    while await upstream.pipe(push):
        if is_last:
            await exchange.finish(left)
            return
        await exchange.send(left)
    await exchange.finish()
