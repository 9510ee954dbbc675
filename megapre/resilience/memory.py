"""What memory held when it ran out: written beside the event log, as JSON, before the rank ends."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megapre.monitor.hardware import memory

LARGEST = 50
"""Kinds of tensors that are listed."""


@contextmanager
def snapshot_on_exhaustion(log: Path, rank: int) -> Iterator[None]:
    """Within: an error that means memory has run out leaves ``log/oom_rank_R.json`` behind, and goes on its way."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if ran_out(error):
            _leave(log / f"oom_rank_{rank}.json", error)
        raise


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out, on a device or the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def snapshot(error: BaseException) -> dict[str, Any]:
    """Host and device memory, live tensors by device, dtype and shape, and the device's segments, as plain JSON."""
    sizes: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    counts: Counter[tuple[str, str, tuple[int, ...]]] = Counter()
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor):  # isinstance would run code of lazy objects
            kind = (str(value.device), str(value.dtype).removeprefix("torch."), tuple(value.shape))
            counts[kind] += 1
            # Views share their storage's bytes; each is counted with its own, so the sum may exceed what is held.
            sizes[kind] += value.numel() * value.element_size()
    tensors = [
        {"device": kind[0], "dtype": kind[1], "shape": list(kind[2]), "count": counts[kind], "bytes": size}
        for kind, size in sizes.most_common(LARGEST)
    ]
    found: dict[str, Any] = {"time": time.time(), "error": str(error), "memory": memory(), "tensors": tensors}
    if torch.cuda.is_initialized():
        found["summary"] = torch.cuda.memory_summary()
        found["segments"] = [
            {key: segment[key] for key in ("device", "total_size", "allocated_size", "active_size", "segment_type")}
            for segment in torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        ]
    return found


def _leave(path: Path, error: BaseException) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(snapshot(error), indent=1))
        print(f"megapre: memory ran out; what it held is in {path}", file=sys.stderr, flush=True)
    except Exception as second:  # the first error is the one that counts
        print(f"megapre: {path} could not be written ({second})", file=sys.stderr, flush=True)
