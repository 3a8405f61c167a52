"""uvicorn made quiet: our own sockets, our own signal handlers, no exit of its own.

Both programs serve through this. It knows HTTP serving and nothing of routing. uvicorn raises a caught signal
again when `serve()` returns, so no `finally` of ours would run, and a taken port ends the process: here a
signal is a call of `on_stop` and a taken port one sentence (`StartPortTaken`).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import uvicorn

from herd_node.net import acceptor

KEEP_ALIVE_S = 75
_BACKLOG = 2048
_PORT_TRIES = 32

_SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
if sys.platform == "win32":
    _SIGNALS += (signal.SIGBREAK,)


def _is_not_a_strangers_noise(record: logging.LogRecord) -> bool:
    """Anyone who can connect could fill the log with this one."""
    return record.msg != "Invalid HTTP request received."


class StartPortTaken(Exception):
    """The port cannot be listened on. `str()` is the sentence to print."""


class QuietServer(uvicorn.Server):
    """One uvicorn server inside a running loop.

    The first SIGTERM or SIGINT calls `on_stop(1)`, and, unless `hold` is set, begins the graceful stop: the
    sockets close, what runs may finish within `graceful_s`. With `hold` the server goes on serving until
    `stop()`, so a drain can still answer. The second signal calls `on_stop(2)` and ends everything at once.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        *,
        on_stop: Callable[[int], None],
        graceful_s: float,
        hold: bool = False,
        http: str | type[asyncio.Protocol] = "httptools",
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=http,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(graceful_s)),
            )
        )
        logging.getLogger("uvicorn.error").addFilter(_is_not_a_strangers_noise)
        self._on_stop = on_stop
        self._hold = hold
        self._signals_seen = 0
        self._wake = asyncio.Event()
        self._acceptors: list[acceptor.Acceptor] = []

    def stop(self) -> None:
        """Close the sockets, let what runs finish within the graceful time, return from `serve()`."""
        self.should_exit = True
        self._wake.set()

    def force(self) -> None:
        """Cut every connection and return from `serve()` at once."""
        self.should_exit = self.force_exit = True
        self._wake.set()
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        finally:
            for door in self._acceptors:
                door.abort()
            for sock in sockets or ():
                sock.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if sockets is None or not acceptor.is_needed():
            await super().startup(sockets)
            return
        await super().startup([])
        self._acceptors = [acceptor.Acceptor(sock, self._connection) for sock in sockets]

    def _connection(self) -> asyncio.Protocol:
        """As uvicorn's own servers make it."""
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def main_loop(self) -> None:
        """uvicorn looks ten times a second whether to stop; here `stop` says so, and once a second is enough
        for its Date header."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._wake.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for door in self._acceptors:
            await door.close()  # all who are in are told to finish
        await super().shutdown(sockets)
        # Python 3.12 waits in `Server.wait_closed` for connections too: none may be left when we return.
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with catch_signals(self._signalled):
            yield

    def _signalled(self, _signal: int) -> None:
        self._signals_seen += 1
        first = self._signals_seen == 1
        try:
            self._on_stop(self._signals_seen)
        finally:
            if not first:
                self.force()
            elif not self._hold:
                self.stop()


async def serve(
    app: Callable[..., Any],
    sockets: list[socket.socket],
    *,
    on_stop: Callable[[int], None],
    graceful_s: float,
) -> None:
    """Serve until a signal: the first stops gracefully (after `on_stop(1)`), the second at once."""
    await QuietServer(app, on_stop=on_stop, graceful_s=graceful_s).serve(sockets)


@contextlib.contextmanager
def catch_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler(signal)` inside the running loop for SIGINT and SIGTERM; put the old handlers back."""
    loop = asyncio.get_running_loop()

    def from_any_frame(number: int, _frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(handler, number)

    before: dict[int, Any] = {}
    try:
        for number in _SIGNALS:
            before[number] = signal.getsignal(number)
            try:
                loop.add_signal_handler(number, handler, number)
            except NotImplementedError:  # Windows
                signal.signal(number, from_any_frame)
    except (ValueError, RuntimeError):  # not the main thread (tests): whoever is there handles the signals
        before.clear()
    try:
        yield
    finally:
        for number, old in before.items():
            with contextlib.suppress(NotImplementedError):
                loop.remove_signal_handler(number)
            signal.signal(number, old if old is not None else signal.SIG_DFL)


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for a host: "" or "*" is every interface, IPv6 and IPv4 on the same port.

    A name is bound on all of its addresses. Port 0 takes one free port for all of them. A machine without
    IPv6 gets IPv4 alone. Raises StartPortTaken.
    """
    addresses = _addresses(host)
    for _ in range(_PORT_TRIES if port == 0 else 1):
        try:
            return _bind_all(addresses, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port != 0:
                raise StartPortTaken(_sentence(host, port, error)) from error
    raise StartPortTaken(f"No free port was found for {host or 'all interfaces'}.")


def port_of(sockets: Sequence[socket.socket]) -> int:
    return int(sockets[0].getsockname()[1])


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    if host in ("", "*"):
        every = [(socket.AF_INET, "0.0.0.0")]
        return [*every, (socket.AF_INET6, "::")] if socket.has_ipv6 else every
    if host == "localhost":  # both families, whatever the hosts file says
        return [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    bare = host.removeprefix("[").removesuffix("]")
    with contextlib.suppress(ValueError):
        literal = ipaddress.ip_address(bare.partition("%")[0])
        return [(socket.AF_INET if literal.version == 4 else socket.AF_INET6, bare)]
    try:
        found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise StartPortTaken(f"{host} is not an address of this machine: {why}.") from error
    return list(dict.fromkeys((socket.AddressFamily(row[0]), str(row[4][0])) for row in found))


def _bind_all(addresses: Sequence[tuple[socket.AddressFamily, str]], port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    try:
        for family, address in addresses:
            try:
                sock = _listen(family, address, port)
            except OSError as error:
                # IPv6 compiled in but switched off: IPv4 alone is right, unless IPv6 is all that was asked.
                if family == socket.AF_INET6 and sockets and error.errno in _NO_FAMILY:
                    continue
                raise
            sockets.append(sock)
            port = port or port_of(sockets)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


_NO_FAMILY = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL, errno.EPROTONOSUPPORT)


def _listen(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    # The protocol is named: asyncio sets TCP_NODELAY only on sockets that say they are TCP.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if sys.platform == "win32":  # there SO_REUSEADDR would steal a port that is in use
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        where = socket.getaddrinfo(address, port, family, socket.SOCK_STREAM)[0][4]
        sock.bind(where)
        sock.listen(_BACKLOG)  # a second program on the port fails here, not at bind
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _sentence(host: str, port: int, error: OSError) -> str:
    where = host or "all interfaces"
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} is already in use on this machine; choose another one with --port."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"Listening on port {port} of {where} is not allowed; choose a port above 1023 with --port."
    return f"Cannot listen on port {port} of {where}: {error.strerror or error}."
