"""The fitted constants of the timing model, with their meaning; the values are in ``constants.toml``.

``benchmarks/planner/fit.py`` fits them to published runs and writes the file. All are properties of kernels, links
or launches; none belongs to a source of measurements.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

from megapre.planner.hardware import Device

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("constants.toml")


@dataclass(frozen=True)
class Constants:
    """Shares are of the profile's figure. A name that ends in a generation holds for that one alone."""

    gemm_ampere: float = 0.95
    """Share of the best matrix product that large products of a training step sustain."""
    gemm_hopper: float = 0.90
    gemm_fp8: float = 0.90
    half_k_ampere: float = 250.0
    """Inner dimension at which a product reaches half its speed."""
    half_k_hopper: float = 330.0
    wave: float = 1.0
    """Exponent of the share of tile slots that hold work."""
    memory_ampere: float = 0.80
    """Share of memory bandwidth that byte-bound operations reach."""
    memory_hopper: float = 0.60
    eager: float = 1.2
    """Traffic of byte-bound operations that are not fused by hand, against those that are."""
    compiled: float = 1.6
    """The same for operations that XLA fused."""
    flash_ampere: float = 1.0
    """Share of the published attention kernels' speed."""
    flash_hopper: float = 1.0
    softmax: float = 0.80
    """Share of memory bandwidth of a softmax that writes the scores out."""
    misaligned: float = 0.30
    """Share of speed left to attention products whose heads are no multiple of 8 features."""
    launch_ampere: float = 8e-4
    """Seconds that the host needs to launch one block's forward, in a step of many blocks."""
    launch_hopper: float = 4e-4
    launch_tensor: float = 0.03
    """More of it for each tensor-parallel rank."""
    launch_moe: float = 0.15
    """More of it for each expert of a rank."""
    link: float = 0.90
    """Share of the ring bandwidth of NVLink."""
    latency: float = 2e-5
    """Seconds to start a collective inside a node."""
    chunk: float = 3e6
    """Bytes that each rank of a ring sends before it is full: nccl-tests reach half of it at 24 MiB over 8 ranks."""
    tensor_overlap: float = 0.5
    """Share of tensor-parallel traffic hidden in a stack that overlaps."""
    nic: float = 0.80
    """Share of the network adapters' bandwidth."""
    data_overlap: float = 0.6
    """Share of gradient and weight traffic hidden in a stack that overlaps."""
    shard_overlap: float = 0.7
    """Share of the shorter of computation and ZeRO-3 traffic that is hidden."""
    hop: float = 0.5
    """Share of a pipeline message that the sender waits for."""
    jitter: float = 0.004
    """Slow-down for each doubling of nodes."""
    fixed: float = 0.015
    """Seconds of a step outside the model: data, clip, logging."""
    moe: float = 1.15
    """Time of grouped products over uneven experts, against as much work in even products."""
    permute: float = 8.0
    """Reads and writes of a token's copy for an expert: routing, permutation, weighting and their inverse."""
    all_to_all: float = 0.6
    """Share of bandwidth of an expert exchange."""

    def by_generation(self, name: str, generation: str) -> float:
        """``name`` for a generation; one without its own constants takes those of hopper, a CPU those of ampere."""
        suffix = "ampere" if generation in ("ampere", "cpu") else "hopper"
        return float(getattr(self, f"{name}_{suffix}"))

    def on(self, device: Device) -> Constants:
        """These, with those that the device's own profile measured in their place."""
        return replace(self, **device.measured) if device.measured else self


def load(path: Path = FILE) -> Constants:
    """The constants of a file, or the starting values where there is none."""
    if not path.is_file():
        return Constants()
    values = tomllib.loads(path.read_text(encoding="utf-8"))["constants"]
    return Constants(**values)


def to_toml(constants: Constants, notes: str) -> str:
    """The text of ``constants.toml``."""
    lines = [f"# {line}" for line in notes.splitlines()]
    lines += ["[constants]"]
    lines += [f"{f.name} = {getattr(constants, f.name):.6g}" for f in fields(constants)]
    return "\n".join(lines) + "\n"
