"""The output layer and its cross-entropy by chunks of rows, so that the logits never exist in whole.

For a chunk of rows: logits = x W^T into a reused buffer, local statistics, exchange over the vocabulary's ranks,
gradient in place (``megapre/kernels/cross_entropy.py``), its product with W into dx and with x added to dW. Loss and
gradients come from one pass over the chunks, 3 products in all; the row scale must hold every factor of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megapre.kernels import cross_entropy

Sums = tuple[Tensor, Tensor, Tensor]
"""(lse, target's logit, logit sum) over all ranks, each [rows]."""
Exchange = Callable[[Tensor, Tensor, Tensor, Tensor], Sums]
"""(max, sumexp, target's logit, logit sum) of this rank -> the sums over all."""

ROWS, GPU_ROWS = 768, 2048
"""Rows of a chunk on the CPU, where 512 to 2048 differ by a few percent, and on a GPU, whose products are faster
against its memory: dW is read and written once a chunk."""
COLUMNS = 4096
"""Columns of a chunk's logits that lie together on the CPU; a GPU wants whole rows, which its kernels read once."""

TILE = 32
"""Rows and columns of the blocks that AMX multiplies."""

Add = Callable[[Tensor, Tensor], object]
"""Adds its second argument to its first, which may be wider."""


def alone(maximum: Tensor, total: Tensor, target: Tensor, level: Tensor) -> Sums:
    """The exchange of a rank that holds the whole vocabulary."""
    return maximum + torch.log(total), target, level


class Chunks(Protocol):
    """The vocabulary against one chunk of rows at a time: the last chunk's logits are in its memory."""

    def sums(self, x: Tensor, targets: Tensor, scale: Tensor, exchange: Exchange) -> Sums:
        """Logits of x [rows, h] and their sums over all ranks."""

    def gradients(self, x: Tensor, targets: Tensor, scale: Tensor, lse: Tensor, dx: Tensor) -> None:
        """Write the gradient of x, given what ``sums`` was given, and add that of the weight to its main gradient."""


def by_chunks(
    chunks: Chunks, rows: int, x: Tensor, targets: Tensor, scale: Tensor, exchange: Exchange, options: dict[str, float],
    training: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Row losses [n] and the gradient of x [n, h], empty unless ``training``; ``options``: smoothing, vocab, z_loss."""
    losses = torch.empty(x.shape[0], dtype=scale.dtype, device=x.device)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if training else x[:0]
    for start in range(0, x.shape[0], rows):
        piece = slice(start, min(start + rows, x.shape[0]))
        part = x[piece], targets[piece], scale[piece]
        lse, target, level = chunks.sums(*part, exchange)
        losses[piece] = _losses(lse, target, level, scale[piece], options)
        if training:
            chunks.gradients(*part, lse, dx[piece])
    return losses, dx


def linear_ce_reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    valid: int,
    *,
    main_grad: Tensor | None,
    exchange: Exchange = alone,
    smoothing: float = 0.0,
    vocab: int = 0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Row losses [n] of logits x W^T, and the gradient of sum(scale x loss) with respect to x.

    x [n, h]; weight [v, h], this rank's part of the vocabulary of which ``valid`` rows are real; targets int64 [n],
    local; scale [n] fp32 (fp64 for fp64), 0 where a row is ignored. The gradient of the weight is added to
    ``main_grad`` [v, h] (fp32; fp64 for fp64); None means that no gradient is wanted, and the second result is empty.
    With a shared vocabulary the gradient of x is this rank's part of a sum. Not an autograd function. Raises
    ValueError for shapes that do not fit together.
    """
    check(x, weight, targets, scale, valid, main_grad)
    x, weight = x.detach(), weight.detach()
    options = {"smoothing": smoothing, "vocab": vocab, "z_loss": z_loss}
    logits = x @ weight.t()
    lse, target, level = exchange(*cross_entropy.statistics_reference(logits, targets, valid))
    losses = _losses(lse, target, level, scale, options)
    if main_grad is None:
        return losses, x.new_empty((0, x.shape[1]))
    cross_entropy.gradient_reference_(logits, targets, lse, scale, valid, **options)  # type: ignore[arg-type]
    main_grad.add_(logits.to(main_grad.dtype).t() @ x.to(main_grad.dtype))
    return losses, logits @ weight


def linear_ce_torch(
    x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, valid: int, *, main_grad: Tensor | None,
    exchange: Exchange = alone, **options: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``linear_ce_reference``, whose ``options`` these are, by chunks with the references of the local parts."""
    parts = (cross_entropy.statistics_reference, cross_entropy.gradient_reference_)
    return chunked(*parts, x, weight, targets, scale, valid, main_grad, exchange, options)


def linear_ce_cpp(
    x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, valid: int, *, main_grad: Tensor | None,
    exchange: Exchange = alone, **options: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``linear_ce_reference`` by chunks, with the local parts in C++; CPU, fp32 or bf16."""
    parts = (cross_entropy.statistics_cpp, cross_entropy.gradient_cpp_)
    check(x, weight, targets, scale, valid, main_grad)
    if _suits_tiles(x, weight, main_grad):
        cross_entropy.check_smoothing(options.get("smoothing", 0.0), int(options.get("vocab", 0)))
        rows = max(1, min(ROWS, x.shape[0]))
        chunks = _Tiles(weight.detach(), valid, rows, main_grad, options)
        return by_chunks(chunks, rows, x.detach(), targets, scale, exchange, options, main_grad is not None)
    # torch's sum of two types is several times slower than memory.
    add_ = torch.ops.megapre.accumulate_ if main_grad is not None and main_grad.is_contiguous() else Tensor.add_
    return chunked(*parts, x, weight, targets, scale, valid, main_grad, exchange, options, add_=add_)


def chunked(
    statistics: Callable[..., cross_entropy.Statistics],
    gradient_: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: Tensor,
    valid: int,
    main_grad: Tensor | None,
    exchange: Exchange,
    options: dict[str, float],
    rows: int = 0,
    add_: Add = Tensor.add_,
    whole_: Callable[..., Sums] | None = None,
) -> tuple[Tensor, Tensor]:
    """Any version from the versions of its two local parts; ``options``: smoothing, vocab, z_loss.

    ``whole_``: both parts in one kernel, for a rank that holds the whole vocabulary.
    """
    check(x, weight, targets, scale, valid, main_grad)
    cross_entropy.check_smoothing(options.get("smoothing", 0.0), int(options.get("vocab", 0)))
    x, weight = x.detach(), weight.detach()  # products into given memory are not for autograd
    on_cpu = x.device.type == "cpu"
    rows = max(1, min(rows or (ROWS if on_cpu else GPU_ROWS), x.shape[0]))
    parts = _Parts(statistics, gradient_, whole_, add_)
    chunks = _Blocks(parts, weight, valid, rows, COLUMNS if on_cpu else weight.shape[0], main_grad, options)
    return by_chunks(chunks, rows, x, targets, scale, exchange, options, main_grad is not None)


@dataclass(frozen=True)
class _Parts:
    """The local parts of one version."""

    statistics: Callable[..., cross_entropy.Statistics]
    gradient_: Callable[..., Tensor]
    whole_: Callable[..., Sums] | None
    add_: Add


class _Blocks:
    """Chunks whose products are torch's; logits in blocks of columns, each block in one piece of memory.

    Products of wide rows miss the TLB of a CPU and take twice the time.
    """

    def __init__(
        self, parts: _Parts, weight: Tensor, valid: int, rows: int, columns: int, main_grad: Tensor | None,
        options: dict[str, float],
    ) -> None:  # fmt: skip
        self.parts, self.valid, self.main_grad, self.options = parts, valid, main_grad, options
        self.memory = weight.new_empty(rows * weight.shape[0])
        self.starts = range(0, weight.shape[0], columns)
        self.weights = [weight[start : start + columns] for start in self.starts]
        self.at_once = False
        """Whether statistics and gradient of the chunk were one kernel."""

    def _blocks(self, rows: int, targets: Tensor) -> list[tuple[Tensor, Tensor, int]]:
        """(logits, targets, real columns) of every block, as they lie in the memory."""
        pieces = []
        for start, weight in zip(self.starts, self.weights):
            width = weight.shape[0]
            logits = self.memory[rows * start :][: rows * width].view(rows, width)
            pieces.append((logits, targets - start, max(0, min(self.valid - start, width))))
        return pieces

    def sums(self, x: Tensor, targets: Tensor, scale: Tensor, exchange: Exchange) -> Sums:
        blocks = self._blocks(x.shape[0], targets)
        options = self.options
        whole_ = self.parts.whole_
        whole = len(blocks) == 1 and exchange is alone and options.get("vocab", 0) in (0, self.valid)
        self.at_once = whole and whole_ is not None and self.main_grad is not None
        if self.at_once and whole_ is not None:
            logits, local, valid = blocks[0]
            torch.mm(x, self.weights[0].t(), out=logits)
            more = {name: options.get(name, 0.0) for name in ("smoothing", "z_loss")}
            return whole_(logits, local, scale, valid, **more)
        found = []
        for (logits, local, valid), weight in zip(blocks, self.weights):
            torch.mm(x, weight.t(), out=logits)
            found.append(self.parts.statistics(logits, local, valid))
        return exchange(*(found[0] if len(found) == 1 else _merged(*(torch.stack(c) for c in zip(*found)))))

    def gradients(self, x: Tensor, targets: Tensor, scale: Tensor, lse: Tensor, dx: Tensor) -> None:
        assert self.main_grad is not None
        blocks = self._blocks(x.shape[0], targets)
        for logits, local, valid in [] if self.at_once else blocks:
            self.parts.gradient_(logits, local, lse, scale, valid, **self.options)
        pairs = [(weight, logits) for weight, (logits, _, _) in zip(self.weights, blocks)]
        _add_products(dx, self.main_grad, pairs, x, self.parts.add_)


class _Tiles:
    """Chunks on a processor with AMX, bf16 (``csrc/cpu/tiles.cpp``): what products give is used while in the cache.

    Of the logits' gradient only that against 512 rows of the vocabulary exists at a time, on its way into the main
    gradient and into the gradient of x.
    """

    def __init__(
        self, weight: Tensor, valid: int, rows: int, main_grad: Tensor | None, options: dict[str, float]
    ) -> None:
        self.weight, self.valid, self.main_grad = weight, valid, main_grad
        self.options = [options.get(name, 0) for name in ("smoothing", "vocab", "z_loss")]
        self.memory = weight.new_empty(weight.shape[0] * _padded(rows))
        self.found = self.memory[:0]
        """The last chunk's statistics [blocks of the vocabulary, 4, rows]."""

    def _kept(self, rows: int) -> Tensor:
        """Memory for the exponentials of a chunk's logits."""
        return self.memory[: self.weight.shape[0] * _padded(rows)].view(self.weight.shape[0], -1)

    def sums(self, x: Tensor, targets: Tensor, scale: Tensor, exchange: Exchange) -> Sums:
        kept = self._kept(x.shape[0])
        self.found = torch.ops.megapre.head_logits(x, self.weight, targets, self.valid, self.options[0] != 0, kept)
        return exchange(*_merged(*self.found.unbind(1)))

    def gradients(self, x: Tensor, targets: Tensor, scale: Tensor, lse: Tensor, dx: Tensor) -> None:
        kept = self._kept(x.shape[0])
        torch.ops.megapre.head_gradient_(
            x, self.weight, targets, self.found, lse, scale, self.valid, *self.options, kept, self.main_grad, dx
        )


def _padded(rows: int) -> int:
    return -(-rows // TILE) * TILE


def _suits_tiles(x: Tensor, weight: Tensor, main_grad: Tensor | None) -> bool:
    """Whether the tiles of AMX can take the call: bf16, sizes that divide by 32, memory in one piece."""
    fits = x.dtype == weight.dtype == torch.bfloat16 and x.stride(1) == 1 and weight.is_contiguous()
    fits = fits and weight.shape[0] % TILE == 0 and weight.shape[1] % TILE == 0
    return fits and (main_grad is None or main_grad.is_contiguous()) and torch.ops.megapre.has_tiles()


def _merged(maxima: Tensor, totals: Tensor, targets: Tensor, levels: Tensor) -> cross_entropy.Statistics:
    """Statistics of the rows over all their blocks, from those of each block [blocks, rows]."""
    top = maxima.amax(0)
    base = torch.where(top == -torch.inf, 0.0, top)  # a row of -inf alone has a sum of 0, not NaN
    return top, (totals * torch.exp(maxima - base)).sum(0), targets.sum(0), levels.sum(0)


def _add_products(
    dx: Tensor, main_grad: Tensor, blocks: Sequence[tuple[Tensor, Tensor]], x: Tensor, add_: Add
) -> None:
    """dx = dlogits W; main_grad += dlogits^T x, fp32 where the others may be narrower; blocks of (W, dlogits)."""
    width = blocks[0][0].shape[0]
    if main_grad.dtype != x.dtype and main_grad.device.type == "cpu":
        # A narrow product of a transposed matrix is half as fast, so the small x is turned and the sum turns the rest.
        turned, total, part = x.t().contiguous(), dx.new_zeros(dx.shape, dtype=main_grad.dtype), torch.empty_like(dx)
        memory = x.new_empty(x.shape[1] * width)
        for (weight, logits), gradient in zip(blocks, main_grad.split(width)):
            add_(total, torch.mm(logits, weight, out=part))
            product = memory[: gradient.numel()].view(gradient.shape[::-1])
            add_(gradient, torch.mm(turned, logits, out=product).t())
        dx.copy_(total)
        return
    for number, ((weight, logits), gradient) in enumerate(zip(blocks, main_grad.split(width))):
        torch.addmm(dx, logits, weight, beta=1 if number else 0, out=dx)
        if gradient.dtype == x.dtype:
            gradient.addmm_(logits.t(), x)
        else:  # cuBLAS multiplies in bf16 and adds into fp32 in one pass
            torch.addmm(gradient, logits.t(), x, out_dtype=gradient.dtype, out=gradient)


def check(x: Tensor, weight: Tensor, targets: Tensor, scale: Tensor, valid: int, main_grad: Tensor | None) -> None:
    """Raises ValueError in one sentence for shapes that do not fit together."""
    fits = x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1]
    fits = fits and targets.shape == scale.shape == x.shape[:1] and 0 <= valid <= weight.shape[0]
    if not fits or (main_grad is not None and main_grad.shape != weight.shape):
        shapes = [list(t.shape) for t in (x, weight, targets, scale, *([] if main_grad is None else [main_grad]))]
        raise ValueError(
            f"linear_cross_entropy: x [n, h], weight and main_grad [v, h], targets and scale [n] with valid <= v are "
            f"needed, not {shapes} with valid = {valid}"
        )


def _losses(lse: Tensor, target: Tensor, level: Tensor, scale: Tensor, options: dict[str, float]) -> Tensor:
    found = cross_entropy.losses(lse, target, level, **options)  # type: ignore[arg-type]
    return torch.where(scale == 0, 0.0, found)  # an ignored row may hold anything
