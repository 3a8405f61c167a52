"""Where a node may be called: at the TCP peer of its beat, if that is one of its own addresses.

A relay can pass a beat on but cannot become the node by it (docs/protocol.md §2, §3).
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

LOWEST_PORT = 1024
HIGHEST_PORT = 65535


def normal_host(text: str) -> IPv4Address | IPv6Address | None:
    """The address without zone; an IPv4 address inside an IPv6 one is the IPv4 address."""
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def refused(peer: str, port: int, own: Sequence[str]) -> str | None:
    """Why a node that beats from `peer` and names these addresses is not called there; None: it may be."""
    host = normal_host(peer)
    # 1. what can never be called, whoever names it
    if host is None:
        return f"its heartbeat came from {peer!r}, which is no IP address"
    if host.is_multicast or host.is_unspecified or host.is_link_local:
        return f"its heartbeat came from {host}, which cannot be called back (link-local or multicast)"
    if not LOWEST_PORT <= port <= HIGHEST_PORT:
        return f"its gateway port {port} is not within {LOWEST_PORT}-{HIGHEST_PORT}"
    # 2. the same machine: nobody else can come from there
    if host.is_loopback:
        return None
    # 3. one of its own interfaces
    if any(normal_host(address) == host for address in own):
        return None
    return (
        f"its heartbeat came from {host}, which is none of its own addresses;"
        " if that is right, set FLEET_NODE_ADDRESS there"
    )
