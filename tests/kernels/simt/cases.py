"""What the CUDA kernels are tested on: each case calls megapre/kernels/cuda*.py and yields (ours, exact, tolerance).

The same cases run on the SIMT machine (tests/kernels/simt), under its sanitizers, against its mutants, and on a GPU
(``pytest -m gpu``). Sizes are odd where they can be: a width that fills no pack, no warp, no block; a row of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megapre.kernels import cuda
from megapre.kernels import cuda_functions as functions
from megapre.kernels.attention import Chain
from megapre.kernels.cuda_attention import attention_cuda
from megapre.kernels.linear_cross_entropy import alone
from megapre.random import philox
from tests.kernels import attention_cases

# As in tests/kernels/tolerances.py, and fp16 with 10 bits to bf16's 7; fp32 has exp2 and reciprocal of 22 bits.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3.5e-3, torch.float16: 5e-4}
Result = Iterator[tuple[Tensor, Tensor, float]]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def draw(*shape: int, dtype=FP32, device="cpu", seed=0, scale=1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)


def unaligned(x: Tensor) -> Tensor:
    """The same values one element off a 16-byte boundary."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def gradients(function, formula, inputs: list[Tensor], tolerance: float) -> Result:
    """Values and all gradients of functions of one or two results."""
    ours = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results, expected = function(*ours), formula(*exact)
    if isinstance(results, Tensor):
        results, expected = (results,), (expected,)
    yields = [draw(*y.shape, dtype=y.dtype, device=y.device, seed=i) for i, y in enumerate(results)]
    torch.autograd.backward(list(results), yields)
    torch.autograd.backward(list(expected), [g.double() for g in yields])
    for y, y0 in zip(results, expected):
        yield y, y0, tolerance
    for a, b in zip(ours, exact):
        assert a.grad.dtype == a.dtype
        yield a.grad, b.grad, tolerance


def exact_norm(h: Tensor, weight: Tensor, bias: Tensor | None, layer: bool) -> Tensor:
    centred = h - h.mean(-1, keepdim=True) if layer else h
    y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * weight
    return y if bias is None else y + bias


def norm(device, layer, width, dtype, rows=5, weight_dtype=None, bias=True, off=False) -> Result:
    """Norm of x [rows, width]: output and gradients."""
    x = draw(rows, width, dtype=dtype, device=device) + 0.5
    if off:
        x = unaligned(x)
    w = draw(width, dtype=weight_dtype or dtype, device=device)
    inputs = [x, w] + ([draw(width, dtype=w.dtype, device=device, seed=3)] if layer and bias else [])
    if layer:
        yield from gradients(
            lambda x, w, b=None: functions.layer_norm(x, w, b, 1e-5),
            lambda x, w, b=None: exact_norm(x, w, b, True), inputs, TOLERANCE[dtype],
        )  # fmt: skip
    else:
        yield from gradients(
            lambda x, w: functions.rms_norm(x, w, 1e-5), lambda x, w: exact_norm(x, w, None, False), inputs,
            TOLERANCE[dtype],
        )  # fmt: skip


def add_norm(device, layer, width, dtype, rows=3) -> Result:
    """Residual add and norm: y, h and the gradients of both inputs and the weight; y is the norm of the rounded h."""
    x, r = draw(rows, width, dtype=dtype, device=device), draw(rows, width, dtype=dtype, device=device, seed=1)
    w, h = draw(width, dtype=dtype, device=device, seed=2), (x + r).double()

    def ours(x, r, w):
        return functions.add_layer_norm(x, r, w, None, 1e-5) if layer else functions.add_rms_norm(x, r, w, 1e-5)

    def formula(x, r, w):
        rounded = x + r + (h - x - r).detach()
        return exact_norm(rounded, w, None, layer), rounded

    yield from gradients(ours, formula, [x, r, w], TOLERANCE[dtype])


def exact_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    c, s = cos.double().unsqueeze(2), sin.double().unsqueeze(2)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    pair = a * c - b * s, b * c + a * s
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)


def rope(device, q_heads, k_heads, dim, dtype, interleaved, tokens=(5, 2)) -> Result:
    """RoPE of q and k at positions up to 131071: outputs and gradients, and in place on views of one buffer."""
    positions = torch.linspace(0, 131071, tokens[0] * tokens[1], dtype=torch.float64).round().view(tokens)
    angles = positions.unsqueeze(-1) * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    cos, sin = angles.cos().float().to(device), angles.sin().float().to(device)
    q = draw(*tokens, q_heads, dim, dtype=dtype, device=device)
    k = draw(*tokens, k_heads, dim, dtype=dtype, device=device, seed=1)
    yield from gradients(
        lambda q, k: functions.rope_qk(q, k, cos, sin, interleaved),
        lambda q, k: (exact_rope(q, cos, sin, interleaved), exact_rope(k, cos, sin, interleaved)),
        [q, k], TOLERANCE[dtype],
    )  # fmt: skip
    own = [t.clone().requires_grad_() for t in (q, k)]
    turned = functions.rope_qk(*(t.clone() for t in own), cos, sin, interleaved, True)
    torch.autograd.backward(turned, [t.clone() for t in (q, k)])
    exact = [t.double().requires_grad_() for t in (q, k)]
    torch.autograd.backward([exact_rope(t, cos, sin, interleaved) for t in exact], [t.double() for t in (q, k)])
    for a, b in zip(own, exact):
        yield a.grad, b.grad, TOLERANCE[dtype]
    fused = torch.cat([q, k, k], 2)  # q, k and v of one projection
    views = fused[:, :, :q_heads], fused[:, :, q_heads : q_heads + k_heads]
    cuda.rope(*views, cos, sin, interleaved=interleaved, inverse=False, inplace=True)
    for view, x in zip(views, (q, k)):
        yield view, exact_rope(x.double(), cos, sin, interleaved), TOLERANCE[dtype]
    yield fused[:, :, q_heads + k_heads :], k.double(), 0.0


def swiglu(device, width, dtype, rows=3, off=False) -> Result:
    """SwiGLU with gates from -100 to 100: output and gradient."""
    x = draw(rows, 2 * width, dtype=dtype, device=device, scale=3.0)
    x[0, :width] = torch.linspace(-100, 100, width).to(dtype)
    if off:
        x = unaligned(x)

    def formula(x):
        gate, up = x.chunk(2, -1)
        return gate * torch.sigmoid(gate) * up

    yield from gradients(functions.swiglu, formula, [x], TOLERANCE[dtype])


def exact_loss(logits: Tensor, targets: Tensor, valid: int, smoothing: float, z_loss: float) -> Tensor:
    """Loss a row of fp64 logits [n, v], the formula of ``megapre/kernels/cross_entropy.py``."""
    lse = torch.logsumexp(logits[:, :valid], 1)
    ours = (targets >= 0) & (targets < valid)
    picked = torch.where(ours, logits.gather(1, targets.clamp(0, valid - 1).unsqueeze(1)).squeeze(1), 0.0)
    return lse - (1 - smoothing) * picked - smoothing / valid * logits[:, :valid].sum(1) + z_loss * lse * lse


def cross_entropy(device, columns, valid, dtype, rows=4, smoothing=0.0, z_loss=0.0, fused=False, stride=None) -> Result:
    """Statistics and gradient of logits [rows, columns]; a third of the targets not ours, one row ignored and NaN."""
    storage = draw(rows, stride or columns, dtype=dtype, device=device, scale=4.0)
    storage[:, valid:] = float("nan")  # a pad column must not count
    logits = storage[:, :columns]
    generator = torch.Generator().manual_seed(columns)
    targets = torch.randint(-(valid // 4) - 1, valid + valid // 4 + 1, (rows,), generator=generator).to(device)
    targets[0] = valid - 1
    scale = torch.linspace(0.5, 2.0, rows, device=device)
    exact = logits.double().requires_grad_()
    (exact_loss(exact, targets, valid, smoothing, z_loss) * scale.double()).sum().backward()
    expected = exact.grad.clone()
    clean, tolerance = exact.detach()[:, :valid], TOLERANCE[FP32]
    if rows > 1:
        scale[1], expected[1], logits[1, 0] = 0.0, 0.0, float("nan")
    kept = [i for i in range(rows) if i != 1]
    ours = (targets >= 0) & (targets < valid)
    picked = torch.where(ours, clean.gather(1, targets.clamp(0, valid - 1).unsqueeze(1)).squeeze(1), 0.0)
    if fused:
        lse, target_logit, linear = cuda.cross_entropy_fused_(
            logits, targets, scale, valid, smoothing=smoothing, z_loss=z_loss
        )
    else:
        top, total, target_logit, linear = cuda.cross_entropy_statistics(logits, targets, valid)
        yield top[kept], clean.amax(1)[kept], 0.0
        yield total[kept], torch.exp(clean - clean.amax(1, keepdim=True)).sum(1)[kept], tolerance
        lse = torch.logsumexp(clean, 1).float()
        cuda.cross_entropy_gradient_(
            logits, targets, lse, scale, valid, smoothing=smoothing, vocab=valid, z_loss=z_loss
        )
    yield lse[kept], torch.logsumexp(clean, 1)[kept], tolerance
    yield target_logit[kept], picked[kept], 0.0
    if smoothing or not fused:
        floor = clean.abs().sum(1)[kept]  # the sum cancels: its error is that of its terms
        yield linear[kept] + floor.float(), clean.sum(1)[kept] + floor, tolerance
    yield logits[:, :valid], expected[:, :valid], TOLERANCE[dtype]
    yield logits[:, valid:], torch.zeros(rows, columns - valid, device=device), 0.0
    if rows > 1:
        yield logits[1], torch.zeros(columns, device=device), 0.0
    if stride:
        assert storage[:, columns:].isnan().all()


def head_loss(device, columns, valid, rows=5, width=24, shared=False, smoothing=0.1, z_loss=1e-2) -> Result:
    """Linear + cross-entropy in fp32: losses, dx, dW; ``shared``: with an exchange, so by two kernels and not one."""
    x, weight = draw(rows, width, device=device), draw(columns, width, device=device, seed=1)
    targets = torch.arange(rows, device=device) * 7 % valid
    scale, main = torch.linspace(0.0, 2.0, rows, device=device), torch.ones(columns, width, device=device)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    losses = exact_loss(exact[0] @ exact[1].t(), targets, valid, smoothing, z_loss)
    (losses * scale.double()).sum().backward()
    more = {"exchange": lambda *statistics: alone(*statistics)} if shared else {}
    ours, dx = functions.linear_cross_entropy(
        x, weight, targets, scale, valid, main_grad=main, smoothing=smoothing, vocab=valid, z_loss=z_loss, **more
    )
    yield ours, torch.where(scale == 0, 0.0, losses), 3 * TOLERANCE[FP32]
    yield dx, exact[0].grad, 5 * TOLERANCE[FP32]
    yield main - 1, exact[1].grad, 5 * TOLERANCE[FP32]


def extreme_logits(device, fused) -> Result:
    """Infinite and huge logits: a row of -inf alone sums to 0; +inf and NaN give NaN; 1e4 gives exactly 1."""
    inf = float("inf")
    logits = torch.zeros(6, 40, device=device)
    logits[0, 3], logits[0, 4] = 1e4, -1e4
    logits[1, 20:] = -inf
    logits[2] = -inf
    logits[3, 5] = float("nan")
    logits[4, 5] = inf
    logits[5] = -1e4
    targets = torch.tensor([3, 25, -1, 0, 0, 0], device=device)
    scale = torch.ones(6, device=device)
    if fused:
        lse, _, _ = cuda.cross_entropy_fused_(logits, targets, scale, 40)
        yield lse[[0, 1, 5]], torch.tensor([1e4, math.log(20), math.log(40) - 1e4], device=device), 1e-7
        assert lse[2] == -inf and lse[3].isnan() and lse[4].isnan()
    else:
        top, total, _, _ = cuda.cross_entropy_statistics(logits, targets, 40)
        assert total[0] == 1 and total[1] == 20 and total[5] == 40 and top[2] == -inf and total[2] == 0
        assert total[3].isnan() and total[4].isnan()
        cuda.cross_entropy_gradient_(logits, targets, top + total.log(), scale, 40)
    assert logits[0].abs().max() < 1e-6 and logits[1, 25] == -1 and (logits[1, 26:] == 0).all()
    yield logits[1, :20], torch.full((20,), 1 / 20, device=device), 2e-6
    yield logits[5, 1:], torch.full((39,), 1 / 40, device=device), 1e-3  # an fp32 lse of -1e4 is known to 5e-4


def adamw(device, count, model_dtype, off=False, on_device=False) -> Result:
    """Three AdamW steps with a divisor, the second skipped, against fp64."""
    state = [draw(count, device=device, seed=i) for i in range(4)]
    state[3] = state[3].square()
    if off:
        state = [unaligned(x) for x in state]
    master, gradient, first, second = state
    model = None if model_dtype is None else torch.empty(count, dtype=model_dtype, device=device)
    p, g, m, v = (x.double() for x in state)
    numbers = dict(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
    divisor = torch.tensor(3.0, device=device)
    for step, skip in ((1, 0.0), (1, 1.0), (2, 0.0)):
        lr = 1e-2
        at = dict(lr=lr, step=step)
        if on_device:
            at = {name: torch.tensor(float(x), device=device) for name, x in at.items()}
        cuda.adamw_(
            master, gradient, first, second, model, **at, **numbers, divisor=divisor,
            skip=torch.tensor(skip, device=device),
        )  # fmt: skip
        if not skip:
            m, v = 0.9 * m + 0.1 * g / 3, 0.999 * v + 0.001 * (g / 3) ** 2
            p = p * (1 - lr * 0.1) - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    for ours, exact in ((master, p), (first, m), (second, v)):
        yield ours, exact, TOLERANCE[FP32]
    if model is not None:
        yield model, master.to(model_dtype), 0.0


def square_sum(device, count, dtype, off=False) -> Result:
    """Sum of squares, and the flag for what is not finite."""
    flat = draw(count, dtype=dtype, device=device)
    if off:
        flat = unaligned(flat)
    flag = torch.zeros((), device=device)
    yield cuda.square_sum(flat, flag), flat.double().square().sum(), TOLERANCE[FP32]
    assert flag == 0
    if count:
        flat[count // 2] = float("inf")
        assert not cuda.square_sum(flat, flag).isfinite() and flag == 1


def keep_mask(device, features, positions=5, samples=3) -> Result:
    """The dropout mask, bit for bit, with sample numbers beyond 32 bits."""
    at = torch.arange(positions, device=device) + 10
    numbers = torch.arange(samples, device=device) + 2**32 - 1
    limit = philox.threshold(0.3)
    ours = cuda.keep_mask(philox.mix(7), 3, 11, at, numbers, features, limit)
    yield ours, philox.keep_mask_reference(7, 3, [11], at, numbers, 0, features, 0.3)[0], 0.0


# name, function, arguments: the short list for every order and the sanitizers, one case per kernel and path.
def attention(device, mask, s, t, heads, groups, d, batch=1, bias=False, dropout=False, halves=False) -> Result:
    """Output and gradients; ``halves``: log-sum-exp, and gradients in fp32 from those of another, larger softmax."""
    asked = attention_cases.MASKS[mask](s, t, batch)
    inputs = attention_cases.draw(s, t, batch, heads, groups, d, BF16)
    b = draw(heads, s + t - 1) if bias else None
    place = attention_cases.dropout_of(heads, batch) if dropout else None
    grad = draw(s, batch, heads, d, dtype=BF16, seed=1)
    exact = [x.double().requires_grad_() for x in inputs]
    exact_bias = None if b is None else b.double().requires_grad_()
    out0, lse0 = attention_cases.formula(*exact, asked, exact_bias, place)
    inputs, grad = [x.to(device) for x in inputs], grad.to(device)
    learned = None if b is None else b.to(device).requires_grad_()
    options = dict(mask=_to(asked.mask, device), bias=learned, dropout=place)
    if place is not None:
        options["dropout"] = replace(place, samples=place.samples.to(device))
    # The weights and the gradients of scores are rounded to bf16 once more before a product.
    tolerance = 2.2 * TOLERANCE[BF16]
    if halves:
        version = Chain((attention_cuda,))
        out, lse = version.forward(*inputs, **options)
        outer = lse0.exp().add(1.0).log()  # as if there were one more key of score 0 and value 0
        share = (lse0 - outer).exp().permute(2, 0, 1).unsqueeze(-1)
        delta = (grad.cpu().double() * out0.detach() * share.detach()).sum(-1).permute(1, 2, 0)
        found = version.backward(
            grad, *inputs, lse=outer.detach().float().to(device), delta=delta.float().to(device), **options
        )
        (out0 * share).backward(grad.double().cpu())
        yield lse.exp(), lse0.exp(), 1e-5
        assert out.dtype == found[0].dtype == FP32
    else:
        ours = [x.requires_grad_() for x in inputs]
        out = attention_cuda(*ours, **options)
        out.backward(grad)
        out0.backward(grad.double().cpu())
        found = [x.grad for x in ours]
        if b is not None:  # sums of both signs over batch and diagonal
            yield options["bias"].grad, exact_bias.grad, 4 * TOLERANCE[BF16]
    yield out, out0, tolerance
    least = 0.1 * float(grad.double().norm())  # a query with one key has no gradient but its rounding
    for a, b in zip(found, exact):
        size = float(b.grad.norm())
        yield a, b.grad, tolerance * max(1.0, least / max(size, 1e-30))


def _to(mask, device):
    pairs = {n: None if getattr(mask, n) is None else tuple(x.to(device) for x in getattr(mask, n))
             for n in ("documents", "order")}  # fmt: skip
    return replace(mask, prefix=None if mask.prefix is None else mask.prefix.to(device), **pairs)


SHORT = {
    "attention-causal": (attention, "causal", 130, 130, 2, 1, 32), "attention-one": (attention, "full", 1, 1, 1, 1, 64),
    "attention-document": (attention, "document", 150, 150, 1, 1, 32, 2),
    "attention-dropout": (attention, "window", 65, 65, 2, 2, 40, 1, True, True),
    "attention-halves": (attention, "causal", 70, 70, 2, 1, 32, 1, False, False, True),
    "rms-8": (norm, False, 264, BF16),
    "rms-float-weight": (norm, False, 264, BF16, 5, FP32),
    "rms-plain": (norm, False, 33, FP32),
    "layer-16": (norm, True, 2056, BF16, 5),
    "layer-off": (norm, True, 264, FP16, 5, None, True, True),
    "layer-32": (norm, True, 4104, BF16, 2),
    "add-rms": (add_norm, False, 264, BF16),
    "add-layer": (add_norm, True, 132, FP32),
    "rope-half": (rope, 5, 2, 32, BF16, False),
    "rope-pairs": (rope, 3, 1, 16, FP32, True),
    "rope-odd": (rope, 2, 1, 6, FP32, False),
    "swiglu": (swiglu, 264, BF16),
    "swiglu-odd": (swiglu, 33, FP32),
    "loss": (cross_entropy, 1048, 1043, BF16, 4, 0.1, 1e-2),
    "loss-odd": (cross_entropy, 77, 70, FP32, 4, 0.1, 1e-2, False, 83),
    "loss-fused": (cross_entropy, 1048, 1043, BF16, 4, 0.1, 1e-2, True),
    "loss-shared": (cross_entropy, 33800, 33797, BF16, 2, 0.1, 0.0, True),
    "head-loss": (head_loss, 133, 130),
    "head-loss-shared": (head_loss, 133, 130, 5, 24, True),
    "adamw": (adamw, 1031, BF16),
    "adamw-off": (adamw, 300, None, True, True),
    "square-sum": (square_sum, 4099, BF16),
    "square-sum-off": (square_sum, 1025, FP32, True),
    "keep-mask": (keep_mask, 31),
    "keep-mask-4": (keep_mask, 32),
}
# Every type, width and edge once, in one order.
LONG = {
    **{f"attention-{name}": (attention, name, 65, 65, 2, 1, 64, 2)
       for name in ("full", "two_sided_window", "prefix", "packed", "query_stream", "content_stream", "one_key",
                    "nothing")},
    "attention-128": (attention, "causal", 70, 70, 1, 1, 128),
    "attention-whole": (attention, "causal", 230, 230, 1, 1, 64),
    "attention-learned": (attention, "packed", 70, 135, 2, 1, 64, 2, True),
    "attention-256": (attention, "causal", 66, 66, 1, 1, 256),
    "attention-cross": (attention, "full", 5, 130, 4, 2, 64),
    "attention-decode": (attention, "causal", 1, 130, 4, 1, 64),
    "attention-extra-128": (attention, "query_stream", 65, 65, 1, 1, 128, 1, True, True),
    **{f"{'layer' if layer else 'rms'}-{width}-{str(dtype)[6:]}": (norm, layer, width, dtype, rows)
       for layer in (True, False) for dtype in (FP32, BF16, FP16)
       for width, rows in ((3, 3), (8, 1), (40, 5), (1000, 4), (2048, 3), (4096, 2))},
    "layer-no-bias": (norm, True, 264, BF16, 5, None, False),
    "layer-mixed": (norm, True, 2056, BF16, 5, FP32),
    "layer-mixed-fp16": (norm, True, 40, FP16, 5, FP32),
    "rms-8192": (norm, False, 8192, BF16, 2), "layer-8200": (norm, True, 8200, BF16, 2),
    "rms-16384": (norm, False, 16384, BF16, 2), "layer-16384-float": (norm, True, 16384, FP32, 2),
    "rms-none": (norm, False, 64, BF16, 0),
    **{f"add-{'layer' if layer else 'rms'}-{width}-{str(dtype)[6:]}": (add_norm, layer, width, dtype)
       for layer in (True, False) for dtype in (FP32, BF16) for width in (24, 33, 4096)},
    **{f"rope-{dim}-{str(dtype)[6:]}-{inter}": (rope, 4, 2, dim, dtype, inter)
       for dim in (64, 128, 20, 2) for dtype in (BF16, FP16) for inter in (False, True)},
    "rope-one": (rope, 1, 1, 64, BF16, False, (1, 1)),
    "rope-many-heads": (rope, 70, 1, 64, BF16, False, (2, 3)),
    "swiglu-wide": (swiglu, 4096, FP16), "swiglu-off": (swiglu, 64, BF16, 3, True), "swiglu-1": (swiglu, 1, BF16, 1),
    **{f"loss-{columns}-{valid}-{str(dtype)[6:]}-{fused}": (cross_entropy, columns, valid, dtype, 3, 0.1, 1e-3, fused)
       for columns, valid in ((8, 8), (8, 5), (16, 1), (2048, 2041)) for dtype in (FP32, BF16, FP16)
       for fused in (False, True)},
    "loss-one-row": (cross_entropy, 1003, 1000, BF16, 1, 0.0, 0.0, True),
    "loss-32768": (cross_entropy, 32768, 32768, BF16, 2, 0.0, 0.0, True),
    "loss-shared-float": (cross_entropy, 20000, 20000, FP32, 2, 0.0, 1e-3, True),
    "loss-too-long": (cross_entropy, 131072, 131072, BF16, 1, 0.0, 0.0, True),
    "extreme": (extreme_logits, False), "extreme-fused": (extreme_logits, True),
    "adamw-fp16": (adamw, 2048, FP16), "adamw-3": (adamw, 3, BF16), "adamw-none": (adamw, 0, BF16),
    "square-sum-fp16": (square_sum, 70000, FP16), "square-sum-none": (square_sum, 0, FP32),
    "keep-mask-1": (keep_mask, 1), "keep-mask-long": (keep_mask, 1027, 3, 2),
}  # fmt: skip


def check(case: tuple, device: str = "cpu") -> None:
    """Run a case; AssertionError where a result is not within its tolerance (NaN never is)."""
    function, *arguments = case
    for i, (ours, exact, tolerance) in enumerate(function(device, *arguments)):
        assert ours.shape == exact.shape, f"result {i}: {list(ours.shape)} for {list(exact.shape)}"
        a, b = ours.detach().double().cpu(), exact.detach().double().cpu()
        error = float((a - b).norm() / b.norm().clamp_min(1e-30)) if b.numel() else 0.0
        where = f"result {i} of {function.__name__}{tuple(arguments)}"
        assert error <= tolerance, f"{where}: error {error:.2e} > {tolerance:.1e}"
