"""Where a piece of a logical tensor lives: placements on the tensor axis, and addresses of pieces.

A *logical* tensor is what an unsharded model would hold (unpadded, q, k, v separate). A rank holds a
box of it; a ZeRO shard or a checkpoint entry holds a flat range of such a box.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Replicate:
    """Every rank of the axis holds the whole tensor."""

    def box(self, shape: tuple[int, ...], rank: int, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offset and size of this rank's box."""
        return (0,) * len(shape), shape

    def local_shape(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        """Shape of the tensor that a rank allocates, padding included."""
        return shape

    def replicas(self, size: int) -> int:
        """Ranks of the axis that hold the same box."""
        return size


@dataclass(frozen=True)
class Shard:
    """Dimension ``dim`` is cut into ``size / replicas`` equal blocks, each held by ``replicas`` neighbours.

    A dimension that is not divisible is padded at its end; pad elements belong to no box (vocabulary).
    ``replicas`` > 1 is how key/value heads fewer than the tensor-parallel ranks are held.
    """

    dim: int
    copies: int = 1

    def _block(self, length: int, size: int) -> int:
        blocks = size // self.copies
        return -(-length // blocks)

    def box(self, shape: tuple[int, ...], rank: int, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Offset and size of this rank's box; the size is clipped where padding begins."""
        block = self._block(shape[self.dim], size)
        start = min((rank // self.copies) * block, shape[self.dim])
        stop = min(start + block, shape[self.dim])
        offset = tuple(start if d == self.dim else 0 for d in range(len(shape)))
        return offset, tuple(stop - start if d == self.dim else n for d, n in enumerate(shape))

    def local_shape(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        """Shape of the tensor that a rank allocates, padding included."""
        return tuple(self._block(n, size) if d == self.dim else n for d, n in enumerate(shape))

    def replicas(self, size: int) -> int:
        """Ranks of the axis that hold the same box."""
        return self.copies


Placement = Replicate | Shard


@dataclass(frozen=True)
class Address:
    """A flat range ``[start, end)``, in row-major order, of a box of a logical tensor.

    A ZeRO slice that is no box still has an address.
    """

    name: str
    shape: tuple[int, ...]
    """Global logical shape."""
    offset: tuple[int, ...]
    """First index of the box."""
    size: tuple[int, ...]
    """Shape of the box."""
    start: int
    end: int


@dataclass(frozen=True)
class TensorSpec:
    """A logical tensor: all that the engine needs to know of a parameter."""

    name: str
    shape: tuple[int, ...]
    """Global logical shape, without padding."""
    placement: Placement = Replicate()
    """Placement on the tensor axis, or on the expert mesh's when it belongs to an expert."""
    layers: tuple[int, ...] = (0,)
    """Layers that use it; more than one when it is tied."""
    init: str = "normal"
    """``normal`` (mean 0, ``std``), ``zeros`` or ``ones``."""
    std: float = 0.0
    decay: bool = False
    """Whether weight decay applies."""
    fused: bool = False
    """Whether the next tensor of the list must follow it in memory, both being one matrix to the layer."""
    expert: int | None = None
    """The expert that it belongs to: only ranks that hold this expert hold it."""
    spread: bool = False
    """Whether each tensor rank works on other tokens (routers) or heads (norms of q and k) with it, sequence
    parallelism or not."""

    @property
    def replicas(self) -> str:
        """Axis of the ranks that hold the same box: gradients are summed over it, and ZeRO shards over it."""
        return "replicas" if self.expert is None else "expert_replicas"

    def partial(self, sequence_parallel: bool) -> str:
        """Axis over which this tensor's gradient is a partial sum on each rank; empty when it is none.

        Under sequence parallelism, what the tensor ranks replicate sees a shard of the sequence on each of them.
        """
        if isinstance(self.placement, Replicate):
            return "tensor" if sequence_parallel or self.spread else ""
        return "kv" if self.placement.copies > 1 else ""
