"""What the routers of a model did in a step: expert loads, auxiliary losses, and the biases that balance the loads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megapre.config.schema import Config
from megapre.models.build import Model
from megapre.models.context import Context
from megapre.models.moe import MoE, Router
from megapre.parallel.placement import Address


class Routing:
    """The routers of this rank's layers, and every layer's loads of the last step on every rank."""

    def __init__(self, config: Config, model: Model) -> None:
        self.config, self.grid = config.model, model.grid
        self.rate = config.optimizer.router_bias_rate
        mlps = [(number, layer.mlp) for number, layer in model.numbered() if hasattr(layer, "mlp")]
        self.routers: dict[int, Router] = {number: mlp.router for number, mlp in mlps if isinstance(mlp, MoE)}
        self.layers = [n for n in range(1, self.config.layers + 1) if self.config.has_experts(n)]
        self.table = torch.zeros(len(self.layers), self.config.experts + 2, dtype=torch.float64, device=model.device)
        """By layer: choices of each expert over the global batch, load-balance loss, z-loss."""

    def collect(self, contexts: Sequence[Context], sequences: int) -> None:
        """Add up what ``contexts`` say, over all ranks; ``sequences`` counts the global batch's."""
        if not self.layers:
            return
        self.table.zero_()
        for row, layer in zip(self.table, self.layers):
            for routed in [context.routed[layer] for context in contexts if layer in context.routed]:
                row[:-2] += routed.load
                row[-2] += routed.balance / sequences
                row[-1] += routed.z / sequences
        self.grid.world.all_reduce(self.table).wait()

    def update(self, skip: Tensor) -> None:
        """b_i += rate sign(mean load - load_i), arXiv 2408.15664, unless ``skip`` is 1."""
        for row, layer in zip(self.table, self.layers):
            router = self.routers.get(layer)
            if router is not None and router.bias is not None:
                load = row[:-2]
                step = torch.sign(load.mean() - load) * self.rate * (1 - skip)
                router.bias += step.to(router.bias.dtype)

    def metrics(self) -> dict[str, Tensor]:
        """Largest load over the mean, by the worst layer, and losses summed over layers; 0-d device tensors."""
        if not self.layers:
            return {}
        loads = self.table[:, :-2]
        found = {"expert_load": (loads.amax(1) / loads.mean(1)).max(), "router_z": self.table[:, -1].sum()}
        if self.config.gathers_choices:  # else a rank has counted the choices of its own part of a sequence alone
            found["load_balance"] = self.table[:, -2].sum()
        return found

    def pieces(self, *, share: bool) -> Iterator[tuple[Address, Tensor]]:
        """The biases as addressed flat tensors; with ``share`` one of the ranks that hold them speaks."""
        if share and (self.grid.tensor.rank or self.grid.replicas.rank):
            return
        for layer, router in self.routers.items():
            if router.bias is not None:
                shape = tuple(router.bias.shape)
                name = f"buffer/blocks.{layer - 1}.mlp.router.bias"
                yield Address(name, shape, (0,), shape, 0, shape[0]), router.bias
