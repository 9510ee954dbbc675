"""The ops that ``run.py`` and ``gpu.py`` time: functions of a setting, so that one description of an op serves both."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels import cases_moe
from benchmarks.kernels.setting import BF16, EPS, EXACT, Case, Setting, copy, differentiable, on_cpu, zero
from megapre.config.schema import KernelsConfig
from megapre.kernels import registry, rope
from megapre.kernels.mask import CAUSAL, FULL


def rms_norm(on: Setting) -> Case:
    width = 2048
    return differentiable(
        on, "rms_norm", f"[2048, {width}] bf16",
        [on.draw(2048, width), on.draw(width, seed=1)],
        lambda k, x, w: k.rms_norm(x, w, EPS),
        lambda x, w: F.rms_norm(x, (width,), w, EPS),
    )


def layer_norm(on: Setting) -> Case:
    width = 2048
    return differentiable(
        on, "layer_norm", f"[2048, {width}] bf16",
        [on.draw(2048, width), on.draw(width, seed=1), on.draw(width, seed=2)],
        lambda k, x, w, b: k.layer_norm(x, w, b, EPS),
        lambda x, w, b: F.layer_norm(x, (width,), w, b, EPS),
    )


def add_rms_norm(on: Setting) -> Case:
    width = 2048

    def eager(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (width,), w, EPS), total

    return differentiable(
        on, "add_rms_norm", f"[2048, {width}] bf16",
        [on.draw(2048, width), on.draw(2048, width, seed=3), on.draw(width, seed=1)],
        lambda k, x, r, w: k.add_rms_norm(x, r, w, EPS),
        eager,
    )


def swiglu(on: Setting) -> Case:
    def eager(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    inputs = [on.draw(1024, 11008)]
    return differentiable(on, "swiglu", "[1024, 2 x 5504] bf16", inputs, lambda k, x: k.swiglu(x), eager)


def geglu(on: Setting) -> Case:
    def eager(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up

    inputs = [on.draw(1024, 11008)]
    return differentiable(on, "geglu", "[1024, 2 x 5504] bf16", inputs, lambda k, x: k.geglu(x), eager)


def bias_gelu(on: Setting) -> Case:
    return differentiable(
        on, "bias_gelu", "[1024, 8192] bf16",
        [on.draw(1024, 8192), on.draw(8192, seed=1)],
        lambda k, x, b: k.bias_gelu(x, b),
        lambda x, b: F.gelu(x + b, approximate="tanh"),
    )


def _rope(on: Setting, interleaved: bool) -> Case:
    cos, sin = rope.tables(torch.arange(1024, device=on.device).view(512, 2), 64, 1e4, BF16)

    def eager(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (
            rope.apply_reference(q, cos, sin, interleaved),
            rope.apply_reference(k, cos, sin, interleaved),
        )

    return differentiable(
        on, "rope_interleaved" if interleaved else "rope_half", "q [512, 2, 16, 64], k [512, 2, 4, 64] bf16",
        [on.draw(512, 2, 16, 64), on.draw(512, 2, 4, 64, seed=1)],
        lambda kernels, q, k: kernels.rope_qk(q, k, cos, sin, interleaved),
        eager,
    )


def rope_half(on: Setting) -> Case:
    return _rope(on, False)


def rope_interleaved(on: Setting) -> Case:
    return _rope(on, True)


def bias_dropout_residual(on: Setting) -> Case:
    """Peers with the same mask, drawn beforehand: drawing it is in our time and not in theirs."""
    positions, samples = torch.arange(512, device=on.device), torch.arange(2, device=on.device)
    numbers = dict(seed=1, step=2, site=3, positions=positions, samples=samples, probability=0.1)
    from megapre.random import philox

    kept = philox.keep_mask(1, 2, [3], positions, samples, 0, 2048, 0.1)[0]
    return differentiable(
        on, "bias_dropout_residual", "[512, 2, 2048] bf16, p = 0.1",
        [on.draw(512, 2, 2048), on.draw(2048, seed=1), on.draw(512, 2, 2048, seed=2)],
        lambda k, x, b, r: k.bias_dropout_residual(x, b, r, **numbers),
        lambda x, b, r: r + torch.where(kept, (x + b) * (1 / 0.9), 0.0),
    )


def cross_entropy(on: Setting) -> Case:
    rows, vocab = 2048, 50304
    source, targets = on.draw(rows, vocab), on.integers(vocab, rows)
    logits, scale = source.clone(), torch.full((rows,), 1.0 / rows, device=on.device)

    def ours(kernels: registry.Kernels) -> list[Tensor]:
        maximum, total, picked, _ = kernels.ce_statistics(logits, targets, vocab)
        lse = maximum + total.log()
        loss = ((lse - picked) * scale).sum()
        return [loss, kernels.ce_gradient_(logits, targets, lse, scale, vocab)]

    leaf = logits.detach().requires_grad_()

    def run(function: Callable, x: Tensor) -> list[Tensor]:
        loss = function(x)
        return [loss, *torch.autograd.grad(loss, [x])]

    def eager(x: Tensor) -> Tensor:
        return F.cross_entropy(x.float() if x.dtype == BF16 else x, targets)

    arms = {arm: partial(ours, kernels) for arm, kernels in on.kernels.items()}
    peers = on.others.get("cross_entropy", {}) | {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
    arms |= {arm: partial(run, function, leaf) for arm, function in peers.items()}

    def exact() -> list[Tensor]:
        parts = [draw_exact(source[i : i + 256], targets[i : i + 256], rows) for i in range(0, rows, 256)]
        return [torch.stack([loss for loss, _ in parts]).sum(), torch.cat([grad for _, grad in parts])]

    def draw_exact(x: Tensor, t: Tensor, count: int) -> tuple[Tensor, Tensor]:
        wide = x.double().requires_grad_()
        loss = F.cross_entropy(wide, t, reduction="sum") / count
        return loss.detach(), torch.autograd.grad(loss, wide)[0].float()

    return Case(f"[{rows}, {vocab}] bf16", arms, exact, restore=lambda: copy(logits, source))


def _attention(
    on: Setting, name: str, length: int, heads: int, dtype: torch.dtype = BF16, d: int = 64, groups: int = 0
) -> Case:
    """Causal attention against torch's scaled_dot_product_attention in the same layout, [seq, batch, heads, d]."""
    groups = groups or heads

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if groups < heads:
            k, v = k.repeat_interleave(heads // groups, 2), v.repeat_interleave(heads // groups, 2)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3)

    inputs = [on.draw(length, 1, n, d, seed=i, dtype=dtype) for i, n in enumerate((heads, groups, groups))]
    kind = "bf16" if dtype == BF16 else "fp32"
    return differentiable(
        on, name, f"[{length}, 1, {heads}, {d}], {groups} key heads, causal, {kind}", inputs,
        lambda kernels, q, k, v: kernels.attention(q, k, v, mask=CAUSAL), eager,
    )  # fmt: skip


def attention_256(on: Setting) -> Case:
    return _attention(on, "attention_256", 256, 16)


def attention_1024(on: Setting) -> Case:
    return _attention(on, "attention_1024", 1024, 8)


def attention_4096(on: Setting) -> Case:
    return _attention(on, "attention_4096", 4096, 2)


def attention_grouped(on: Setting) -> Case:
    return _attention(on, "attention_grouped", 1024, 8, d=128, groups=2)


def attention_1024_fp32(on: Setting) -> Case:
    return _attention(on, "attention_1024_fp32", 1024, 4, torch.float32)


def relative_attention(on: Setting) -> Case:
    """XLNet's attention in full against a matrix of all queries by all distances, shifted, as libraries have it."""
    length, heads, d = 512, 4, 64

    def eager(q: Tensor, k: Tensor, v: Tensor, asking: Tensor, keys: Tensor) -> Tensor:
        q, k, v, asking = (x.permute(1, 2, 0, 3) for x in (q, k, v, asking))
        along = asking @ F.pad(keys.permute(1, 2, 0), (1, 0))
        along = along.reshape(*along.shape[:2], 2 * length, length)[:, :, 1:].reshape(*along.shape[:3], -1)
        weights = ((q @ k.transpose(2, 3) + along[..., :length]) / d**0.5).softmax(-1)
        return (weights @ v).permute(2, 0, 1, 3)

    inputs = [on.draw(length, 2, heads, d, seed=i, dtype=torch.float32) for i in range(4)]
    inputs.append(on.draw(2 * length - 1, heads, d, seed=4, dtype=torch.float32))
    return differentiable(
        on, "relative_attention", f"[{length}, 2, {heads}, {d}] fp32", inputs,
        lambda kernels, *x: kernels.relative_attention(*x, mask=FULL), eager,
    )  # fmt: skip


HEAD = (8192, 512, 50304)
"""Rows, width and vocabulary of linear + cross-entropy."""


def head(on: Setting, rows: int, width: int, vocab: int) -> tuple[dict[str, Callable[[], list[Tensor]]], list[Tensor]]:
    """Arms of linear + cross-entropy with the weight's gradient summed into an fp32 ``main_grad``; inputs."""
    x, weight = on.draw(rows, width), on.draw(vocab, width, seed=1) * 0.05
    targets = on.integers(vocab, rows)
    scale, main = torch.full((rows,), 1.0 / rows, device=on.device), torch.zeros(vocab, width, device=on.device)

    def ours(kernels: registry.Kernels) -> list[Tensor]:
        losses, dx = kernels.linear_cross_entropy(x, weight, targets, scale, vocab, main_grad=main)
        return [(losses * scale).sum(), dx, main]

    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]

    def eager(x: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(x, weight)
        return F.cross_entropy(logits.float() if logits.dtype == BF16 else logits, targets)

    def run(function: Callable) -> list[Tensor]:
        loss = function(*leaves)
        dx, dw = torch.autograd.grad(loss, leaves)
        return [loss, dx, main.add_(dw)]

    peers = on.others.get("linear_cross_entropy", {})
    peers = {arm: partial(function, targets=targets) for arm, function in peers.items()}
    peers |= {"eager": eager, "compile": torch.compile(eager, dynamic=False)}
    arms = {arm: partial(ours, kernels) for arm, kernels in on.kernels.items()}
    return arms | {arm: partial(run, function) for arm, function in peers.items()}, [x, weight, targets, main]


def linear_cross_entropy(on: Setting) -> Case:
    return _linear_cross_entropy(on, *HEAD)


def linear_cross_entropy_narrow(on: Setting) -> Case:
    """Half the products for the same cross-entropy."""
    return _linear_cross_entropy(on, HEAD[0], HEAD[1] // 2, HEAD[2])


def _linear_cross_entropy(on: Setting, rows: int, width: int, vocab: int) -> Case:
    arms, (x, weight, targets, main) = head(on, rows, width, vocab)

    def exact() -> list[Tensor]:
        dw, dx, loss = torch.zeros_like(main), [], main.new_zeros((), dtype=torch.float64)
        for i in range(0, rows, 1024):  # fp32 products are exact enough to judge bf16 ones
            logits = x[i : i + 1024].float() @ weight.float().t()
            lse, t = torch.logsumexp(logits, 1), targets[i : i + 1024]
            loss += (lse - logits.gather(1, t.unsqueeze(1)).squeeze(1)).double().sum() / rows
            p = torch.exp(logits - lse.unsqueeze(1)).scatter_add_(1, t.unsqueeze(1), -lse.new_ones(len(t), 1)) / rows
            dx.append(p @ weight.float())
            dw.addmm_(p.t(), x[i : i + 1024].float())
        return [loss, torch.cat(dx), dw]

    shape = f"x [{rows}, {width}], W [{vocab}, {width}] bf16"
    # Logits, their gradient and dW are each rounded to bf16 once, in every arm.
    return Case(shape, arms, exact, tolerance=1.2e-2, restore=lambda: zero(main))


def adamw(on: Setting) -> Case:
    n = 1 << 23
    start = [on.draw(n, seed=i, dtype=torch.float32) for i in range(3)]
    start.append(on.draw(n, seed=3, dtype=torch.float32).square())
    state, model = [x.clone() for x in start], torch.zeros(n, dtype=BF16, device=on.device)
    numbers = {name: torch.tensor(x, device=on.device) for name, x in (("step", 5.0), ("divisor", 4.0), ("skip", 0.0))}
    options = dict(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, **numbers)

    def run(function: Callable) -> list[Tensor]:
        function(*state, model, **options)
        return [state[0], state[2], state[3], model]

    def exact() -> list[Tensor]:
        wide = [x.double() for x in start]
        EXACT.adamw_(*wide, None, **options)
        return [wide[0], wide[2], wide[3], wide[0]]

    def restore() -> None:
        for to, source in zip(state, start):
            to.copy_(source)

    arms = {arm: partial(run, kernels.adamw_) for arm, kernels in on.kernels.items()}
    arms |= {arm: partial(run, f) for arm, f in _optimizers(on, "adamw_").items()}
    return Case("2^23 fp32 and bf16 copy; eager = torch fused + copy", arms, exact, restore=restore)


def square_sum(on: Setting) -> Case:
    x = on.draw(1 << 23, dtype=torch.float32)
    functions = {arm: kernels.square_sum for arm, kernels in on.kernels.items()} | _optimizers(on, "square_sum")
    arms = {arm: lambda f=f: [f(x)] for arm, f in functions.items()}  # type: ignore[misc]
    return Case("2^23 fp32", arms, lambda: [x.double().square().sum()])


def _optimizers(on: Setting, op: str) -> dict[str, Callable]:
    """torch's fused op as the eager arm, and the formula compiled (the sum of squares: torch's op)."""
    fused = getattr(registry.choose(KernelsConfig(optimizer="torch"), on.device, BF16), op)
    formula = getattr(registry.choose(KernelsConfig(optimizer="reference"), on.device, BF16), op)
    return {"eager": fused, "compile": torch.compile(formula if op == "adamw_" else fused, dynamic=False)}


def peak(arm: str) -> int:
    """Bytes that one forward + backward of linear + cross-entropy needs beyond its inputs and results."""
    rows, width, vocab = HEAD
    arms, _ = head(on_cpu(), rows, width, vocab)
    arms[arm]()  # threads, libraries and compiled code are in memory before the count
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    arms[arm]()
    return _status("VmHWM") - before - 2 * rows * width


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


CASES: dict[str, Callable[[Setting], Case]] = {
    case.__name__: case
    for case in (
        rms_norm, layer_norm, add_rms_norm, rope_half, rope_interleaved, swiglu, geglu, bias_gelu,
        bias_dropout_residual, attention_256, attention_1024, attention_4096, attention_grouped, attention_1024_fp32,
        relative_attention,
        cases_moe.experts_many, cases_moe.experts_some, cases_moe.experts_few, cases_moe.permute_unpermute,
        cases_moe.top_k, cross_entropy, linear_cross_entropy, linear_cross_entropy_narrow, adamw, square_sum,
    )
}  # fmt: skip
