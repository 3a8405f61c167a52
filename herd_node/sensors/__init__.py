"""What the machine says of itself: memory, heat, processor, disk, power, GPUs. Read in a thread.

A sensor that fails is an unknown value and one line in the log, never an end of the reading. Where each value
comes from on which operating system, and what was run for real: docs/platforms.md.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from herd_node.protocol.wire import Cpu, Disk, Gpu, Hardware, Heat, Memory, Power
from herd_node.runtime.logs import once
from herd_node.sensors import portable
from herd_node.sensors.gpu import NvidiaGpus
from herd_node.sensors.linux import LinuxSensors

log = logging.getLogger(__name__)

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReading:
    """One look at the machine."""

    hardware: Hardware = field(default_factory=Hardware)
    cpu: Cpu = field(default_factory=Cpu)
    memory: Memory = field(default_factory=Memory)
    disk: Disk = field(default_factory=Disk)
    heat: Heat = field(default_factory=Heat)
    power: Power = field(default_factory=Power)
    gpus: tuple[Gpu, ...] = ()


class Sensors:
    """`read` blocks for some milliseconds; one call at a time. `linux` None: another operating system."""

    def __init__(
        self, model_folder: Path, *, linux: LinuxSensors | None = None, gpus: NvidiaGpus | None = None
    ) -> None:
        self._model_folder = model_folder
        self._linux = linux or (LinuxSensors() if sys.platform == "linux" else None)
        self._gpus = gpus or NvidiaGpus()
        self._hardware: Hardware | None = None
        self._guarded("cpu", portable.cpu, Cpu())  # its percent counts from here on

    def read(self) -> HostReading:
        if self._hardware is None:  # does not change while the agent runs
            self._hardware = self._guarded("hardware", self._read_hardware, None)
        return HostReading(
            hardware=self._hardware or Hardware(),
            cpu=self._guarded("cpu", portable.cpu, Cpu()),
            memory=self._guarded("memory", self._memory, Memory()),
            disk=self._guarded("disk", lambda: portable.disk(self._model_folder), Disk()),
            heat=self._guarded("heat", self._heat, Heat()),
            power=self._guarded("power", portable.power, Power()),
            gpus=self._guarded("gpu", self._gpus.read, ()),
        )

    def close(self) -> None:
        self._gpus.close()

    def _read_hardware(self) -> Hardware:
        if self._linux is None:
            return portable.hardware()
        return portable.hardware(cpu_model=self._linux.cpu_model(), os_version=self._linux.os_version())

    def _memory(self) -> Memory:
        linux = None if self._linux is None else self._linux.memory()
        return portable.memory() if linux is None else linux

    def _heat(self) -> Heat:
        return Heat() if self._linux is None else self._linux.heat()

    def _guarded(self, what: str, read: Callable[[], _Value], unknown: _Value) -> _Value:
        try:
            return read()
        except Exception as failure:  # noqa: BLE001 - drivers raise anything; the beat goes out all the same
            once(log, what, "the %s sensor failed and is reported as unknown: %r", what, failure)
            return unknown


__all__ = ["HostReading", "Sensors"]
