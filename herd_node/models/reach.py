"""How far away an address is. Pure.

A pull follows names and redirects that strangers control, so where it may connect is decided by the address
that is really connected to, and by nothing that is written in a URL (docs/backends.md).
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Literal

Reach = Literal["public", "private", "never"]

_PRIVATE = tuple(
    ip_network(net) for net in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")
)
_NAT64 = ip_network("64:ff9b::/96")


def reach_of(address: str) -> Reach:
    """`private`: this machine and networks like the one at home. `never`: link-local (where clouds keep their
    credentials), multicast, unspecified, reserved."""
    found = _unwrapped(ip_address(address.partition("%")[0]))
    if found.is_loopback or any(found in net for net in _PRIVATE if net.version == found.version):
        return "private"
    local = found.is_link_local or (isinstance(found, IPv6Address) and found.is_site_local)
    return "public" if found.is_global and not found.is_multicast and not local else "never"


def _unwrapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address inside, where an IPv6 address only carries one."""
    if isinstance(address, IPv6Address):
        carried = address.ipv4_mapped or address.sixtofour
        if carried is not None:
            return carried
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address
