"""What a device, its node and its network can do: profiles as TOML files, every figure with its source.

The shipped ones are in ``profiles/``; ``--gpu`` also takes the path of a user's own file, such as the one that
``benchmarks/gemm.py --profile`` writes from measurements of a CPU host.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from megapre.config.check import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).with_name("profiles")
GB, GIB, TERA = 1e9, 2.0**30, 1e12


@dataclass(frozen=True)
class FlashSpeed:
    """Forward + backward of a fused attention kernel on one device."""

    share: float
    """Share of the 16-bit peak that long sequences reach with 128 features a head."""
    half_length: float
    """Sequence length at which half of that is reached."""
    narrow: float
    """Factor for heads of 64 features and fewer."""


@dataclass(frozen=True)
class Device:
    """One kind of device and the machine it stands in. Bytes, seconds, FLOP."""

    key: str
    """The name of its file."""
    name: str
    kind: str
    """``gpu`` or ``cpu``."""
    generation: str
    """``ampere``, ``hopper``, ``blackwell`` or ``cpu``: selects the constants fitted for it."""
    peak: Mapping[str, float] = field(compare=False)
    """FLOP/s by number format, as the data sheet has it: the denominator of MFU."""
    best: Mapping[str, float] = field(compare=False)
    """FLOP/s by number format that the best matrix product reaches."""
    multiprocessors: int
    memory: float
    bandwidth: float
    """Bytes/s of its memory."""
    attention: Mapping[str, FlashSpeed] = field(compare=False)
    gpus_per_node: int
    nvlink: float
    """Bytes/s of bus bandwidth that a ring inside a node reaches."""
    nic: float
    """Bytes/s between nodes, for each device."""
    price: float
    """US dollars per device hour."""
    watts: float
    sources: Mapping[str, str] = field(compare=False)
    measured: Mapping[str, float] = field(default_factory=dict, compare=False)
    """Constants of the timing model (`constants.Constants`) that were measured on the device itself."""
    head: Mapping[str, Mapping[int, float]] = field(default_factory=dict, compare=False)
    """FLOP/s of our output layer with its loss and gradients, by number format and features of its input: where it was
    measured on its own."""

    def head_rate(self, dtype: str, features: int) -> float | None:
        """FLOP/s of the output layer: between measured widths on the line, beyond them the nearest; None: unknown."""
        known = sorted(self.head.get(dtype, {}).items())
        for (low, slow), (high, fast) in pairwise(known):
            if low <= features <= high:
                return slow + (fast - slow) * (features - low) / (high - low)
        return min(known, key=lambda point: abs(point[0] - features))[1] if known else None


def names() -> list[str]:
    """The shipped profiles."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(name: str) -> Device:
    """The profile called ``name``, or the one in the file of that path.

    Raises `ConfigError` in one sentence for an unknown name or a file without a figure or its source.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{ALIASES.get(name.lower(), name.lower())}.toml"
    if not path.is_file():
        close = difflib.get_close_matches(name.lower(), names(), n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigError(
            f"--gpu {name} is not a known device{hint} Known are {', '.join(names())}, or the path of a profile.toml"
            if close
            else f"--gpu {name} is not a known device: known are {', '.join(names())}, or the path of a profile.toml"
        )
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {' '.join(str(error).split())}") from None
    try:
        return _device(path.stem, tables)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ConfigError(f"{path} is no complete device profile: {_missing(error)}") from None


ALIASES = {"h100-80": "h100", "h100-sxm": "h100", "a100": "a100-80", "h200-sxm": "h200", "b200-sxm": "b200"}


def _device(key: str, tables: dict[str, Any]) -> Device:
    compute, memory, network, cost = (tables[name] for name in ("compute", "memory", "network", "cost"))
    sources = tables["sources"]
    figures = [*compute, *memory, *tables["attention"], *network, *cost]
    figures += ["measured"] if "measured" in tables else []
    unsourced = [name for name in figures if name not in sources and name != "gpus_per_node"]
    if unsourced:
        raise ValueError(f"[sources] has no entry for {', '.join(unsourced)}")
    return Device(
        key=key,
        name=tables["name"],
        kind=tables["kind"],
        generation=tables["generation"],
        peak={dtype: value * TERA for dtype, value in compute["peak"].items()},
        best={dtype: value * TERA for dtype, value in compute["best"].items()},
        multiprocessors=compute["multiprocessors"],
        memory=memory["gib"] * GIB,
        bandwidth=memory["bandwidth"] * GB,
        attention={name: FlashSpeed(**values) for name, values in tables["attention"].items()},
        gpus_per_node=network["gpus_per_node"],
        nvlink=network["nvlink"] * GB,
        nic=network["nic"] * GB,
        price=cost["price"],
        watts=cost["watts"],
        sources=sources,
        measured=tables.get("measured", {}),
        head={
            dtype: {int(features): value * TERA for features, value in rates.items()}
            for dtype, rates in compute.get("head", {}).items()
        },
    )


def _missing(error: Exception) -> str:
    return f"{error.args[0]} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
