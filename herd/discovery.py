"""The router announces itself on the local network (mDNS): an address, never trust (docs/protocol.md §5)."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from ipaddress import ip_address

from zeroconf import Error as ZeroconfError
from zeroconf import IPVersion, ServiceInfo
from zeroconf.asyncio import AsyncZeroconf

from herd_node.protocol.names import legal_node_id
from herd_node.runtime import logs
from herd_node.runtime.clock import Clock

_log = logging.getLogger(__name__)
SERVICE = "_fleet-manager._tcp.local."
_LOOK_S = 1.0
_RETRY_S = 60.0


class Announcement:
    """Announces while `run` runs; anew whenever `addresses`, the router's own, change."""

    def __init__(
        self, router_id: str, port: int, addresses: Callable[[], Sequence[str]], clock: Clock
    ) -> None:
        self._router_id = router_id
        self._port = port
        self._addresses = addresses
        self._clock = clock

    async def run(self) -> None:
        """For ever. A machine without multicast is said once and looked at again each minute."""
        while True:
            addresses = announceable(self._addresses())
            zeroconf = await self._announce(addresses) if addresses else None
            until_s = self._clock.now_s() + _RETRY_S
            try:
                while announceable(self._addresses()) == addresses:
                    if addresses and zeroconf is None and self._clock.now_s() >= until_s:
                        break
                    await self._clock.sleep(_LOOK_S)
            finally:
                if zeroconf is not None:
                    with contextlib.suppress(OSError):  # the interface it spoke on may be gone
                        await zeroconf.async_close()

    async def _announce(self, addresses: tuple[str, ...]) -> AsyncZeroconf | None:
        zeroconf: AsyncZeroconf | None = None
        try:
            zeroconf = _open()
            await zeroconf.async_register_service(self._info(addresses), allow_name_change=True)
        except (OSError, RuntimeError, ZeroconfError) as error:  # RuntimeError: no interface is up
            logs.once(_log, "mdns", "mDNS is not available here (%s); give agents --router-url", error)
            if zeroconf is not None:
                with contextlib.suppress(OSError):
                    await zeroconf.async_close()
            return None
        logs.forget(_log, "mdns")
        _log.info("announced by mDNS at %s", ", ".join(addresses))
        return zeroconf

    def _info(self, addresses: tuple[str, ...]) -> ServiceInfo:
        host = legal_node_id(socket.gethostname()).replace(".", "-")
        return ServiceInfo(
            SERVICE,
            f"herd-{host}.{SERVICE}",
            port=self._port,
            properties={"id": self._router_id, "v": "1"},
            server=f"{host}-{self._router_id[:6]}.local.",
            parsed_addresses=list(addresses),
        )


def announceable(addresses: Sequence[str]) -> tuple[str, ...]:
    """What another machine could use: neither loopback nor link-local, IPv4 first."""
    ips = [ip_address(address) for address in addresses]
    usable = [ip for ip in ips if not (ip.is_loopback or ip.is_link_local or ip.is_multicast)]
    return tuple(str(ip) for ip in sorted(usable, key=lambda ip: (ip.version, int(ip))))


def _open() -> AsyncZeroconf:
    try:
        return AsyncZeroconf(ip_version=IPVersion.All)
    except OSError:
        return AsyncZeroconf(ip_version=IPVersion.V4Only)
