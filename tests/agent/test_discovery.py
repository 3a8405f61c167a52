"""What one mDNS announcement says. (The multicast itself is tested between network namespaces.)"""

from __future__ import annotations

import pytest

from herd_node.discovery import announced

OURS: dict[bytes, bytes | None] = {b"v": b"1", b"id": b"router-1", b"path": b"/"}


def test_addresses_become_urls_ipv4_first_and_link_local_ones_are_left_out() -> None:
    found = announced(OURS, ["fe80::1", "2001:db8::1", "192.0.2.1", "not an address"], 11435)
    assert found == ("router-1", ("http://192.0.2.1:11435", "http://[2001:db8::1]:11435"))


@pytest.mark.parametrize(
    ("properties", "addresses", "port"),
    [
        ({b"v": b"2", b"id": b"router-1"}, ["192.0.2.1"], 11435),
        ({b"id": b"router-1"}, ["192.0.2.1"], 11435),
        ({b"v": b"1"}, ["192.0.2.1"], 11435),
        ({b"v": b"1", b"id": None}, ["192.0.2.1"], 11435),
        (OURS, [], 11435),
        (OURS, ["fe80::1"], 11435),
        (OURS, ["192.0.2.1"], None),
        (OURS, ["192.0.2.1"], 0),
    ],
)
def test_what_is_not_one_of_ours_is_ignored(
    properties: dict[bytes, bytes | None], addresses: list[str], port: int | None
) -> None:
    assert announced(properties, addresses, port) is None
