"""Who owns a port: real processes on loopback."""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import psutil
import pytest

from herd_node.backends.processes import LOOK_AGAIN_AFTER, PortOwners, find_listener, is_local
from herd_node.net.pool import Origin


def listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def test_this_process_is_found_by_its_port() -> None:
    with listener() as server:
        port = server.getsockname()[1]
        found = find_listener(port)
        assert found is not None
        assert found.pid == os.getpid()


async def test_the_children_of_the_owner_are_read_from_their_command_lines() -> None:
    with listener() as server:
        origin = Origin("127.0.0.1", server.getsockname()[1])
        owners = PortOwners()
        code = "import sys; print('up', flush=True); sys.stdin.read()"
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", code, "--model", "sha256-x",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert child.stdout is not None
            await child.stdout.readline()
            owner = owners.owner_of(origin)
            assert owner is not None
            assert owner.pid == os.getpid()
            assert any(line[-2:] == ("--model", "sha256-x") for line in owner.children)
        finally:
            assert child.stdin is not None
            child.stdin.close()
            await child.wait()
        again = owners.owner_of(origin)
        assert again is not None
        assert not any(line[-2:] == ("--model", "sha256-x") for line in again.children)


def test_a_port_that_nobody_owns_is_looked_up_rarely() -> None:
    with listener() as server:
        port = server.getsockname()[1]
    owners = PortOwners()
    assert owners.owner_of(Origin("127.0.0.1", port)) is None
    with socket.create_server(("127.0.0.1", port)):
        answers = [owners.owner_of(Origin("127.0.0.1", port)) for _ in range(LOOK_AGAIN_AFTER + 1)]
    assert answers[:-1] == [None] * LOOK_AGAIN_AFTER
    assert answers[-1] is not None


def test_another_owner_of_the_same_port_is_noticed() -> None:
    owners = PortOwners()
    with listener() as server:
        origin = Origin("127.0.0.1", server.getsockname()[1])
        assert owners.owner_of(origin) is not None
    assert owners.owner_of(origin) is None


@pytest.mark.skipif(not psutil.LINUX, reason="only Linux names sockets in /proc")
def test_a_known_owner_is_asked_for_without_walking_its_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = PortOwners()
    with listener() as other:
        with listener() as server:
            place = server.fileno()
            origin = Origin("127.0.0.1", server.getsockname()[1])
            first = owners.owner_of(origin)
            with monkeypatch.context() as patched:
                patched.setattr(psutil.Process, "net_connections", None)
                patched.setattr(psutil, "net_connections", None)
                assert owners.owner_of(origin) == first
        os.dup2(other.fileno(), place)  # a socket that listens is there again, and it is another one
        try:
            assert owners.owner_of(origin) is None
        finally:
            os.close(place)


def test_a_server_on_another_machine_has_no_owner_here() -> None:
    assert not is_local("192.0.2.7")
    assert not is_local("box.local")
    assert is_local("127.0.0.1")
    assert is_local("::1")
    assert is_local("localhost")
    with listener() as server:
        assert PortOwners().owner_of(Origin("192.0.2.7", server.getsockname()[1])) is None
