"""A body that may be large, as something to search, slice, hash and send: bytes, or a file that is mapped.

What is larger than `spool.MEMORY_BYTES` never stands in memory as a whole: its pages are the file's.
"""

from __future__ import annotations

from contextlib import suppress
from mmap import mmap

from herd_node.net.exchange import Exchange
from herd_node.net.spool import Spool
from herd_node.protocol.forms import Body


async def read_upload(exchange: Exchange, limit_bytes: int) -> Body:
    """The whole body; `release` it. Raises BodyTooLarge, ClientGone, OSError."""
    with Spool() as spool:
        async for piece in exchange.pieces(limit_bytes):
            await spool.write(piece)
        await spool.end()
        return spool.mapped()  # which outlives the spool


def release(body: Body) -> None:
    """Give the file back. A connection that is being cut may still hold a piece: then it goes with that."""
    if isinstance(body, mmap):
        with suppress(BufferError):
            body.close()
