"""The one place of the agent that connects beyond its own machine to fetch something, and only for a pull.

Names and redirects come from strangers, so every connection is checked by the address that it really goes to:
* https, or http to a private address;
* from a public source never on to a private one, and never on to http;
* link-local, multicast and reserved addresses never.
HTTPS_PROXY counts here and nowhere else, because nothing else goes outward. A proxy resolves names itself, so
behind one only addresses that are written out can be checked.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_address
from urllib.parse import unquote, urljoin, urlsplit

import httpcore
import orjson

from herd_node.models.reach import Reach, reach_of
from herd_node.models.reference import sha256_in
from herd_node.settings import Proxy

MAX_REDIRECTS = 6
CONNECT_TIMEOUT_S = 15.0
READ_TIMEOUT_S = 60.0
MAX_LIST_BYTES = 16 * 1024 * 1024

_REDIRECTS = (301, 302, 303, 307, 308)
_ANYWHERE: frozenset[Reach] = frozenset({"public", "private"})
_PRIVATE: frozenset[Reach] = frozenset({"private"})
_PUBLIC: frozenset[Reach] = frozenset({"public"})

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class FetchError(Exception):
    """It could not be had; `str()` is a sentence for the caller. `passing`: another try may go better."""

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class Opened:
    """An answer whose body is still to come. `linked_sha256`: what the hub said of the file on the way."""

    def __init__(self, response: httpcore.Response, linked_sha256: str | None) -> None:
        self.status = response.status
        self.linked_sha256 = linked_sha256
        self._response = response
        self._headers = _lower(response.headers)

    def header(self, name: str) -> str | None:
        return self._headers.get(name)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Raises FetchError."""
        try:
            async for piece in self._response.aiter_stream():
                yield piece
        except _TROUBLES as error:
            raise _of(error) from None


class Outward:
    """Opens URLs. `resolve` is the system's, but for tests."""

    def __init__(self, proxy: Proxy, *, agent: str, resolve: Resolve | None = None) -> None:
        self._proxy = proxy
        self._agent = agent
        self._resolve = resolve or _resolve
        self._tls: ssl.SSLContext | None = None

    @asynccontextmanager
    async def get(self, url: str, headers: Mapping[str, str] | None = None) -> AsyncIterator[Opened]:
        """GET, through redirects. Raises FetchError; a status is never an error here."""
        allowed: frozenset[Reach] = _ANYWHERE
        linked: str | None = None
        for _hop in range(MAX_REDIRECTS):
            guard = Guard(_PRIVATE & allowed if urlsplit(url).scheme == "http" else allowed, self._resolve)
            async with self._pool(url, guard) as pool:
                try:
                    response = await pool.handle_async_request(self._request(url, headers or {}))
                except _TROUBLES as error:
                    raise _of(error) from None
                try:
                    location = _lower(response.headers).get("location")
                    if response.status not in _REDIRECTS or location is None:
                        yield Opened(response, linked)
                        return
                    linked = sha256_in(_lower(response.headers).get("x-linked-etag")) or linked
                finally:
                    await response.aclose()
            # a private source may lead anywhere private, a public one only to public places
            allowed = _ANYWHERE if allowed is not _PUBLIC and guard.reached == "private" else _PUBLIC
            url = urljoin(url, location)
        raise FetchError("it redirects too often")

    async def json(self, url: str) -> tuple[int, object]:
        """Status, and the JSON value (None when it is none). Raises FetchError."""
        async with self.get(url, {"accept": "application/json"}) as opened:
            body = bytearray()
            async for piece in opened.pieces():
                body += piece
                if len(body) > MAX_LIST_BYTES:
                    raise FetchError("the list of files is too long")
        try:
            return opened.status, orjson.loads(body)
        except orjson.JSONDecodeError:
            return opened.status, None

    def _request(self, url: str, headers: Mapping[str, str]) -> httpcore.Request:
        target = httpcore.URL(url)
        host = urlsplit(url).netloc
        fields = [("host", host), ("user-agent", self._agent), ("accept-encoding", "identity")]
        timeout = {"connect": CONNECT_TIMEOUT_S, "read": READ_TIMEOUT_S, "write": READ_TIMEOUT_S}
        return httpcore.Request(
            "GET", target, headers=[*fields, *headers.items()], extensions={"timeout": timeout}
        )

    @asynccontextmanager
    async def _pool(self, url: str, guard: Guard) -> AsyncIterator[httpcore.AsyncConnectionPool]:
        """For one request: which addresses may be connected to differs from hop to hop."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise FetchError("it leads to something that is neither http nor https")
        if self._tls is None:
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        proxy = self._proxy.for_host(parts.hostname) if parts.scheme == "https" else None
        if proxy is None:
            async with httpcore.AsyncConnectionPool(ssl_context=self._tls, network_backend=guard) as direct:
                yield direct
            return
        guard.check_unresolved(parts.hostname)
        address, login = _proxy_of(proxy)
        async with httpcore.AsyncHTTPProxy(
            proxy_url=address, proxy_auth=login, ssl_context=self._tls
        ) as proxied:
            yield proxied


class Guard(httpcore.AsyncNetworkBackend):
    """Connects to addresses of the allowed reach only, and to the very address that was checked."""

    def __init__(self, allowed: frozenset[Reach], resolve: Resolve) -> None:
        self.reached: Reach | None = None
        self._allowed = allowed
        self._resolve = resolve
        self._sockets = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            addresses = await self._resolve(host, port)
        except OSError:
            raise FetchError(f"there is no host {host[:200]}", passing=True) from None
        self._check([reach_of(address) for address in addresses])
        failure: Exception = FetchError(f"there is no host {host[:200]}", passing=True)
        for address in addresses:
            try:
                return await self._sockets.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    def check_unresolved(self, host: str) -> None:
        """Where a proxy connects: what is written out is checked, a name is the proxy's to judge."""
        try:
            self._check([reach_of(str(ip_address(host)))])
        except ValueError:
            if host == "localhost" or host.endswith((".localhost", ".local", ".internal")):
                raise FetchError("a proxy is not asked for hosts of this network") from None
            self.reached = "public"

    def _check(self, reaches: Sequence[Reach]) -> None:
        for reach in reaches:
            if reach not in self._allowed:
                if reach == "public":
                    raise FetchError("files from other networks are fetched by https only")
                raise FetchError("it leads to an address that nothing is fetched from")
            self.reached = "public" if reach == "public" or self.reached == "public" else reach

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


def _proxy_of(url: str) -> tuple[str, tuple[str, str] | None]:
    """Its address, and the name and password that stand in it."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FetchError("HTTPS_PROXY must look like http://HOST:PORT")
    login = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", login


async def _resolve(host: str, port: int) -> Sequence[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


_TROUBLES = (
    httpcore.NetworkError,
    httpcore.TimeoutException,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
)


def _of(error: Exception) -> FetchError:
    """A sentence without an address."""
    match error:
        case httpcore.ProxyError():
            return FetchError("the proxy does not let it through")
        case httpcore.ConnectError() if "certificate" in str(error).lower():
            return FetchError("the host's certificate is not a good one")
        case httpcore.ConnectError() | httpcore.ConnectTimeout():
            return FetchError("the host cannot be reached", passing=True)
        case httpcore.TimeoutException():
            return FetchError("the host is silent", passing=True)
        case httpcore.UnsupportedProtocol():
            return FetchError("it leads to something that is neither http nor https")
    return FetchError("the connection broke off", passing=True)


def _lower(headers: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
