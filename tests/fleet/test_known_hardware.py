"""The table of known machines."""

import pytest

from herd.fleet.hardware import TABLE, UNKNOWN_CPU, UNKNOWN_GPU, Machine, known, machine
from herd_node.protocol.wire import Gpu, Hardware


@pytest.mark.parametrize(
    ("name", "gigabytes", "tflops"),
    [
        ("NVIDIA GeForce RTX 4090", 1008, 165.2),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 672, 88.2),
        ("NVIDIA GeForce RTX 4070 SUPER", 504, 71.0),
        ("NVIDIA GeForce RTX 4070", 504, 58.3),
        ("NVIDIA GeForce RTX 3060", 360, 25.5),
        ("NVIDIA L4", 300, 121),
        ("NVIDIA L40S", 864, 362),
        ("NVIDIA A100-SXM4-80GB", 2039, 312),
        ("Apple M2 Ultra", 800, 27.2),
        ("Apple M1", 68, 2.6),
        ("Apple M3 Pro", 150, 7.4),
    ],
)
def test_a_device_is_known_by_its_full_name(name, gigabytes, tflops):
    assert known(name) == Machine(gigabytes * 1e9, tflops * 1e12)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 2080 with Max-Q Design",
        "Apple M3 Ultra",
        "Voodoo 2",
    ],
)
def test_a_device_that_only_resembles_a_known_one_is_not_guessed(name):
    assert known(name) is None


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.pattern)
def test_every_row_has_a_source_and_figures_a_device_can_have(row):
    assert row.source
    assert 50 <= row.bandwidth_gb_per_s <= 10_000
    assert 1 <= row.tflops <= 2_000


def test_the_fastest_gpu_counts_and_unknown_hardware_gets_the_cautious_defaults():
    hardware = Hardware(cpu_model="AMD Ryzen 9 5950X")
    assert machine(hardware, ()) == UNKNOWN_CPU
    assert machine(hardware, (Gpu(name="Mystery 9"),)) == UNKNOWN_GPU
    both = (Gpu(name="NVIDIA GeForce RTX 3060"), Gpu(name="NVIDIA GeForce RTX 4090"))
    assert machine(hardware, both) == known("NVIDIA GeForce RTX 4090")
    assert machine(Hardware(cpu_model="Apple M2 Max", unified_memory=True), ()) == known("Apple M2 Max")
    assert machine(Hardware(cpu_model="Apple M9", unified_memory=True), ()) == UNKNOWN_GPU
