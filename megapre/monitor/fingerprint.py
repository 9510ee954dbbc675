"""What a run's bits depend on besides its job: versions, code, threads, processor."""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import megapre
from megapre.config.schema import Config

ADVISORY = ("config",)
"""Entries whose change on resume is not worth a line: the job is compared key by key."""


def fingerprint(config: Config) -> dict[str, Any]:
    """The environment of this process, as plain JSON: kept in every checkpoint and compared on resume."""
    import numpy
    import torch

    cuda = torch.cuda.is_available()
    return {
        "megapre": megapre.__version__,
        "revision": revision(Path(megapre.__file__).parent),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda or "",
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "config": hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest(),
    }


@functools.cache
def revision(folder: Path) -> str:
    """Git commit of the code, with ``+`` when files differ from it; empty outside a repository."""
    command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What changed between two fingerprints, in one line; empty when nothing did."""
    names = [name for name in new if name not in ADVISORY and name in old and old[name] != new[name]]
    return ", ".join(f"{name} {old[name] or 'none'} -> {new[name] or 'none'}" for name in names)
