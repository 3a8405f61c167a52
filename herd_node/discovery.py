"""Where routers are on the local network, as mDNS tells. It only finds addresses, it gives no trust.

A router is asked for by an id that is known already (docs/protocol.md §5); what an impostor announces under
that id gets one signed beat, which teaches it nothing, and no signed reply comes back.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from ipaddress import ip_address

from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from herd_node.runtime.clock import Clock
from herd_node.runtime.logs import once
from herd_node.runtime.tasks import Tasks

SERVICE = "_fleet-manager._tcp.local."
_RESOLVE_MS = 3000
_LOOK_S = 1.0
_RETRY_S = 60.0
_MOST_ROUTERS = 64
_MOST_URLS = 8

_log = logging.getLogger(__name__)


class RouterFinder:
    """Listens while `run` runs. `on_found` is called when an address became known."""

    def __init__(
        self,
        tasks: Tasks,
        clock: Clock,
        on_found: Callable[[], None],
        own_addresses: Callable[[], Sequence[str]],
    ) -> None:
        self._tasks = tasks
        self._clock = clock
        self._on_found = on_found
        self._own_addresses = own_addresses
        self._seen: dict[str, tuple[str, tuple[str, ...]]] = {}
        """Service name → (router id, URLs)."""

    def urls_of(self, router_id: str) -> tuple[str, ...]:
        """At most so many that trying them all is soon done, whoever announces them."""
        urls = (url for known, urls in self._seen.values() if known == router_id for url in urls)
        return tuple(dict.fromkeys(urls))[:_MOST_URLS]

    async def run(self) -> None:
        """For ever; anew whenever the machine's addresses change, because an interface that was not up yet
        is not listened on. A machine without multicast is said once and looked at again each minute."""
        while True:
            try:
                zeroconf = _open()
            except (OSError, RuntimeError) as error:  # RuntimeError: no interface is up
                once(_log, "mdns", "mDNS is not available here (%s); routers are not found by it", error)
                await self._until_addresses_change(_RETRY_S)
                continue
            browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[self._changed])
            try:
                await self._until_addresses_change(float("inf"))
            finally:
                with contextlib.suppress(OSError):  # the interface it spoke on may be gone
                    await browser.async_cancel()
                    await zeroconf.async_close()

    async def _until_addresses_change(self, at_most_s: float) -> None:
        before = self._own_addresses()
        until_s = self._clock.now_s() + at_most_s
        while self._own_addresses() == before and self._clock.now_s() < until_s:
            await self._clock.sleep(_LOOK_S)

    def _changed(
        self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            self._seen.pop(name, None)
        elif name in self._seen or len(self._seen) < _MOST_ROUTERS:
            self._tasks.spawn(self._resolve(zeroconf, service_type, name), name="mdns resolve")

    async def _resolve(self, zeroconf: Zeroconf, service_type: str, name: str) -> None:
        info = AsyncServiceInfo(service_type, name)
        if not await info.async_request(zeroconf, _RESOLVE_MS):
            return
        found = announced(info.properties, info.parsed_addresses(), info.port)
        if found is not None and self._seen.get(name) != found:
            self._seen[name] = found
            self._on_found()


def announced(
    properties: dict[bytes, bytes | None], addresses: list[str], port: int | None
) -> tuple[str, tuple[str, ...]] | None:
    """(router id, URLs) of one announcement, IPv4 first; None when it is not one of ours."""
    router_id = (properties.get(b"id") or b"").decode("ascii", "replace")
    if properties.get(b"v") != b"1" or not router_id or not port:
        return None
    usable = sorted(filter(_usable, addresses), key=lambda address: ":" in address)
    hosts = (f"[{address}]" if ":" in address else address for address in usable)
    urls = tuple(f"http://{host}:{port}" for host in hosts)
    return (router_id, urls) if urls else None


def _usable(address: str) -> bool:
    """Link-local ones need a zone that URLs cannot carry."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    return not (ip.is_link_local or ip.is_multicast or ip.is_unspecified)


def _open() -> AsyncZeroconf:
    try:
        return AsyncZeroconf(ip_version=IPVersion.All)
    except OSError:
        return AsyncZeroconf(ip_version=IPVersion.V4Only)
