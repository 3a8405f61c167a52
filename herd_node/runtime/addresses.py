"""What the machine's own interfaces say: the networks that are on-link, and the addresses that are ours.

Reads the operating system each time it is asked (interfaces come and go); the caller caches.
"""

from __future__ import annotations

import socket
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import psutil

Network = IPv4Network | IPv6Network

#: A wider "link" than this is a tunnel's catch-all route, not neighbours; it counts as the address alone.
_WIDEST_IPV4 = 8
_WIDEST_IPV6 = 16


def own_networks() -> list[Network]:
    """The networks of every interface that is up, loopback included, without duplicates, in a fixed order."""
    networks = {network_of(address, netmask) for address, netmask in _interface_addresses()}
    return sorted(
        networks, key=lambda network: (network.version, network.network_address.packed, network.prefixlen)
    )


def own_addresses() -> list[str]:
    """Every address of every interface that is up, loopback included, without zone, in a fixed order."""
    addresses = {ip_address(address) for address, _ in _interface_addresses()}
    return [
        str(address) for address in sorted(addresses, key=lambda address: (address.version, address.packed))
    ]


def network_of(address: str, netmask: str | None) -> Network:
    """The network around one interface address. IPv6 without a mask (Windows) is taken as a /64."""
    ip = ip_address(address)
    whole: int = ip.max_prefixlen
    if netmask is None:
        prefix = 64 if ip.version == 6 and not ip.is_loopback else whole
    else:
        prefix = _prefix_length(netmask, whole)
    if prefix < (_WIDEST_IPV4 if ip.version == 4 else _WIDEST_IPV6):
        prefix = whole
    return ip_network(f"{ip}/{prefix}", strict=False)


def _prefix_length(netmask: str, whole: int) -> int:
    """Leading one bits of a mask; a mask with holes counts as the address alone."""
    bits = int(ip_address(netmask.split("/")[0]))
    prefix = bits.bit_count()
    return prefix if bits == ((1 << prefix) - 1) << (whole - prefix) else whole


def _interface_addresses() -> list[tuple[str, str | None]]:
    """(address without zone, netmask) of interfaces that are up."""
    stats = psutil.net_if_stats()
    found: list[tuple[str, str | None]] = []
    for name, rows in psutil.net_if_addrs().items():
        if name in stats and not stats[name].isup:
            continue
        for row in rows:
            if row.family in (socket.AF_INET, socket.AF_INET6):
                found.append((row.address.split("%")[0], row.netmask))
    return found
