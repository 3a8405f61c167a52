"""Which credential counts, in which order, and where the gateway listens because of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herd_node.cli import _default_host
from herd_node.membership import Membership
from herd_node.protocol.auth import Token, node_key
from herd_node.runtime.paths import DataDir, write_private
from herd_node.settings import load

TOKEN_SECRET, FILE_SECRET = bytes(32), bytes(range(32))
LAN = Token("router-1", ("http://192.0.2.1:11435",), TOKEN_SECRET)


@pytest.fixture
def data_dir(tmp_path: Path) -> DataDir:
    found = DataDir(tmp_path)
    found.ensure()
    found.node("n").ensure()
    return found


def with_join_file(data_dir: DataDir) -> None:
    write_private(data_dir.join_file, FILE_SECRET)
    stated = {"id": "router-2", "boot": None, "pid": None, "urls": ["http://192.0.2.2:7777"]}
    write_private(data_dir.router_file, json.dumps(stated).encode())


def default_host(membership: Membership, **flags: str) -> str:
    settings, _ = load(flags, {})
    return _default_host(settings, membership)


def test_the_token_comes_first_then_what_was_agreed_then_the_join_file(data_dir: DataDir) -> None:
    with_join_file(data_dir)
    first = Membership(data_dir, "n", None)
    first.accepted("router-3", "http://192.0.2.3:11435", first.candidates()[0])
    membership = Membership(data_dir, "n", LAN)
    assert membership.agent_id == first.agent_id
    assert [(one.source, one.router_id) for one in membership.candidates()] == [
        ("token", "router-1"),
        ("agent.json", "router-3"),
        ("join file", "router-2"),
    ]
    keys = [one.key for one in membership.candidates()]
    assert keys[0] == node_key(TOKEN_SECRET, membership.key_id)
    assert keys[1] == keys[2] == node_key(FILE_SECRET, membership.key_id)


def test_the_router_of_the_same_folder_is_tried_on_loopback_first(data_dir: DataDir) -> None:
    with_join_file(data_dir)
    (found,) = Membership(data_dir, "n", None).candidates()
    assert found.urls == ("http://127.0.0.1:7777", "http://192.0.2.2:7777")


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_join_file_that_holds_no_secret_is_no_credential(data_dir: DataDir, content: bytes) -> None:
    write_private(data_dir.join_file, content)
    assert Membership(data_dir, "n", None).candidates() == ()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"id":7,"urls":"x"}', b'{"urls":[1,null]}'])
def test_a_damaged_router_file_leaves_the_secret_usable(data_dir: DataDir, content: bytes) -> None:
    write_private(data_dir.join_file, FILE_SECRET)
    write_private(data_dir.router_file, content)
    (found,) = Membership(data_dir, "n", None).candidates()
    assert (found.router_id, found.urls) == (None, ())


def test_the_gateway_listens_as_near_as_the_router_is(data_dir: DataDir) -> None:
    assert default_host(Membership(data_dir, "n", None)) == "*"
    assert default_host(Membership(data_dir, "n", LAN)) == "*"
    assert default_host(Membership(data_dir, "n", LAN), router_url="http://localhost:1") == "localhost"
    assert default_host(Membership(data_dir, "n", None), router_url="http://192.0.2.1:1") == "*"
    with_join_file(data_dir)
    assert default_host(Membership(data_dir, "n", None)) == "localhost"
    assert default_host(Membership(data_dir, "n", LAN)) == "*"
