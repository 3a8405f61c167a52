"""Which of the endpoints that not every server has are here: each is tried once, with an empty JSON object.

Versions prove nothing (docs/backends.md), so the server is asked. An empty object is never work: a server
that has the endpoint refuses it before it does anything; one that lacks it answers 404, or 501 where the
feature is switched off or its model lacks it.
"""

from __future__ import annotations

import asyncio

import httpx

from herd_node.backends.calls import Headers, NoAnswer, ask
from herd_node.protocol.routes import OFFERED_BY

#: One that gave no clear answer is tried again after this time.
AGAIN_S = 60.0
TIMEOUT_S = 2.0
_REFUSALS = frozenset(range(400, 501)) - {404, 405}


class Offers:
    """What one server offers, as far as it is known."""

    def __init__(self) -> None:
        self._known: dict[str, bool] = {}
        self._tried_s = float("-inf")

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(path for path in OFFERED_BY if self._known.get(path))

    def forget(self) -> None:
        """It may come back as another version, or with other flags."""
        self._known.clear()
        self._tried_s = float("-inf")

    async def look(self, http: httpx.AsyncClient, url: str, headers: Headers, now_s: float) -> None:
        """Try what is not known yet."""
        unknown = [path for path in OFFERED_BY if path not in self._known]
        if not unknown or now_s < self._tried_s + AGAIN_S:
            return
        self._tried_s = now_s
        for path, offered in zip(
            unknown, await asyncio.gather(*(_try(http, url + path, headers) for path in unknown)), strict=True
        ):
            if offered is not None:
                self._known[path] = offered


async def _try(http: httpx.AsyncClient, url: str, headers: Headers) -> bool | None:
    """None: it did not say."""
    try:
        answer = await ask(http, url, headers=headers, payload={}, read_timeout_s=TIMEOUT_S)
    except NoAnswer:
        return None
    return None if answer.status in (429, 503) else answer.status in _REFUSALS
