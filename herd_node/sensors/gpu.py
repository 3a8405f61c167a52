"""NVIDIA GPUs through NVML. The driver is looked for once, when first asked; without it there are no GPUs.

Each value stands alone: a card that cannot tell its power still tells its memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from herd_node.protocol.wire import Gpu
from herd_node.runtime.logs import once

log = logging.getLogger(__name__)

#: NVML's reasons for a lower clock that mean "held back", by bit; idle and the user's settings are left out.
THROTTLE_BITS = {
    0x0000000000000004: "power-cap",
    0x0000000000000008: "hardware-slowdown",
    0x0000000000000020: "thermal",
    0x0000000000000040: "thermal-hardware",
    0x0000000000000080: "power-brake",
}
_TEMPERATURE_GPU = 0


class NvidiaGpus:
    """`nvml` is the pynvml module; given by tests, imported when first needed otherwise."""

    def __init__(self, nvml: Any = None) -> None:  # noqa: ANN401 - pynvml has no types
        self._nvml = nvml
        self._handles: list[Any] | None = None

    def read(self) -> tuple[Gpu, ...]:
        """Blocks for some milliseconds a card."""
        if self._handles is None:
            self._handles = self._start()
        return tuple(self._gpu(handle) for handle in self._handles)

    def close(self) -> None:
        if self._handles:
            self._try("shutdown", self._nvml.nvmlShutdown)
        self._handles = None

    def _start(self) -> list[Any]:
        try:
            if self._nvml is None:
                import pynvml

                self._nvml = pynvml
            self._nvml.nvmlInit()
            count = self._nvml.nvmlDeviceGetCount()
            return [self._nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
        except Exception as absent:  # noqa: BLE001 - a class of NVMLError a cause; all mean "no GPU", logged
            once(log, "nvml", "no NVIDIA GPU: %s", absent, level=logging.DEBUG)
            return []

    def _gpu(self, handle: Any) -> Gpu:  # noqa: ANN401
        nvml = self._nvml
        memory = self._try("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        name = self._try("name", lambda: nvml.nvmlDeviceGetName(handle))
        busy = self._try("utilisation", lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        celsius = self._try("temperature", lambda: nvml.nvmlDeviceGetTemperature(handle, _TEMPERATURE_GPU))
        milliwatts = self._try("power", lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        reasons = self._try(
            "throttle reasons", lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
        )
        return Gpu(
            name=name.decode(errors="replace") if isinstance(name, bytes) else name,
            vendor="nvidia",
            memory_total_bytes=None if memory is None else int(memory.total),
            memory_used_bytes=None if memory is None else int(memory.used),
            utilisation_percent=None if busy is None else float(busy.gpu),
            temperature_c=None if celsius is None else float(celsius),
            power_w=None if milliwatts is None else milliwatts / 1000.0,
            throttle=throttle_words(reasons or 0),
        )

    def _try(self, what: str, ask: Callable[[], Any]) -> Any:  # noqa: ANN401
        try:
            return ask()
        except Exception as unknown:  # noqa: BLE001 - not supported, lost, driver replaced: unknown, logged
            once(log, f"nvml {what}", "the GPU's %s is not known: %s", what, unknown, level=logging.DEBUG)
            return None


def throttle_words(bits: int) -> tuple[str, ...]:
    return tuple(word for bit, word in THROTTLE_BITS.items() if bits & bit)
