"""What the kernel says of processes: CPU time, memory; and what machine this is. Linux only."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil


def cpu_s(pids: Iterable[int]) -> float:
    """User and system time so far of the processes and all their descendants, threads that ended included."""
    return sum(_cpu_s_of(pid) for pid in _trees(pids))


def _cpu_s_of(pid: int) -> float:
    # The process's CPU clock: the sum that /proc/PID/stat shows, in nanoseconds instead of ticks of 10 ms.
    # The number is the kernel's MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED), as clock_getcpuclockid makes it.
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0


def _trees(pids: Iterable[int]) -> set[int]:
    found: set[int] = set()
    for pid in pids:
        found.add(pid)
        with suppress(psutil.NoSuchProcess):
            found.update(child.pid for child in psutil.Process(pid).children(recursive=True))
    return found


def pss_bytes(pid: int) -> int:
    """Memory of one process, shared pages counted by its share of them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/smaps_rollup has no line Pss")


def raise_file_limit() -> int:
    """As many open files as allowed, for us and for all we start; returns how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = hard if hard != resource.RLIM_INFINITY else 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def description() -> dict[str, object]:
    """This machine, for whoever reads the figures later."""
    load_1m, _, _ = os.getloadavg()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_1m_at_start": round(load_1m, 2),
    }


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
