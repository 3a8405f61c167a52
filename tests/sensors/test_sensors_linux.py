"""Linux's sensors, read from trees of /proc and /sys that stand for whole machines."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from herd_node.sensors import Sensors
from herd_node.sensors.linux import LinuxSensors
from tests.fakes.recordings import GOLDEN

MIB = 1024**2


def lay_out(machine: str, root: Path) -> Path:
    text = (GOLDEN / "sensors" / f"{machine}.tree").read_text()
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, _, content = line.partition(": ")
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content.encode().decode("unicode_escape") + ("" if "\\n" in content else "\n"))
    return root


@pytest.mark.parametrize(
    ("machine", "state", "cpu_c", "source"),
    [
        ("laptop-intel", "nominal", 72.05, "hwmon + thermal zones"),
        ("raspberry-pi", "serious", 82.05, "hwmon + thermal zones"),
        ("server-amd", "nominal", 54.25, "hwmon"),
        ("board-rockchip", "serious", 86.0, "thermal zones"),
        ("this-container", None, None, None),
    ],
)
def test_heat_of_whole_machines(machine, state, cpu_c, source, tmp_path: Path) -> None:
    heat = LinuxSensors(lay_out(machine, tmp_path)).heat()
    assert (heat.state, heat.cpu_c, heat.throttled) == (state, cpu_c, None)
    assert heat.source == source or heat.source == f"{source} + throttle counters"


@pytest.mark.parametrize(
    ("machine", "available_mib", "swap_used_mib", "pressure", "source"),
    [
        ("laptop-intel", 1171, 976, "warn", "meminfo+psi"),
        ("raspberry-pi", 322, 99, "critical", "meminfo"),
        ("server-amd", 117187, 0, "normal", "meminfo+psi"),  # a container stalls; the machine has room
        ("this-container", 23730, 0, "normal", "meminfo+psi"),
    ],
)
def test_memory_of_whole_machines(machine, available_mib, swap_used_mib, pressure, source, tmp_path) -> None:
    memory = LinuxSensors(lay_out(machine, tmp_path)).memory()
    assert memory is not None
    assert ((memory.available_bytes or 0) // MIB, (memory.swap_used_bytes or 0) // MIB) == (
        available_mib, swap_used_mib,
    )  # fmt: skip
    assert (memory.pressure, memory.source) == (pressure, source)
    assert memory.used_bytes == (memory.total_bytes or 0) - (memory.available_bytes or 0)


@pytest.mark.parametrize(
    ("machine", "cpu_model", "os_version"),
    [
        ("laptop-intel", "Intel(R) Core(TM) i7-1260P", "Fedora Linux 43 (Workstation Edition)"),
        ("raspberry-pi", "Raspberry Pi 5 Model B Rev 1.0", "Debian GNU/Linux 12 (bookworm)"),
        ("board-rockchip", "FriendlyElec NanoPC-T6", None),
    ],
)
def test_names_of_processor_and_system(machine, cpu_model, os_version, tmp_path: Path) -> None:
    linux = LinuxSensors(lay_out(machine, tmp_path))
    assert (linux.cpu_model(), linux.os_version()) == (cpu_model, os_version)


def test_a_growing_throttle_counter_is_throttling_now(tmp_path: Path) -> None:
    linux = LinuxSensors(lay_out("laptop-intel", tmp_path))
    counter = tmp_path / "sys/devices/system/cpu/cpu1/thermal_throttle/core_throttle_count"
    assert linux.heat().throttled is None
    assert (linux.heat().throttled, linux.heat().state) == (False, "nominal")
    counter.write_text("10\n")
    heat = linux.heat()
    assert (heat.throttled, heat.state) == (True, "serious")
    assert linux.heat().throttled is False
    counter.write_text("3\n")  # it began anew
    assert linux.heat().throttled is False


@pytest.mark.parametrize(
    ("milli_c", "state"), [(84999, "nominal"), (85000, "fair"), (95000, "serious"), (100000, "critical")]
)
def test_a_laptop_grows_hot(milli_c: int, state: str, tmp_path: Path) -> None:
    root = lay_out("laptop-intel", tmp_path)
    (root / "sys/class/hwmon/hwmon4/temp1_input").write_text(f"{milli_c}\n")
    assert LinuxSensors(root).heat().state == state


def test_a_fixed_acpi_number_counts_only_where_nothing_else_speaks(tmp_path: Path) -> None:
    root = lay_out("laptop-intel", tmp_path)
    shutil.rmtree(root / "sys/class/hwmon/hwmon4")
    for zone in ("thermal_zone1", "thermal_zone2"):
        shutil.rmtree(root / "sys/class/thermal" / zone)
    assert LinuxSensors(root).heat().cpu_c == 27.8


@pytest.mark.parametrize("content", ["", "x", "-5000", "0", "255000", "1e5", "71 000"])
def test_a_sensor_that_reads_nonsense_is_left_out(content: str, tmp_path: Path) -> None:
    root = lay_out("server-amd", tmp_path)
    for name in ("temp1_input", "temp3_input"):
        (root / "sys/class/hwmon/hwmon1" / name).write_text(content)
    assert LinuxSensors(root).heat().state is None


def test_an_empty_machine_knows_nothing(tmp_path: Path) -> None:
    linux = LinuxSensors(tmp_path)
    heat = linux.heat()
    assert (heat.state, heat.cpu_c, heat.throttled, heat.source) == (None, None, None, None)
    assert (linux.memory(), linux.cpu_model(), linux.os_version()) == (None, None, None)


def test_a_folder_where_a_file_should_be_is_unknown(tmp_path: Path) -> None:
    root = lay_out("server-amd", tmp_path)
    (root / "proc/meminfo").unlink()
    (root / "proc/meminfo").mkdir()
    assert LinuxSensors(root).memory() is None


def test_a_machine_is_read_from_its_own_tree(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path, linux=LinuxSensors(lay_out("raspberry-pi", tmp_path)))
    reading = sensors.read()
    assert reading.hardware.cpu_model == "Raspberry Pi 5 Model B Rev 1.0"
    assert (reading.heat.state, reading.memory.pressure) == ("serious", "critical")
