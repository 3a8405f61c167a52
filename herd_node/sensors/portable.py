"""What psutil and the standard library know on every operating system. Nothing here blocks for long."""

from __future__ import annotations

import platform
import re
import shutil
import sys
from pathlib import Path

import psutil

from herd_node.protocol.wire import Cpu, Disk, Hardware, Memory, Power
from herd_node.sensors.pressure import pressure

OS_NAMES = {"linux": "linux", "darwin": "macos", "win32": "windows"}
MAX_MAC_ADDRESSES = 16
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_LOCALLY_ADMINISTERED = 0x02


def hardware(*, cpu_model: str | None = None, os_version: str | None = None) -> Hardware:
    """The two arguments are what the operating system's own sensors know better."""
    arch = platform.machine() or None
    return Hardware(
        os=OS_NAMES.get(sys.platform, sys.platform),
        os_version=os_version or platform.platform(terse=True) or None,
        arch=arch,
        cpu_model=cpu_model or platform.processor() or None,
        cores_physical=psutil.cpu_count(logical=False),
        cores_logical=psutil.cpu_count(logical=True),
        memory_bytes=psutil.virtual_memory().total,
        unified_memory=unified_memory(sys.platform, arch),
        mac_addresses=mac_addresses(),
    )


def unified_memory(system: str, arch: str | None) -> bool | None:
    """True on Apple's own chips, False on Intel Macs; elsewhere not known (some boards and APUs share it)."""
    return arch == "arm64" if system == "darwin" else None


def mac_addresses() -> tuple[str, ...]:
    """Burnt-in addresses only: those of containers, bridges and tunnels are made up."""
    found = set()
    for rows in psutil.net_if_addrs().values():
        for row in rows:
            if row.family == psutil.AF_LINK:
                address = row.address.lower().replace("-", ":")
                if _MAC.fullmatch(address) and _is_burnt_in(address):
                    found.add(address)
    return tuple(sorted(found)[:MAX_MAC_ADDRESSES])


def _is_burnt_in(address: str) -> bool:
    return address != "00:00:00:00:00:00" and not int(address[:2], 16) & _LOCALLY_ADMINISTERED


def cpu() -> Cpu:
    """Percent since the last call; psutil's first answer is a meaningless 0, so it is called once before."""
    return Cpu(percent=float(psutil.cpu_percent(None)), load_1m=float(psutil.getloadavg()[0]))


def memory() -> Memory:
    """macOS and Windows: the available share alone decides."""
    virtual, swap = psutil.virtual_memory(), psutil.swap_memory()
    return memory_reading(virtual.total, virtual.available, swap.used)


def memory_reading(total_bytes: int, available_bytes: int, swap_used_bytes: int) -> Memory:
    share = available_bytes / total_bytes if total_bytes else None
    return Memory(
        total_bytes=total_bytes,
        available_bytes=available_bytes,
        used_bytes=max(0, total_bytes - available_bytes),
        swap_used_bytes=swap_used_bytes,
        pressure=pressure(share),
        source="psutil",
    )


def disk(folder: Path) -> Disk:
    """Of the file system that holds the folder; it need not exist yet."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    return Disk(total_bytes=usage.total, free_bytes=usage.free)


def power() -> Power:
    """All unknown without a battery, and where psutil cannot see one."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    if battery is None:
        return Power()
    plugged = battery.power_plugged
    return Power(on_battery=None if plugged is None else not plugged, battery_percent=float(battery.percent))
