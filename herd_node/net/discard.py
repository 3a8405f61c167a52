"""What becomes of a request body that is refused: taken and dropped for a while, after the answer.

Closing on a client that sends everything before it reads would reset the connection and lose the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_MOST_BYTES = 64 * 1024 * 1024
_MOST_S = 2.0


async def discard_body(receive: Receive) -> None:
    """Until its end, the client's leave, or enough of it; nothing is kept."""
    left_bytes = _MOST_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_MOST_S):
            while left_bytes > 0:
                message = await receive()
                if not message.get("more_body", False):
                    return
                left_bytes -= len(message.get("body", b""))
