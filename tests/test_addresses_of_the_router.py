"""Which addresses the router names to others: those that its server really listens on."""

from __future__ import annotations

import pytest

from herd.app import listened_on

OWN = ("127.0.0.1", "192.0.2.1", "198.51.100.1", "::1", "2001:db8::1")


@pytest.mark.parametrize(
    ("bound", "named"),
    [
        (("0.0.0.0", "::"), OWN),
        (("0.0.0.0",), OWN[:3]),
        (("::",), OWN[3:]),
        (("192.0.2.1",), ("192.0.2.1",)),
        (("127.0.0.1", "::1"), ("127.0.0.1", "::1")),
        (("203.0.113.1",), ()),
    ],
)
def test_a_wildcard_names_its_whole_family_and_an_address_itself_while_it_is_ours(
    bound: tuple[str, ...], named: tuple[str, ...]
) -> None:
    assert listened_on(bound, OWN) == named
