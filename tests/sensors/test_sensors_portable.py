"""psutil's part, the GPUs, and the rule that a failing sensor is an unknown value."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from herd_node.protocol.wire import Disk, Gpu, Heat, Memory
from herd_node.runtime.logs import forget
from herd_node.sensors import Sensors, portable
from herd_node.sensors.gpu import NvidiaGpus, throttle_words
from herd_node.sensors.linux import LinuxSensors
from tests.fakes.recordings import GOLDEN

MACHINES = json.loads((GOLDEN / "sensors" / "psutil.json").read_text())
del MACHINES["comment"]
GIB = 1024**3


@pytest.mark.parametrize("machine", MACHINES)
def test_memory_where_only_the_share_is_known(machine: str) -> None:
    values = MACHINES[machine]
    memory = portable.memory_reading(values["total"], values["available"], values["swap_used"])
    assert memory.pressure == values["pressure"]
    assert (memory.source, memory.used_bytes) == ("psutil", values["total"] - values["available"])


def test_this_machine_is_read_for_real(tmp_path: Path) -> None:
    reading = Sensors(tmp_path).read()
    assert reading.hardware.os in ("linux", "macos", "windows")
    assert (reading.hardware.cores_logical or 0) >= 1
    assert (reading.hardware.memory_bytes or 0) > GIB / 4
    assert reading.memory.pressure is not None
    assert (reading.disk.total_bytes or 0) > 0
    assert 0 <= (reading.cpu.percent or 0.0) <= 100


def test_unified_memory_is_known_for_apple_only() -> None:
    assert portable.unified_memory("darwin", "arm64") is True
    assert portable.unified_memory("darwin", "x86_64") is False
    assert portable.unified_memory("linux", "aarch64") is None


def test_the_disk_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    missing = tmp_path / "not" / "yet" / "there"
    assert portable.disk(missing).total_bytes == portable.disk(tmp_path).total_bytes


@pytest.mark.parametrize(
    ("address", "kept"),
    [
        ("a0:b1:c2:d3:e4:f5", True),
        ("02:42:ac:11:00:02", False),
        ("00:00:00:00:00:00", False),
        ("A0-B1-C2-D3-E4-F5", True),
    ],
)
def test_only_burnt_in_addresses_are_named(address: str, kept: bool, monkeypatch) -> None:
    row = SimpleNamespace(family=portable.psutil.AF_LINK, address=address)
    monkeypatch.setattr(portable.psutil, "net_if_addrs", lambda: {"eth0": [row]})
    assert portable.mac_addresses() == (("a0:b1:c2:d3:e4:f5",) if kept else ())


@pytest.mark.parametrize(
    ("battery", "on_battery", "percent"),
    [
        (None, None, None),
        (SimpleNamespace(percent=61, power_plugged=False), True, 61.0),
        (SimpleNamespace(percent=100, power_plugged=True), False, 100.0),
        (SimpleNamespace(percent=50, power_plugged=None), None, 50.0),
    ],
)
def test_battery(battery, on_battery, percent, monkeypatch) -> None:
    monkeypatch.setattr(portable.psutil, "sensors_battery", lambda: battery, raising=False)
    power = portable.power()
    assert (power.on_battery, power.battery_percent) == (on_battery, percent)


class Unreadable(LinuxSensors):
    def memory(self) -> Memory:
        raise PermissionError("no")

    def heat(self) -> Heat:
        raise RuntimeError("driver")


def test_a_failing_sensor_is_unknown_and_logged_once(tmp_path: Path, caplog) -> None:
    for what in ("memory", "heat"):
        forget(logging.getLogger("herd_node.sensors"), what)
    sensors = Sensors(tmp_path, linux=Unreadable(tmp_path))
    with caplog.at_level(logging.INFO):
        first, second = sensors.read(), sensors.read()
    assert (first.memory, first.heat) == (Memory(), Heat())
    assert first.disk != Disk()
    assert second.memory == Memory()
    said = [record.getMessage() for record in caplog.records if "sensor failed" in record.getMessage()]
    assert [line for line in said if "memory" in line] == [
        "the memory sensor failed and is reported as unknown: PermissionError('no')"
    ]
    assert len([line for line in said if "heat" in line]) == 1


class NvmlError(Exception):
    pass


class Cards:
    """NVML's functions over two made-up cards; what a card does not support raises, as NVML does."""

    def __init__(self, *, driver: bool = True) -> None:
        self.driver = driver
        self.shut_down = False

    def nvmlInit(self) -> None:
        if not self.driver:
            raise NvmlError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        self.shut_down = True

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return ["NVIDIA GeForce RTX 4090", b"Tesla M40"][handle]

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(total=24 * GIB, used=3 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        return self._only_first(handle, SimpleNamespace(gpu=41))

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        assert sensor == 0
        return 61

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self._only_first(handle, 212500)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:
        return self._only_first(handle, 0x24)

    @staticmethod
    def _only_first(handle: int, value):
        if handle:
            raise NvmlError("Not Supported")
        return value


def test_each_card_tells_what_it_can() -> None:
    first, second = NvidiaGpus(Cards()).read()
    assert first == Gpu(
        name="NVIDIA GeForce RTX 4090",
        vendor="nvidia",
        memory_total_bytes=24 * GIB,
        memory_used_bytes=3 * GIB,
        utilisation_percent=41.0,
        temperature_c=61.0,
        power_w=212.5,
        throttle=("power-cap", "thermal"),
    )
    assert (second.name, second.memory_total_bytes, second.temperature_c) == ("Tesla M40", 24 * GIB, 61.0)
    assert (second.utilisation_percent, second.power_w, second.throttle) == (None, None, ())


def test_without_a_driver_there_are_no_gpus_and_it_is_said_once(caplog) -> None:
    forget(logging.getLogger("herd_node.sensors.gpu"), "nvml")
    gpus = NvidiaGpus(Cards(driver=False))
    with caplog.at_level(logging.DEBUG):
        assert (gpus.read(), gpus.read()) == ((), ())
    assert len([record for record in caplog.records if "no NVIDIA GPU" in record.getMessage()]) == 1


def test_closing_gives_the_driver_back() -> None:
    cards = Cards()
    gpus = NvidiaGpus(cards)
    gpus.read()
    gpus.close()
    assert cards.shut_down


def test_throttle_reasons_that_are_not_a_brake_are_left_out() -> None:
    assert throttle_words(0x1) == ()  # idle
    assert throttle_words(0xFF) == (
        "power-cap",
        "hardware-slowdown",
        "thermal",
        "thermal-hardware",
        "power-brake",
    )
