"""From a launch to a grid: this rank's device, its threads, its process groups."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megapre.config.schema import Config
from megapre.models import spec
from megapre.parallel import grid as grids
from megapre.parallel.grid import Grid
from megapre.parallel.pipeline.schedules import stage_owners
from megapre.parallel.shared import share
from megapre.resilience.environment import threads_per_rank
from megapre.resilience.ranks import Ranks
from megapre.resilience.rendezvous import open_store


@contextmanager
def connected(config: Config, ranks: Ranks) -> Iterator[tuple[Grid, torch.device]]:
    """The grid of this launch and this rank's device; leaves the process group on the way out."""
    device = pick_device(config, ranks)
    torch.set_num_threads(threads_per_rank(config.train.threads, ranks.local_world, os.environ))
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
    try:
        if ranks.world > 1:
            join(ranks, device, config.resilience.timeout)
        grid = build_grid(config, device)
        yield share(grid, ranks.node, config.resilience.timeout) if device.type == "cpu" else grid, device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def build_grid(config: Config, device: torch.device, host: str = "gloo") -> Grid:
    """The job's grid over the default process group; ``host`` is the backend of the axis over CPU memory."""
    owners = stage_owners(config.parallel)
    stages = spec.stages(config.model, len(owners), config.parallel.layers_per_stage)
    home = {layer: owner for layers, owner in zip(stages, owners) for layer in layers}
    tied = {layers: tuple(sorted({home[layer] for layer in layers})) for layers in spec.shared(config.model)}
    copies = spec.kv_copies(config.model, config.parallel.tensor)
    experts = config.model.experts > 0
    return grids.build(config.parallel, device, kv_copies=copies, tied=tied, experts=experts, host=host)


def join(ranks: Ranks, device: torch.device, timeout: int) -> None:
    """Join the job's default process group: gloo for CPU tensors, NCCL for CUDA tensors; ``timeout`` in seconds."""
    # torchrun keeps a store of its own for the ranks at MASTER_PORT; everybody else leaves that to rank 0.
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        init_method="env://" if served else None,
        store=None if served else open_store(ranks, timeout),
        rank=ranks.rank,
        world_size=ranks.world,
        timeout=timedelta(seconds=timeout),
    )


def placement(ranks: Ranks, device: torch.device, system: Path = Path("/sys")) -> str:
    """Where this rank computes, in one line: device, its PCI address and NUMA node, the cores it is bound to."""
    cores = _ranges(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else "unknown"
    here = f"rank {ranks.rank} on {socket.gethostname()}: cores {cores}, {torch.get_num_threads()} threads"
    if device.type == "cpu":
        return f"{here}, no GPU: variables of CUDA and NCCL do not apply"
    card: Any = torch.cuda.get_device_properties(device)
    bus = f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"
    try:
        node = (system / "bus/pci/devices" / bus / "numa_node").read_text().strip()
    except OSError:
        node = "unknown"
    return f"{here}, {device} {card.name} at {bus}, NUMA node {node}"


def _ranges(numbers: list[int]) -> str:
    """0-3,8 of [0, 1, 2, 3, 8]."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def pick_device(config: Config, ranks: Ranks) -> torch.device:
    """This rank's device; ValueError when the job asks for a GPU and there is none."""
    wanted = config.train.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.device_count() < ranks.local_world:
        raise ValueError(
            f"train.device is cuda, but this host has {torch.cuda.device_count()} CUDA devices for "
            f'{ranks.local_world} ranks: set train.device = "cpu" or start fewer ranks per host.'
        )
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)
