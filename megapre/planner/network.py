"""Seconds of collectives over groups of ranks: inside a node over NVLink, between nodes over the adapters."""

from __future__ import annotations

import math

from megapre.planner.constants import Constants
from megapre.planner.job import Job

LONGEST = 32
"""Ranks of the longest ring: more are joined in trees of rings."""


class Network:
    """The links of one job. Ranks are placed tensor innermost, then context, data, pipeline."""

    def __init__(self, job: Job, constants: Constants) -> None:
        self.node = job.device.gpus_per_node
        self.inside = (job.nvlink or job.device.nvlink) * constants.link
        self.adapter = (job.nic or job.device.nic) * constants.nic
        self.exchange = (job.nic or job.device.nic) * constants.all_to_all
        self.latency = constants.latency
        self.chunk = constants.chunk

    def bandwidth(self, ranks: int, stride: int) -> float:
        """Bytes/s of a ring over ``ranks`` ranks that stand ``stride`` apart.

        A ring that leaves the node uses as many adapters as the node has ranks of it side by side.
        """
        if ranks * stride <= self.node:
            return self.inside
        return min(self.inside, self.adapter * max(1, self.node // stride))

    def started(self, ranks: int, steps: int = 1) -> float:
        """Latency of ``steps`` collectives over ``ranks``."""
        return steps * self.latency * (1 + 0.1 * math.log2(ranks)) if ranks > 1 else 0.0

    def all_reduce(self, size: float, ranks: int, stride: int = 1) -> float:
        """Seconds to sum ``size`` bytes on every rank (ring: reduce-scatter, then all-gather)."""
        return 2 * self.gather(size, ranks, stride) - self.started(ranks) if ranks > 1 else 0.0

    def gather(self, size: float, ranks: int, stride: int = 1) -> float:
        """Seconds to gather ``size`` bytes in all, or to reduce-scatter them."""
        if ranks <= 1:
            return 0.0
        moved = (ranks - 1) * (size / ranks + self.chunk * min(1.0, LONGEST / ranks))
        return moved / self.bandwidth(ranks, stride) + self.started(ranks)

    def exchange_of_experts(self, tokens: float, copies: int, size: float, ranks: int, stride: int) -> float:
        """Seconds to send every of ``tokens`` tokens of ``size`` bytes to its ``copies`` experts on ``ranks`` ranks.

        Between nodes a token travels once to each node that holds any of its experts, and is dealt out there over
        NVLink, as DeepEP and hierarchical all-to-alls do; both run side by side.
        """
        if ranks <= 1:
            return 0.0
        near = max(1, min(ranks, self.node // min(self.node, stride)))
        nodes = max(1, ranks // near)
        visited = (nodes - 1) * (1 - (1 - 1 / nodes) ** copies)
        inside = tokens * copies * size * (near - 1) / near / self.inside
        return max(inside, tokens * visited * size / self.exchange) + 2 * self.latency
