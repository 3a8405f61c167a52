"""Web pages of others cannot manage models through the browser of whoever runs the router."""

from __future__ import annotations

import socket

import pytest

from herd.errors import Forbidden
from herd.web.sites import refuse_other_sites

OWN = socket.gethostname().lower().removesuffix(".local").encode()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {b"host": b"127.0.0.1:11435"},
        {b"host": b"[::1]:11435", b"origin": b"http://[::1]:11435", b"sec-fetch-site": b"same-origin"},
        {b"host": b"localhost:11435", b"origin": b"http://LOCALHOST:11435"},
        {b"host": OWN + b":11435"},
        {b"host": OWN.upper() + b".local"},
        {b"host": b"192.168.1.5", b"sec-fetch-site": b"none"},
    ],
)
def test_programs_and_our_own_page_pass(fields: dict[bytes, bytes]) -> None:
    refuse_other_sites(tuple(fields.items()))


@pytest.mark.parametrize(
    "fields",
    [
        {b"host": b"127.0.0.1:11435", b"origin": b"https://evil.example"},
        {b"host": b"127.0.0.1:11435", b"origin": b"null"},
        {b"host": b"127.0.0.1:11435", b"origin": b"http://127.0.0.1:3000"},
        {b"host": b"127.0.0.1:11435", b"sec-fetch-site": b"cross-site"},
        {b"host": b"127.0.0.1:11435", b"sec-fetch-site": b"same-site"},
        {b"host": b"evil.example", b"origin": b"http://evil.example"},
        {b"host": b"evil.example:11435"},
        {b"host": b"127.0.0.1.evil.example"},
        {b"host": b"localhost:11435", b"origin": b""},
        {b"host": b"["},
        {b"host": b"127.0.0.1", b"origin": b"http://["},
    ],
)
def test_pages_of_others_do_not(fields: dict[bytes, bytes]) -> None:
    with pytest.raises(Forbidden):
        refuse_other_sites(tuple(fields.items()))


def test_of_two_fields_the_first_counts() -> None:
    with pytest.raises(Forbidden):
        refuse_other_sites([(b"host", b"evil.example"), (b"host", b"localhost")])
