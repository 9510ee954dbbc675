"""AdamW (arXiv 1711.05101)."""

from __future__ import annotations

from torch import Tensor

from megapre.optim.shard import Now, Rule, Shard


class AdamW(Rule):
    """One kernel per stretch, which writes the model's weights in the same pass."""

    states: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def update(self, shard: Shard, gradient: Tensor, now: Now) -> None:
        """As the optimizer asks."""
        config = self.config
        for stretch in shard.of("adamw"):
            part = stretch.part
            model = None if shard.model is None else shard.model[part]
            averages, squares = (shard.state(kind, part) for kind in self.states)
            self.kernels.adamw_(
                shard.weight[part], gradient[part], averages, squares, model,
                lr=now.lr, beta1=config.beta1, beta2=config.beta2, eps=config.eps,
                weight_decay=config.weight_decay if stretch.decay else 0.0,
                step=now.steps, divisor=now.divisor, skip=now.skip,
            )  # fmt: skip
