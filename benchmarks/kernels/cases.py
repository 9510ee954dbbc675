"""The ops that ``run.py`` times: three arms each, and how far every arm is from the formula in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from megapre.config.schema import KernelsConfig
from megapre.kernels import registry, rope
from megapre.kernels.mask import CAUSAL

CPU, BF16 = torch.device("cpu"), torch.bfloat16
OURS = registry.choose(KernelsConfig(), CPU, BF16)
EXACT = registry.choose(KernelsConfig(), CPU, torch.float64)
EPS = 1e-5


@dataclass
class Case:
    """One op at one shape."""

    shape: str
    arms: dict[str, Callable[[], list[Tensor]]]
    """Arm -> forward + backward; returns values and gradients. The compiled arm compiles on its first call."""
    exact: Callable[[], list[Tensor]]
    """The same results in fp64."""
    tolerance: float = 8e-3
    """Largest error ||y - y0|| / ||y0|| of a tensor: two roundings to bf16 and what eager's own roundings cost."""
    restore: Callable[[], None] = lambda: None
    """Puts back what an arm overwrites."""

    def errors(self) -> dict[str, float]:
        """Largest relative error of each arm over its results."""
        exact = self.exact()
        found = {}
        for arm, function in self.arms.items():
            self.restore()
            results = [x.detach().double() for x in function()]
            assert len(results) == len(exact)
            pairs = [(a, b.detach()) for a, b in zip(results, exact)]
            found[arm] = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
        self.restore()
        return found


def differentiable(
    shape: str, inputs: list[Tensor], ours: Callable, eager: Callable, exact: Callable | None = None
) -> Case:
    """A case of autograd functions of ``inputs``: value and all gradients; results and gradients are fresh memory."""

    def run(function: Callable, tensors: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        y = function(*tensors)
        y = y if isinstance(y, tuple) else (y,)
        return [*y, *torch.autograd.grad(y, tensors, grads)]

    leaves = [x.detach().requires_grad_() for x in inputs]
    with torch.no_grad():
        y = ours(*leaves)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (y if isinstance(y, tuple) else (y,))]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    arms = {"megapre": ours, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    return Case(
        shape,
        {arm: lambda f=f: run(f, leaves, grads) for arm, f in arms.items()},  # type: ignore[misc]
        lambda: run(exact or eager, wide, [g.double() for g in grads]),
    )


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rms_norm() -> Case:
    width = 2048
    return differentiable(
        f"[2048, {width}] bf16",
        [draw(2048, width), draw(width, seed=1)],
        lambda x, w: OURS.rms_norm(x, w, EPS),
        lambda x, w: F.rms_norm(x, (width,), w, EPS),
    )


def layer_norm() -> Case:
    width = 2048
    return differentiable(
        f"[2048, {width}] bf16",
        [draw(2048, width), draw(width, seed=1), draw(width, seed=2)],
        lambda x, w, b: OURS.layer_norm(x, w, b, EPS),
        lambda x, w, b: F.layer_norm(x, (width,), w, b, EPS),
    )


def add_rms_norm() -> Case:
    width = 2048

    def eager(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (width,), w, EPS), total

    return differentiable(
        f"[2048, {width}] bf16",
        [draw(2048, width), draw(2048, width, seed=3), draw(width, seed=1)],
        lambda x, r, w: OURS.add_rms_norm(x, r, w, EPS),
        eager,
    )


def swiglu() -> Case:
    def eager(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    return differentiable("[1024, 2 x 5504] bf16", [draw(1024, 11008)], OURS.swiglu, eager)


def geglu() -> Case:
    def eager(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up

    return differentiable("[1024, 2 x 5504] bf16", [draw(1024, 11008)], OURS.geglu, eager)


def bias_gelu() -> Case:
    return differentiable(
        "[1024, 8192] bf16",
        [draw(1024, 8192), draw(8192, seed=1)],
        OURS.bias_gelu,
        lambda x, b: F.gelu(x + b, approximate="tanh"),
    )


def _rope(interleaved: bool) -> Case:
    cos, sin = rope.tables(torch.arange(1024).view(512, 2), 64, 1e4, BF16)

    def eager(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (
            rope.apply_reference(q, cos, sin, interleaved),
            rope.apply_reference(k, cos, sin, interleaved),
        )

    return differentiable(
        "q [512, 2, 16, 64], k [512, 2, 4, 64] bf16",
        [draw(512, 2, 16, 64), draw(512, 2, 4, 64, seed=1)],
        lambda q, k: OURS.rope_qk(q, k, cos, sin, interleaved),
        eager,
    )


def rope_half() -> Case:
    return _rope(False)


def rope_interleaved() -> Case:
    return _rope(True)


def bias_dropout_residual() -> Case:
    """Peers with the same mask, drawn beforehand: drawing it is in our time and not in theirs."""
    positions, samples = torch.arange(512), torch.arange(2)
    numbers = dict(seed=1, step=2, site=3, positions=positions, samples=samples, probability=0.1)
    from megapre.random import philox

    kept = philox.keep_mask(1, 2, [3], positions, samples, 0, 2048, 0.1)[0]
    return differentiable(
        "[512, 2, 2048] bf16, p = 0.1",
        [draw(512, 2, 2048), draw(2048, seed=1), draw(512, 2, 2048, seed=2)],
        lambda x, b, r: OURS.bias_dropout_residual(x, b, r, **numbers),
        lambda x, b, r: r + torch.where(kept, (x + b) * (1 / 0.9), 0.0),
    )


def cross_entropy() -> Case:
    rows, vocab = 2048, 50304
    source, targets = draw(rows, vocab), torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(2))
    logits, scale = source.clone(), torch.full((rows,), 1.0 / rows)

    def ours() -> list[Tensor]:
        maximum, total, picked, _ = OURS.ce_statistics(logits, targets, vocab)
        lse = maximum + total.log()
        loss = ((lse - picked) * scale).sum()
        return [loss, OURS.ce_gradient_(logits, targets, lse, scale, vocab)]

    leaf = logits.detach().requires_grad_()

    def run(function: Callable, x: Tensor) -> list[Tensor]:
        loss = function(x)
        return [loss, *torch.autograd.grad(loss, [x])]

    def eager(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float() if x.dtype == BF16 else x, targets)

    compiled = torch.compile(eager, dynamic=False)
    arms = {"megapre": ours, "eager": lambda: run(eager, leaf), "compile": lambda: run(compiled, leaf)}

    def exact() -> list[Tensor]:
        parts = [draw_exact(source[i : i + 256], targets[i : i + 256], rows) for i in range(0, rows, 256)]
        return [torch.stack([loss for loss, _ in parts]).sum(), torch.cat([grad for _, grad in parts])]

    def draw_exact(x: Tensor, t: Tensor, count: int) -> tuple[Tensor, Tensor]:
        wide = x.double().requires_grad_()
        loss = F.cross_entropy(wide, t, reduction="sum") / count
        return loss.detach(), torch.autograd.grad(loss, wide)[0].float()

    return Case(f"[{rows}, {vocab}] bf16", arms, exact, restore=lambda: _copy(logits, source))


def _copy(to: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        to.copy_(source)


def _experts(experts: int, rows: int, outs: int = 1024, ins: int = 512, dtype: torch.dtype = BF16) -> Case:
    """y = x W^T of each expert, dx, and main += dW; eager: a loop of torch's products, dW rounded before the sum."""
    sizes, main = [rows] * experts, torch.zeros(experts, outs, ins)
    x, dy = draw(experts * rows, ins, dtype=dtype), draw(experts * rows, outs, seed=1, dtype=dtype)
    weight = draw(experts, outs, ins, seed=2, dtype=dtype)

    def run(ops: registry.Kernels, x: Tensor, dy: Tensor, weight: Tensor, main: Tensor) -> list[Tensor]:
        y = ops.grouped_mm(x, weight, sizes)
        dx = ops.grouped_mm(dy, weight.transpose(1, 2), sizes)
        ops.grouped_dw_(main, dy, x, sizes)
        return [y, dx, main]

    def loop(x: Tensor, dy: Tensor, weight: Tensor, main: Tensor) -> list[Tensor]:
        pieces = [(a, b, w) for a, b, w in zip(x.split(sizes), dy.split(sizes), weight)]
        y, dx = torch.cat([a @ w.t() for a, _, w in pieces]), torch.cat([b @ w for _, b, w in pieces])
        return [y, dx, main.add_(torch.stack([b.t() @ a for a, b, _ in pieces]))]

    compiled = torch.compile(loop, dynamic=False)
    arms = {
        "megapre": lambda: run(OURS, x, dy, weight, main),
        "eager": lambda: loop(x, dy, weight, main),
        "compile": lambda: compiled(x, dy, weight, main),
    }
    wide = [t.double() for t in (x, dy, weight)]
    kind = "bf16" if dtype == BF16 else "fp32"
    return Case(
        f"{experts} experts x {rows} rows, W [{outs}, {ins}] {kind}", arms,
        lambda: run(EXACT, *wide, torch.zeros(main.shape, dtype=torch.float64)), restore=lambda: _zero(main),
    )  # fmt: skip


def experts_many() -> Case:
    return _experts(64, 16, 512, 512)


def experts_some() -> Case:
    return _experts(16, 64)


def experts_few() -> Case:
    return _experts(8, 256)


def _routes(tokens: int, experts: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    scores = draw(tokens, experts, dtype=torch.float32)
    ids = scores.topk(k).indices.flatten()
    order = torch.sort(ids, stable=True).indices
    return scores, order // k, torch.argsort(order).view(tokens, k)


def permute_unpermute() -> Case:
    """Rows to their experts and back with weights, both ways; eager: index_select and a sum over choices."""
    tokens, width, k = 2048, 1024, 2
    _, source, rows = _routes(tokens, 16, k)

    def eager(x: Tensor, weights: Tensor) -> Tensor:
        y = x.index_select(0, source)
        found = y.index_select(0, rows.flatten()).view(tokens, k, width)
        return (weights.unsqueeze(2) * found).sum(1).to(x.dtype)

    return differentiable(
        f"[{tokens}, {width}] bf16, {k} choices", [draw(tokens, width), draw(tokens, k, seed=1, dtype=torch.float32)],
        lambda x, w: OURS.unpermute(OURS.permute(x, source, rows), w, source, rows), eager,
    )  # fmt: skip


def top_k() -> Case:
    """Eager: torch.topk, which leaves the order of equal scores open."""
    scores = _routes(4096, 128, 8)[0]
    compiled = torch.compile(lambda x: torch.topk(x, 8).indices, dynamic=False)
    arms = {
        "megapre": lambda: [OURS.top_k(scores, 8)],
        "eager": lambda: [torch.topk(scores, 8).indices],
        "compile": lambda: [compiled(scores)],
    }
    return Case("8 of [4096, 128] fp32", arms, lambda: [EXACT.top_k(scores.double(), 8)])


def _attention(length: int, heads: int, dtype: torch.dtype = BF16, d: int = 64, groups: int = 0) -> Case:
    """Causal attention against torch's scaled_dot_product_attention in the same layout, [seq, batch, heads, d]."""
    groups = groups or heads

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if groups < heads:
            k, v = k.repeat_interleave(heads // groups, 2), v.repeat_interleave(heads // groups, 2)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3)

    inputs = [draw(length, 1, n, d, seed=i, dtype=dtype) for i, n in enumerate((heads, groups, groups))]
    kind = "bf16" if dtype == BF16 else "fp32"
    return differentiable(
        f"[{length}, 1, {heads}, {d}], {groups} key heads, causal, {kind}", inputs,
        lambda q, k, v: OURS.attention(q, k, v, mask=CAUSAL), eager,
    )  # fmt: skip


def attention_256() -> Case:
    return _attention(256, 16)


def attention_1024() -> Case:
    return _attention(1024, 8)


def attention_4096() -> Case:
    return _attention(4096, 2)


def attention_grouped() -> Case:
    return _attention(1024, 8, d=128, groups=2)


def attention_1024_fp32() -> Case:
    return _attention(1024, 4, torch.float32)


HEAD = (8192, 512, 50304)
"""Rows, width and vocabulary of linear + cross-entropy."""


def head(rows: int, width: int, vocab: int) -> tuple[dict[str, Callable[[], list[Tensor]]], list[Tensor]]:
    """Arms of linear + cross-entropy with the weight's gradient summed into an fp32 ``main_grad``; inputs."""
    x, weight = draw(rows, width), draw(vocab, width, seed=1) * 0.05
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(2))
    scale, main = torch.full((rows,), 1.0 / rows), torch.zeros(vocab, width)

    def ours() -> list[Tensor]:
        losses, dx = OURS.linear_cross_entropy(x, weight, targets, scale, vocab, main_grad=main)
        return [(losses * scale).sum(), dx, main]

    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(x, weight)
        return F.cross_entropy(logits.float() if logits.dtype == BF16 else logits, targets)

    def run(function: Callable) -> list[Tensor]:
        loss = function(*leaves)
        dx, dw = torch.autograd.grad(loss, leaves)
        return [loss, dx, main.add_(dw)]

    compiled = torch.compile(eager, dynamic=False)
    arms = {"megapre": ours, "eager": lambda: run(eager), "compile": lambda: run(compiled)}
    return arms, [x, weight, targets, main]


def linear_cross_entropy() -> Case:
    return _linear_cross_entropy(*HEAD)


def linear_cross_entropy_narrow() -> Case:
    """Half the products for the same cross-entropy."""
    return _linear_cross_entropy(HEAD[0], HEAD[1] // 2, HEAD[2])


def _linear_cross_entropy(rows: int, width: int, vocab: int) -> Case:
    arms, (x, weight, targets, main) = head(rows, width, vocab)

    def exact() -> list[Tensor]:
        dw, dx, loss = torch.zeros(vocab, width), [], torch.zeros((), dtype=torch.float64)
        for i in range(0, rows, 1024):  # fp32 products are exact enough to judge bf16 ones
            logits = x[i : i + 1024].float() @ weight.float().t()
            lse, t = torch.logsumexp(logits, 1), targets[i : i + 1024]
            loss += (lse - logits.gather(1, t.unsqueeze(1)).squeeze(1)).double().sum() / rows
            p = torch.exp(logits - lse.unsqueeze(1)).scatter_add_(1, t.unsqueeze(1), -torch.ones(len(t), 1)) / rows
            dx.append(p @ weight.float())
            dw.addmm_(p.t(), x[i : i + 1024].float())
        return [loss, torch.cat(dx), dw]

    shape = f"x [{rows}, {width}], W [{vocab}, {width}] bf16"
    # Logits, their gradient and dW are each rounded to bf16 once, in every arm.
    return Case(shape, arms, exact, tolerance=1.2e-2, restore=lambda: _zero(main))


def _zero(x: Tensor) -> None:
    x.zero_()


def adamw() -> Case:
    n = 1 << 23
    start = [draw(n, seed=i, dtype=torch.float32) for i in range(3)] + [draw(n, seed=3, dtype=torch.float32).square()]
    state, model = [x.clone() for x in start], torch.zeros(n, dtype=BF16)
    options = dict(
        lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=torch.tensor(5.0), divisor=torch.tensor(4.0),
        skip=torch.tensor(0.0),
    )  # fmt: skip
    fused = registry.choose(KernelsConfig(optimizer="torch"), CPU, BF16).adamw_
    compiled = torch.compile(registry.choose(KernelsConfig(optimizer="reference"), CPU, BF16).adamw_, dynamic=False)

    def run(function: Callable) -> list[Tensor]:
        function(*state, model, **options)
        return [state[0], state[2], state[3], model]

    def exact() -> list[Tensor]:
        wide = [x.double() for x in start]
        EXACT.adamw_(*wide, None, **options)
        return [wide[0], wide[2], wide[3], wide[0]]

    arms = {"megapre": OURS.adamw_, "eager": fused, "compile": compiled}

    def restore() -> None:
        for to, source in zip(state, start):
            to.copy_(source)

    bound = {arm: lambda f=f: run(f) for arm, f in arms.items()}  # type: ignore[misc]
    return Case("2^23 fp32 and bf16 copy; eager = torch fused + copy", bound, exact, restore=restore)


def square_sum() -> Case:
    x = draw(1 << 23, dtype=torch.float32)
    eager = registry.choose(KernelsConfig(optimizer="torch"), CPU, BF16).square_sum
    arms = {"megapre": OURS.square_sum, "eager": eager, "compile": torch.compile(eager, dynamic=False)}
    bound = {arm: lambda f=f: [f(x)] for arm, f in arms.items()}  # type: ignore[misc]
    return Case("2^23 fp32", bound, lambda: [x.double().square().sum()])


def peak(arm: str) -> int:
    """Bytes that one forward + backward of linear + cross-entropy needs beyond its inputs and results."""
    rows, width, vocab = HEAD
    arms, _ = head(rows, width, vocab)
    arms[arm]()  # threads, libraries and compiled code are in memory before the count
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    arms[arm]()
    return _status("VmHWM") - before - 2 * rows * width


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


CASES: dict[str, Callable[[], Case]] = {
    case.__name__: case
    for case in (
        rms_norm, layer_norm, add_rms_norm, rope_half, rope_interleaved, swiglu, geglu, bias_gelu,
        bias_dropout_residual, attention_256, attention_1024, attention_4096, attention_grouped, attention_1024_fp32,
        experts_many, experts_some, experts_few, permute_unpermute, top_k,
        cross_entropy, linear_cross_entropy, linear_cross_entropy_narrow, adamw, square_sum,
    )
}  # fmt: skip
