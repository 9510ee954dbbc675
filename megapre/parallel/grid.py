"""The grid of ranks: pipeline x data x context x tensor, tensor innermost, built once and passed, never global."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from megapre.config.schema import ParallelConfig
from megapre.parallel.comm import Axis


@dataclass(frozen=True)
class Grid:
    """This rank's axes.

    Two axes run along the pipeline, one per direction, so that between two ranks each carries messages one way
    only: NCCL would otherwise serialise activations behind gradients, or deadlock.
    """

    world: Axis
    """All ranks, on the device."""
    host: Axis
    """All ranks, over CPU memory and gloo: agreements and counts that must not wait for the device."""
    pipeline: Axis
    """Ranks that hold the stages; carries messages to later ranks."""
    backward: Axis
    """The same ranks; carries messages to earlier ranks."""
    data: Axis
    """Ranks that read different samples."""
    context: Axis
    """Ranks that hold different parts of the same sequences."""
    replicas: Axis
    """data x context: ranks with the same weights, over which gradients are summed and ZeRO shards."""
    tensor: Axis
    """Ranks that share each layer."""
    kv: Axis
    """Neighbours on the tensor axis that hold the same key/value head."""
    expert: Axis
    """Ranks that share the experts out among them: tokens travel over it."""
    expert_tensor: Axis
    """Neighbours on the tensor axis that share each expert."""
    expert_replicas: Axis
    """Ranks of a stage that hold the same experts."""
    tied: Mapping[tuple[int, ...], Axis] = field(default_factory=dict)
    """By the layers that share tensors: the ranks of a pipeline that hold any of these layers; size 1 on others."""

    def axes(self) -> dict[str, Axis]:
        """Every axis by its name, those of ``tied`` by number, in an order that all ranks share."""
        shared = {id(axis): axis for axis in self.tied.values()}.values()
        return {name: getattr(self, name) for name in AXES} | {f"tied {n}": axis for n, axis in enumerate(shared)}

    def mapped(self, change: Callable[[Axis], Axis]) -> Grid:
        """The grid with every axis changed; one with several names is changed once."""
        every = [*(getattr(self, name) for name in reversed(AXES)), *self.tied.values()]
        made = {key: change(axis) for key, axis in {id(axis): axis for axis in every}.items()}
        tied = {layers: made[id(axis)] for layers, axis in self.tied.items()}
        return replace(self, tied=tied, **{name: made[id(getattr(self, name))] for name in AXES})


AXES = (
    "world", "host", "pipeline", "backward", "data", "context", "replicas", "tensor", "kv", "expert", "expert_tensor",
    "expert_replicas",
)  # fmt: skip


def single() -> Grid:
    """The grid of one rank: no process group, no communication."""
    axes: dict[str, Any] = {name: Axis(name) for name in AXES}
    return Grid(**axes)


def build(
    parallel: ParallelConfig,
    device: torch.device,
    *,
    kv_copies: int = 1,
    tied: Mapping[tuple[int, ...], tuple[int, ...]] | None = None,
    experts: bool = False,
    host: str = "gloo",
) -> Grid:
    """Create every process group of the grid; all ranks call this together after ``init_process_group``.

    ``kv_copies`` tensor ranks hold each key/value head; ``tied`` maps layers that share tensors to the pipeline ranks
    that hold them, rising; ``experts`` tells whether the model has any; ``host`` is the backend of the axis over CPU
    memory. The expert mesh cuts the ranks of a stage another way: replicas x expert x expert_tensor, the last
    innermost.
    """
    shape = (parallel.pipeline, parallel.data, parallel.context, parallel.tensor)
    size = prod(shape)
    if size == 1:
        return single()
    if dist.get_world_size() != size:
        raise ValueError(
            f"parallel.pipeline x data x context x tensor = {' x '.join(map(str, shape))} = {size} ranks, but "
            f"{dist.get_world_size()} were launched."
        )
    names = ("pipeline", "data", "context", "tensor")
    mesh = dist.device_mesh.init_device_mesh(device.type, shape, mesh_dim_names=names)
    ranks = torch.arange(size).view(shape)

    def own(name: str) -> Axis:
        group = mesh.get_group(name)
        return Axis(name, mesh.get_local_rank(name), dist.get_world_size(group), group)

    def lines(name: str, table: torch.Tensor) -> Axis:
        """One group per row of ``table``; a rank in no row gets an axis of size 1."""
        if table.shape[1] == 1:
            return Axis(name)
        axis = Axis(name)
        for row in table.tolist():
            group = dist.new_group(row)
            if dist.get_rank() in row:
                axis = Axis(name, row.index(dist.get_rank()), len(row), group)
        return axis

    stages = ranks.permute(1, 2, 3, 0).reshape(-1, parallel.pipeline)
    replicas = ranks.permute(0, 3, 1, 2).reshape(-1, parallel.data * parallel.context)
    data = own("data")
    own_replicas = data if parallel.context == 1 else lines("replicas", replicas)
    if experts:
        mesh_shape = (parallel.pipeline, -1, parallel.expert, parallel.expert_tensor)
        by_expert = ranks.reshape(mesh_shape)
        copies = by_expert.permute(0, 2, 3, 1).flatten(0, 2)
        same = copies.shape[1] == own_replicas.size and parallel.tensor == parallel.expert_tensor
        expert = lines("expert", by_expert.permute(0, 1, 3, 2).flatten(0, 2))
        expert_tensor = lines("expert_tensor", by_expert.flatten(0, 2))
        expert_replicas = own_replicas if same else lines("expert_replicas", copies)
    else:
        expert, expert_tensor, expert_replicas = Axis("expert"), Axis("expert_tensor"), Axis("expert_replicas")
    shared = {held: lines("tied", stages[:, list(held)]) for held in sorted(set((tied or {}).values()))}
    return Grid(
        world=Axis("world", dist.get_rank(), size, dist.group.WORLD),
        host=Axis("host", dist.get_rank(), size, dist.new_group(backend=host)),
        pipeline=own("pipeline"),
        backward=lines("backward", stages),
        data=data,
        context=own("context"),
        replicas=own_replicas,
        tensor=own("tensor"),
        kv=lines("kv", ranks.reshape(-1, kv_copies)),
        expert=expert,
        expert_tensor=expert_tensor,
        expert_replicas=expert_replicas,
        tied={layers: shared[held] for layers, held in sorted((tied or {}).items())},
    )

