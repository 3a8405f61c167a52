"""Which process listens on a local port, and which children it has: how Ollama's runners are seen.

All of it is a courtesy of the operating system: another user's server (a system service) is usually not
visible, and then the answer is None, never a guess. Blocks for some milliseconds: call it in a thread.
Walking the sockets of a busy machine takes tens of them, and holds the interpreter: done once an owner.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import psutil

from herd_node.backends.base import Owner
from herd_node.net.pool import Origin

#: A port whose owner could not be seen is looked up again after so many calls (a beat each).
LOOK_AGAIN_AFTER = 12


class _Listening(NamedTuple):
    """A process and where its listening socket stands in /proc: as long as that names the same socket there,
    the process listens. Only Linux has such a place; elsewhere its sockets are walked."""

    process: psutil.Process
    place: str | None
    name: str

    def still(self, port: int) -> bool:
        if not self.process.is_running():
            return False
        if self.place is None:
            return _listens(self.process, port)
        try:
            return os.readlink(self.place) == self.name
        except OSError:
            return False


class PortOwners:
    """Remembers the owner of a port: finding it walks all sockets, seeing its children does not."""

    def __init__(self) -> None:
        self._known: dict[int, _Listening] = {}
        self._unseen: dict[int, int] = {}

    def owner_of(self, origin: Origin) -> Owner | None:
        if not is_local(origin.host):
            return None
        process = self._process(origin.port)
        if process is None:
            return None
        try:
            name, children = process.name(), tuple(_command_lines(process))
        except psutil.Error:
            del self._known[origin.port]
            return None
        return Owner(process.pid, name, children)

    def _process(self, port: int) -> psutil.Process | None:
        known = self._known.get(port)
        if known is not None:
            if known.still(port):
                return known.process
            del self._known[port]
        if self._unseen.get(port, 0) > 0:
            self._unseen[port] -= 1
            return None
        found = find_listener(port)
        if found is None:
            self._unseen[port] = LOOK_AGAIN_AFTER
        else:
            self._known[port] = _listening(found, port)
        return found


def is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def find_listener(port: int) -> psutil.Process | None:
    """The process that listens on a TCP port, None when none is visible to this user."""
    for look in (_system_wide, _each_own_process):
        with contextlib.suppress(psutil.Error):
            for pid in look(port):
                return psutil.Process(pid)
    return None


def _system_wide(port: int) -> Iterator[int]:
    """One walk over all sockets; macOS allows it to root only (AccessDenied)."""
    for socket in psutil.net_connections(kind="tcp"):
        if _is_listener(socket, port) and socket.pid is not None:
            yield socket.pid


def _each_own_process(port: int) -> Iterator[int]:
    if not psutil.MACOS:  # elsewhere the walk above saw all that there is to see
        return
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if _listens(process, port):
                yield process.pid


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        return any(_is_listener(socket, port) for socket in process.net_connections(kind="tcp"))
    except psutil.Error:
        return False


def _listening(process: psutil.Process, port: int) -> _Listening:
    if psutil.LINUX:
        with contextlib.suppress(psutil.Error, OSError):
            for socket in process.net_connections(kind="tcp"):
                if _is_listener(socket, port):
                    place = f"/proc/{process.pid}/fd/{socket.fd}"
                    return _Listening(process, place, os.readlink(place))
    return _Listening(process, None, "")


def _is_listener(socket: Any, port: int) -> bool:  # noqa: ANN401 - psutil has no types
    return socket.status == psutil.CONN_LISTEN and bool(socket.laddr) and socket.laddr.port == port


def _command_lines(process: psutil.Process) -> Iterator[tuple[str, ...]]:
    """Of all children or, by AccessDenied, of none: half of them would be a wrong picture."""
    for child in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just now
            yield tuple(child.cmdline())
