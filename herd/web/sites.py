"""Calls that a web page of somebody else makes through a browser on this machine.

Such a call comes from loopback, so `admit` lets it in; what changes models is refused here. A page is known
by what browsers say of it: Origin and Sec-Fetch-Site, and, where its name was bound to our address (DNS
rebinding), the Host. Programs say none of these, or our own.
"""

from __future__ import annotations

import socket
from functools import cache
from ipaddress import ip_address
from urllib.parse import urlsplit

from herd.errors import Forbidden
from herd_node.net.exchange import Headers


def refuse_other_sites(headers: Headers) -> None:
    """Raises Forbidden."""
    said = dict(reversed(headers))  # of equal fields the first counts
    host = said.get(b"host", b"").decode("latin-1").lower()
    if host and not _is_ours(_name_of(host)):
        raise Forbidden("models are managed under this machine's own name or address only")
    if said.get(b"sec-fetch-site", b"none") not in (b"same-origin", b"none"):
        raise Forbidden("models are not managed by pages of another site")
    origin = said.get(b"origin")
    if origin is not None and origin.decode("latin-1").lower().partition("://")[2] != host:
        raise Forbidden("models are not managed by pages of another site")


def _name_of(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_ours(name: str) -> bool:
    try:
        ip_address(name.partition("%")[0])
    except ValueError:
        return name in _own_names()
    return True


@cache
def _own_names() -> frozenset[str]:
    name = socket.gethostname().lower().removesuffix(".local")
    return frozenset({"localhost", name, f"{name}.local"})
