"""Who the router is: made once, by whoever comes first, and never by itself anew."""

from __future__ import annotations

import stat
import sys
import threading
from pathlib import Path

import pytest

from herd.errors import StartError
from herd.identity import (
    Identity,
    RouterFile,
    load_or_create_identity,
    read_router_file,
    router_urls,
    write_router_file,
)
from herd_node.protocol.auth import Token, parse_token, render_token
from herd_node.runtime.paths import DataDir


@pytest.fixture
def folder(tmp_path: Path) -> DataDir:
    return DataDir(tmp_path / "data")


def test_id_and_secret_survive_restarts(folder: DataDir) -> None:
    first = load_or_create_identity(folder)
    write_router_file(folder, RouterFile(first.router_id, "0" * 16, 4711, ("http://10.0.0.5:11435",)))
    assert load_or_create_identity(folder) == first
    assert folder.join_file.read_bytes() == first.join_secret
    assert len(first.join_secret) == 32
    write_router_file(folder, RouterFile(first.router_id))
    assert load_or_create_identity(folder) == first
    assert read_router_file(folder) == RouterFile(first.router_id, None, None, ())


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_nobody_else_may_read_them(folder: DataDir) -> None:
    load_or_create_identity(folder)
    assert stat.S_IMODE(folder.root.stat().st_mode) == 0o700
    for path in (folder.join_file, folder.router_file):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_secret_is_in_no_repr(folder: DataDir) -> None:
    identity = load_or_create_identity(folder)
    assert identity.join_secret.hex() not in repr(identity)
    assert repr(identity.join_secret) not in repr(identity)


def test_all_who_come_at_once_get_the_same(folder: DataDir) -> None:
    folder.ensure()
    found: list[Identity] = []
    barrier = threading.Barrier(8)

    def come() -> None:
        barrier.wait()
        found.append(load_or_create_identity(folder))

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len({(identity.router_id, identity.join_secret) for identity in found}) == 1


def test_a_damaged_secret_is_never_replaced_unasked(folder: DataDir) -> None:
    load_or_create_identity(folder)
    folder.join_file.write_bytes(b"short")
    with pytest.raises(StartError, match="join secret"):
        load_or_create_identity(folder)
    assert folder.join_file.read_bytes() == b"short"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"x"', b'{"id": 5}', b'{"id": "a/b"}', b"\xff", b"[" * 10**5]
)
def test_a_damaged_router_file_gives_a_new_id_that_stays(folder: DataDir, content: bytes) -> None:
    folder.ensure()
    folder.router_file.write_bytes(content)
    first = load_or_create_identity(folder)
    assert load_or_create_identity(folder) == first
    token = Token(first.router_id, ("http://10.0.0.5:1",), first.join_secret)
    assert parse_token(render_token(token)) == token


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartError, match="cannot be used"):
        load_or_create_identity(DataDir(tmp_path / "file" / "data"))


OWN = ["10.8.0.2", "127.0.0.1", "172.17.0.1", "192.168.1.20", "::1", "fd00::5", "fe80::1"]


@pytest.mark.parametrize("host", ["", "*", "0.0.0.0", "::"])
def test_a_router_on_all_interfaces_names_its_lan_addresses(host: str) -> None:
    assert router_urls(host, 11435, OWN) == (
        "http://10.8.0.2:11435",
        "http://192.168.1.20:11435",
        "http://172.17.0.1:11435",
        "http://[fd00::5]:11435",
    )


def test_without_a_network_loopback_is_named() -> None:
    assert router_urls("", 9, ["127.0.0.1", "::1", "fe80::1"]) == ("http://127.0.0.1:9",)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("192.168.1.20", "http://192.168.1.20:9"),
        ("::1", "http://[::1]:9"),
        ("[fd00::5]", "http://[fd00::5]:9"),
    ],
)
def test_a_router_on_one_address_names_that_one(host: str, url: str) -> None:
    assert router_urls(host, 9, OWN) == (url,)


def test_a_token_can_hold_what_is_named() -> None:
    urls = router_urls("", 11435, [f"10.0.0.{i}" for i in range(1, 99)])
    assert parse_token(render_token(Token("a" * 16, urls, bytes(32)))).urls == urls
