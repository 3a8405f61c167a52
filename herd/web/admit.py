"""Who may call: one pure function that every route passes (docs/behaviour.md, "Admission").

Never ASGI middleware: a binding that does not go through ASGI would pass it by.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import NamedTuple

from herd.errors import Forbidden
from herd.request import Principal
from herd_node.protocol.routes import Route
from herd_node.runtime.addresses import Network


class Neighbourhood(NamedTuple):
    """Networks that count as near: those of our own interfaces, and those that `--allow-net` names."""

    own: tuple[Network, ...]
    allowed: tuple[Network, ...]


def neighbourhood(own: Sequence[Network], allow_net: Sequence[str]) -> Neighbourhood:
    """From the interfaces' networks and the setting's CIDRs."""
    return Neighbourhood(tuple(own), tuple(ip_network(net, strict=False) for net in allow_net))


def admit(peer: str, route: Route, near: Neighbourhood) -> Principal:
    """The caller as a principal. Raises Forbidden with a sentence that says what would let it in."""
    address = _address(peer)
    if address is None:
        raise Forbidden("the caller's address is not known")
    if address.is_loopback:
        return Principal("loopback", peer, str(address))
    if not any(address in net for net in (*near.own, *near.allowed) if net.version == address.version):
        raise Forbidden(
            f"{address} is not on a network of this machine; to let it in, start herd with "
            f"--allow-net {address}/{address.max_prefixlen}"
        )
    if route.who in ("loopback", "admin"):
        raise Forbidden(f"{route.path} is served to this machine only")
    return Principal("lan", peer, str(address))


def _address(peer: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(peer.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address
