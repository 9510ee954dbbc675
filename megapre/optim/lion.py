"""Lion (arXiv 2302.06675): the sign of an interpolated momentum, half of AdamW's state."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from megapre.optim.shard import Now, Rule, Shard

CHUNK = 1 << 22
"""Elements updated at a time: what is computed on the way takes no more memory than a few of these."""


class Lion(Rule):
    """c = b1 m + (1 - b1) g; w = w (1 - lr decay) - lr sign(c); m = b2 m + (1 - b2) g."""

    states: tuple[str, ...] = ("exp_avg",)

    def update(self, shard: Shard, gradient: Tensor, now: Now) -> None:
        """As the optimizer asks."""
        config, rate = self.config, now.lr * now.kept
        for stretch in shard.of("lion"):
            decay = config.weight_decay if stretch.decay else 0.0
            for part in _chunks(stretch.part):
                weight, momentum, g = shard.weight[part], shard.state("exp_avg", part), now.clean(gradient[part])
                direction = momentum.lerp(g, 1 - config.beta1).sign_()
                weight.mul_(1 - rate * decay).sub_(direction.mul_(rate))
                momentum.lerp_(g, (1 - config.beta2) * now.kept.to(g.dtype))
                shard.publish(part)


def _chunks(part: slice) -> Iterator[slice]:
    for first in range(part.start, part.stop, CHUNK):
        yield slice(first, min(first + CHUNK, part.stop))
