"""The output layer and its cross-entropy by chunks of rows, so that the logits never exist in whole.

For a chunk of rows: logits = x W^T into a reused buffer, local statistics, exchange over the vocabulary's ranks,
gradient in place (``megapre/kernels/cross_entropy.py``), its product with W into dx and with x added to dW. Loss and
gradients come from one pass over the chunks, 3 products in all; the row scale must hold every factor of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

Add = Callable[[Tensor, Tensor], object]
"""Adds its second argument to its first, which may be wider."""


def alone(maximum: Tensor, total: Tensor, target: Tensor, level: Tensor) -> Sums:
    """The exchange of a rank that holds the whole vocabulary."""
    return maximum + torch.log(total), target, level


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
) -> tuple[Tensor, Tensor]:
    """Any version from the versions of its two local parts; ``options``: smoothing, vocab, z_loss."""
    check(x, weight, targets, scale, valid, main_grad)
    x, weight = x.detach(), weight.detach()
    n, vocabulary = x.shape[0], weight.shape[0]
    on_cpu = x.device.type == "cpu"
    rows, columns = rows or (ROWS if on_cpu else GPU_ROWS), COLUMNS if on_cpu else vocabulary
    losses = torch.empty(n, dtype=scale.dtype, device=x.device)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if main_grad is not None else x[:0]
    buffer = x.new_empty(min(rows, n) * vocabulary)
    starts = range(0, vocabulary, columns)
    for start in range(0, n, rows):
        piece = slice(start, min(start + rows, n))
        count = piece.stop - start
        # Each block of columns has its rows together: products of wide rows miss the TLB and take twice the time.
        blocks = [
            _Block(weight[c : c + columns], buffer[count * c :], targets[piece] - c, max(0, min(valid - c, columns)))
            for c in starts
        ]
        found = []
        for block in blocks:
            torch.mm(x[piece], block.weight.t(), out=block.logits)
            found.append(statistics(block.logits, block.targets, block.valid))
        lse, target, level = exchange(*_merged(found))
        losses[piece] = _losses(lse, target, level, scale[piece], options)
        if main_grad is None:
            continue
        for block in blocks:
            gradient_(block.logits, block.targets, lse, scale[piece], block.valid, **options)
        add_products(dx[piece], main_grad, [(block.weight, block.logits) for block in blocks], x[piece], add_)
    return losses, dx


class _Block:
    """A chunk's logits against some rows of the vocabulary."""

    def __init__(self, weight: Tensor, memory: Tensor, targets: Tensor, valid: int) -> None:
        self.weight, self.targets, self.valid = weight, targets, min(valid, weight.shape[0])
        count, width = targets.shape[0], weight.shape[0]
        self.logits = memory[: count * width].view(count, width)


def _merged(found: list[cross_entropy.Statistics]) -> cross_entropy.Statistics:
    """Statistics of the rows over all their blocks."""
    if len(found) == 1:
        return found[0]
    maxima, totals, targets, levels = (torch.stack(column) for column in zip(*found))
    top = maxima.amax(0)
    base = torch.where(top == -torch.inf, 0.0, top)  # a row of -inf alone has a sum of 0, not NaN
    return top, (totals * torch.exp(maxima - base)).sum(0), targets.sum(0), levels.sum(0)


def add_products(
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
