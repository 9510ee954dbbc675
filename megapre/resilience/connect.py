"""From a launch to a grid: this rank's device, its threads, its process groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megapre.config.schema import Config
from megapre.models.spec import kv_copies
from megapre.parallel import grid as grids
from megapre.parallel.grid import Grid
from megapre.parallel.pipeline.schedules import stage_owners
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
        yield build_grid(config, device), device
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def build_grid(config: Config, device: torch.device, host: str = "gloo") -> Grid:
    """The job's grid over the default process group; ``host`` is the backend of the axis over CPU memory."""
    owners = stage_owners(config.parallel)
    tied = (owners[0], owners[-1]) if config.model.tied_embeddings else None
    copies = kv_copies(config.model, config.parallel.tensor)
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
