"""Connections are let in by the dozen, on a loop that by itself lets in one a turn.

libuv accepts one connection a turn of its loop and listening handle. Streams make turns of 10 ms and more, so
clients that come together would wait for seconds. asyncio's own loop takes a backlog a turn and needs none of
this. It hands connections over and knows nothing of what is spoken there.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Final

_log = logging.getLogger(__name__)

#: So many a turn at most, then whoever is connected has a turn.
_AT_ONCE: Final = 256
#: After an error that the next try would meet too: mostly, the program has no file descriptor left.
_PAUSE_S: Final = 1.0


def is_needed() -> bool:
    """Whether the running loop is the one that accepts one connection a turn."""
    return type(asyncio.get_running_loop()).__module__.startswith("uvloop")


class Acceptor:
    """Watches one listening socket, which its owner closes. Each connection gets a protocol of `make`."""

    def __init__(
        self, sock: socket.socket, make: Callable[[], asyncio.BaseProtocol], *, pause_s: float = _PAUSE_S
    ) -> None:
        self._sock = sock
        self._make = make
        self._pause_s = pause_s
        self._loop = asyncio.get_running_loop()
        self._coming: set[asyncio.Task[None]] = set()
        """Connections that have been taken and whose protocol has not heard of it yet."""
        self._pause: asyncio.TimerHandle | None = None
        self._has_complained = False
        self._is_open = True
        self._loop.add_reader(sock, self._accept)

    async def close(self) -> None:
        """Let nobody in any more; returns when all who are in have their protocol. They stay connected."""
        self._stop_listening()
        while self._coming:
            await asyncio.wait(self._coming)

    def abort(self) -> None:
        """Let nobody in any more, now. Any number of times."""
        self._stop_listening()
        for task in self._coming:
            task.cancel()

    def _stop_listening(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        elif self._is_open:
            self._loop.remove_reader(self._sock)
        self._is_open = False

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                sock, _ = self._sock.accept()
            except BlockingIOError:
                self._has_complained = False
                return
            except ConnectionAbortedError:
                continue  # it left while it waited
            except OSError as error:
                self._rest(error)
                return
            task = self._loop.create_task(self._let_in(sock), name="accepted")
            self._coming.add(task)
            task.add_done_callback(self._coming.discard)

    async def _let_in(self, sock: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, sock)
        except OSError:  # it has left already
            sock.close()
        except BaseException:
            sock.close()
            raise

    def _rest(self, error: OSError) -> None:
        """The socket stays readable while nobody can be let in: to try again at once would be to spin."""
        self._loop.remove_reader(self._sock)
        self._pause = self._loop.call_later(self._pause_s, self._go_on)
        if not self._has_complained:
            self._has_complained = True
            _log.warning("new connections have to wait: %s", error.strerror)

    def _go_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._accept)
