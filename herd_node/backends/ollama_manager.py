"""Ollama manages its models itself: every call goes on as it came, every answer comes back as it is.

Only what must be another connection than a caller's is done here: bodies of any length are sent from their
spool, streams are read line by line as fast as the caller takes them, and whoever leaves ends what he began.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Protocol

import httpx

from herd_node.backends.calls import CONNECT_TIMEOUT_S, Headers
from herd_node.models.manager import JSON, Answer, Broken, Call, Offer, Refused, success

_OFFERS: frozenset[Offer] = frozenset({"pull", "push", "create", "copy", "delete", "blobs", "load", "unload"})
#: Copy and delete touch a disk at most; a digest of a large blob takes its time.
_QUIET_S = 600.0

_DIGEST = re.compile(r"[A-Za-z0-9:-]{1,200}")


class Ollama(Protocol):
    """What the manager needs of the backend: as in `Backend`."""

    url: str
    headers: Headers

    async def ensure_loaded(self, name: str, load_options: Mapping[str, object]) -> None: ...

    async def unload(self, name: str) -> None: ...


class OllamaManager:
    """Loading is the backend's own, so that no caller who leaves ends a load."""

    offers = _OFFERS
    free_bytes: int | None = None

    def __init__(self, backend: Ollama, http: httpx.AsyncClient, changed: Callable[[], None]) -> None:
        self._backend = backend
        self._http = http
        self._changed = changed

    async def manage(self, call: Call) -> Answer:
        match call.verb:
            case "load":
                await self._backend.ensure_loaded(call.known_model, call.options)
                return success()
            case "unload":
                await self._backend.unload(call.known_model)
                return success()
        return await self._pass_on(call)

    async def _pass_on(self, call: Call) -> Answer:
        if call.verb == "blobs" and not _DIGEST.fullmatch(call.path.rpartition("/")[2]):
            raise Refused(400, "invalid digest format")  # Ollama's words; it shall not become another path
        request = self._http.build_request(
            call.method,
            self._backend.url + call.path,
            headers=[*self._backend.headers, *_body_headers(call)],
            content=call.body.pieces() if call.body.size_bytes else None,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S, write=_QUIET_S),
        )
        try:
            response = await self._http.send(request, stream=True)
        except httpx.HTTPError as error:
            raise _broken(error) from None
        kind = response.headers.get("content-type")
        content_type = kind.encode("latin-1") if kind else None
        if response.status_code == 200 and call.verb in ("pull", "push", "create") and call.streams:
            return Answer(content_type=content_type, lines=self._lines(response))
        try:
            body = await response.aread() if call.method != "HEAD" else b""
        except httpx.HTTPError as error:
            raise _broken(error) from None
        finally:
            await response.aclose()
            self._changed()
        return Answer(status=response.status_code, content_type=content_type, body=body)

    async def _lines(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        """As they come; raises Broken where the stream is cut."""
        try:
            async for piece in response.aiter_raw():
                yield piece
        except httpx.HTTPError as error:
            raise _broken(error) from None
        finally:
            await response.aclose()
            self._changed()


def _body_headers(call: Call) -> list[tuple[bytes, bytes]]:
    if call.method == "HEAD":
        return []
    kind = b"application/octet-stream" if call.verb == "blobs" else JSON
    return [(b"content-type", kind), (b"content-length", b"%d" % call.body.size_bytes)]


def _broken(error: httpx.HTTPError) -> Broken:
    """A sentence without an address."""
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return Broken("the backend cannot be reached", refused=True)
    return Broken(f"the backend broke the connection ({type(error).__name__})")
