"""What the machine can do and is doing: a GEMM's speed, memory, and a GPU's state through NVML."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path

GIB = 2**30
GEMM_SIZE = 1024


def measure_peak(dtype: str, seconds: float = 0.15) -> float:
    """Best TFLOP/s of a square CPU GEMM in ``dtype`` (``fp32``, ``bf16``, ...) with this process's threads.

    bf16 and fp16 fall back to fp32 inside torch on CPUs without them; the figure is then what they reach.
    """
    import torch

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    left = torch.ones(GEMM_SIZE, GEMM_SIZE, dtype=kinds[dtype])
    right, out = left.clone(), torch.empty_like(left)
    torch.mm(left, right, out=out)
    best, start = float("inf"), time.perf_counter()
    while True:
        before = time.perf_counter()
        torch.mm(left, right, out=out)
        after = time.perf_counter()
        best = min(best, after - before)
        if after - start > seconds:
            return 2.0 * GEMM_SIZE**3 / best / 1e12


def device_name() -> str:
    """Name of this rank's GPU as the driver gives it."""
    import torch

    return str(torch.cuda.get_device_name())


def memory() -> dict[str, float]:
    """Host memory of this process and, once CUDA is in use, device memory; now and at its highest, in GiB."""
    found = {}
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        status = ""
    for line in status.splitlines():
        key, _, value = line.partition(":")
        if key in ("VmRSS", "VmHWM"):
            found["host_gib" if key == "VmRSS" else "host_peak_gib"] = int(value.split()[0]) * 1024 / GIB
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_initialized():
            found["device_gib"] = torch.cuda.memory_allocated() / GIB
            found["device_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


class GpuMeter:
    """Utilisation, temperature and power of this rank's GPU through NVML (``pip install megapre[gpu]``)."""

    def __init__(self, uuid: str) -> None:
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)

    @classmethod
    def find(cls) -> GpuMeter | None:
        """The meter of the current CUDA device, or None without one or without nvidia-ml-py."""
        if "torch" not in sys.modules or importlib.util.find_spec("pynvml") is None:
            return None
        import torch

        if not torch.cuda.is_initialized():
            return None
        uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
        return cls(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")

    def read(self) -> dict[str, float]:
        """``gpu_utilisation`` in %, ``gpu_temperature`` in degrees Celsius, ``gpu_power`` in W."""
        nvml, handle = self._nvml, self._handle
        return {
            "gpu_utilisation": float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "gpu_temperature": float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "gpu_power": nvml.nvmlDeviceGetPowerUsage(handle) / 1000.0,
        }

