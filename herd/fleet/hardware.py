"""Known machines: memory bandwidth and FP16 compute, for the first guess of a node's speed.

One table. A figure stands here only with its source; a machine that is not here gets the cautious defaults
of docs/scheduling.md §1, and after the first requests the learned rates replace the guess anyway.
Laptop variants of desktop cards share their names and little else, so they are left to the defaults.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from herd_node.protocol import wire

DISK_BYTES_PER_S = 2e9
BUS_BYTES_PER_S = 10e9
#: The share of unified memory that a GPU may use (docs/protocol.md §3).
UNIFIED_GPU_RATIO = 0.72


class Machine(NamedTuple):
    """What decides how fast weights stream and prompts are computed."""

    bandwidth_bytes_per_s: float
    flops: float


UNKNOWN_CPU = Machine(60e9, 1e12)
UNKNOWN_GPU = Machine(300e9, 20e12)


class Known(NamedTuple):
    """One row. `pattern` is searched in the device's name, ignoring case; the first row that fits counts."""

    pattern: str
    bandwidth_gb_per_s: float
    tflops: float
    """Dense FP16 with FP32 accumulation on tensor cores; on Apple's GPUs FP16 runs at the FP32 rate."""
    source: str


_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture whitepaper"
_ADA = "NVIDIA Ada GPU architecture whitepaper; GeForce RTX 40 specification pages"
_AMPERE = "NVIDIA Ampere GA102 whitepaper; GeForce RTX 30 specification pages"
_TURING = "NVIDIA Turing GPU architecture whitepaper"
_DATASHEET = "NVIDIA data sheet of that product"
_AMD = "AMD Radeon product page of that card"
_APPLE = "Apple technical specifications (bandwidth); Apple newsroom (GPU TFLOPS)"
_APPLE_HF = "Apple technical specifications (bandwidth); huggingface.js hardware table (GPU TFLOPS)"

# A longer name stands before the shorter one that it contains.
TABLE: tuple[Known, ...] = (
    Known(r"RTX 5090\b", 1792, 209.5, _BLACKWELL),
    Known(r"RTX 5080\b", 960, 112.6, _BLACKWELL),
    Known(r"RTX 5070 Ti\b", 896, 87.9, _BLACKWELL),
    Known(r"RTX 5070\b", 672, 61.7, _BLACKWELL),
    Known(r"RTX 4090 D\b", 1008, 147.1, _ADA),
    Known(r"RTX 4090\b", 1008, 165.2, _ADA),
    Known(r"RTX 4080 SUPER\b", 736, 104.4, _ADA),
    Known(r"RTX 4080\b", 717, 97.5, _ADA),
    Known(r"RTX 4070 Ti SUPER\b", 672, 88.2, _ADA),
    Known(r"RTX 4070 Ti\b", 504, 80.2, _ADA),
    Known(r"RTX 4070 SUPER\b", 504, 71.0, _ADA),
    Known(r"RTX 4070\b", 504, 58.3, _ADA),
    Known(r"RTX 4060 Ti\b", 288, 44.1, _ADA),
    Known(r"RTX 4060\b", 272, 30.2, _ADA),
    Known(r"RTX 3090 Ti\b", 1008, 80.0, _AMPERE),
    Known(r"RTX 3090\b", 936, 71.0, _AMPERE),
    Known(r"RTX 3080 Ti\b", 912, 68.2, _AMPERE),
    Known(r"RTX 3080\b", 760, 59.5, _AMPERE),
    Known(r"RTX 3070 Ti\b", 608, 43.5, _AMPERE),
    Known(r"RTX 3070\b", 448, 40.6, _AMPERE),
    Known(r"RTX 3060 Ti\b", 448, 32.4, _AMPERE),
    Known(r"RTX 3060\b", 360, 25.5, _AMPERE),
    Known(r"RTX 2080 Ti\b", 616, 53.8, _TURING),
    Known(r"RTX 6000 Ada\b", 960, 364.2, _DATASHEET),
    Known(r"RTX A6000\b", 768, 154.8, _DATASHEET),
    Known(r"RTX A5000\b", 768, 111.1, _DATASHEET),
    Known(r"RTX A4000\b", 448, 76.7, _DATASHEET),
    Known(r"H200\b", 4800, 989, _DATASHEET),
    Known(r"H100 80GB HBM3|H100 SXM", 3350, 989, _DATASHEET),
    Known(r"H100 PCIe\b", 2000, 756, _DATASHEET),
    Known(r"A100-SXM4-80GB", 2039, 312, _DATASHEET),
    Known(r"A100 80GB PCIe", 1935, 312, _DATASHEET),
    Known(r"A100-(SXM4|PCIE)-40GB", 1555, 312, _DATASHEET),
    Known(r"\bL40S\b", 864, 362, _DATASHEET),
    Known(r"\bL40\b", 864, 181, _DATASHEET),
    Known(r"\bL4\b", 300, 121, _DATASHEET),
    Known(r"\bA10\b", 600, 125, _DATASHEET),
    Known(r"Tesla T4\b", 320, 65, _DATASHEET),
    Known(r"V100-SXM2", 900, 125, _DATASHEET),
    Known(r"RX 7900 XTX\b", 960, 122.8, _AMD),
    Known(r"RX 7900 XT\b", 800, 103.0, _AMD),
    Known(r"RX 6900 XT\b", 512, 46.1, _AMD),
    Known(r"RX 6800 XT\b", 512, 41.5, _AMD),
    Known(r"Apple M1 Ultra\b", 800, 20.8, _APPLE),
    Known(r"Apple M1 Max\b", 400, 10.4, _APPLE),
    Known(r"Apple M1 Pro\b", 200, 5.2, _APPLE),
    Known(r"Apple M1\b", 68, 2.6, _APPLE),
    Known(r"Apple M2 Ultra\b", 800, 27.2, _APPLE),
    Known(r"Apple M2 Max\b", 400, 13.6, _APPLE),
    Known(r"Apple M2 Pro\b", 200, 6.8, _APPLE),
    Known(r"Apple M2\b", 100, 3.6, _APPLE),
    # The name does not tell the smaller GPUs of a chip (M3 Max with 30 cores: 300 GB/s) from the full one.
    Known(r"Apple M3 Max\b", 400, 14.2, _APPLE_HF),
    Known(r"Apple M3 Pro\b", 150, 7.4, _APPLE_HF),
    Known(r"Apple M3\b(?! Ultra)", 100, 4.1, _APPLE_HF),
    Known(r"Apple M4 Max\b", 546, 18.4, _APPLE_HF),
    Known(r"Apple M4 Pro\b", 273, 9.2, _APPLE_HF),
    Known(r"Apple M4\b(?! Ultra)", 120, 4.6, _APPLE_HF),
)

_COMPILED = tuple((re.compile(row.pattern, re.IGNORECASE), row) for row in TABLE)
_SLOWER_TWIN = re.compile(r"laptop|mobile|max-q", re.IGNORECASE)


@lru_cache(maxsize=1024)
def known(name: str) -> Machine | None:
    """The table's figures for a device name as NVML or the operating system spells it."""
    if _SLOWER_TWIN.search(name):
        return None
    for pattern, row in _COMPILED:
        if pattern.search(name):
            return Machine(row.bandwidth_gb_per_s * 1e9, row.tflops * 1e12)
    return None


def machine(hardware: wire.Hardware, gpus: Sequence[wire.Gpu]) -> Machine:
    """What models run on: the fastest GPU (layers run one after the other), Apple's chip, or the CPU."""
    # 1. GPUs
    if gpus:
        return max((known(gpu.name) if gpu.name else None) or UNKNOWN_GPU for gpu in gpus)
    # 2. unified memory: the chip is its own GPU
    chip = known(hardware.cpu_model) if hardware.cpu_model else None
    if hardware.unified_memory:
        return chip or UNKNOWN_GPU
    # 3. the CPU alone
    return UNKNOWN_CPU
