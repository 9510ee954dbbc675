"""Passes over memory and arithmetic of one call of every GPU kernel, counted as it runs on the CPU, beside the least.

    python -m benchmarks.kernels.traffic [--write]

The CUDA sources run on the SIMT machine, where every access to a tensor is counted; the Triton kernels in Triton's
interpreter, where arithmetic on floating-point numbers is counted too. Counted are the tensors with as many rows as the
call has: weights, statistics and partial sums are small beside them or stay in the cache. A second read of a row that
the L2 cache holds counts as one. The least is each operand read once and each result written once, and the operations
of the formula, an exponential, root or division being one. ``--write`` puts the table into docs/kernels.md.
"""
# mypy: ignore-errors

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BF16 = torch.bfloat16
ROWS, WIDTH = 64, 4096


@dataclass(frozen=True)
class Case:
    """One call; every figure is per element of its first tensor."""

    name: str
    bytes: float
    """Least traffic."""
    flops: float
    """Least arithmetic."""
    cuda: object
    """Function of the module megapre.kernels.cuda, or None where CUDA has no such kernel."""
    triton: object
    """Function of a loader of the modules of megapre.kernels.triton."""
    elements: int


def rows(width: int = WIDTH, dtype: torch.dtype = BF16, count: int = ROWS) -> Tensor:
    """Some rows of activations."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(width)).to(dtype)


def cases() -> list[Case]:
    """Every op of the table, bf16 with fp32 sums."""
    return [*_norms(), *_losses(), *_rest(), *_flat()]


def _norms() -> list[Case]:
    x, w, s, n = rows(), torch.ones(WIDTH, dtype=BF16), torch.ones(ROWS), ROWS * WIDTH
    found = []
    for kind, layer, flops in (("RMSNorm", False, (4, 10)), ("LayerNorm", True, (7, 14))):
        b, mean = (w, s) if layer else (None, None)
        found += [
            Case(f"{kind} forward", 4, flops[0], lambda c, b=b, layer=layer: c.norm_forward(x, w, b, 1e-5, layer=layer),
                 lambda t, b=b, layer=layer: t("norm").forward(x, None, w, b, 1e-5, layer), n),
            Case(f"{kind} + residual forward", 8, flops[0] + 1,
                 lambda c, b=b, layer=layer: c.norm_forward(x, w, b, 1e-5, layer=layer, residual=rows()),
                 lambda t, b=b, layer=layer: t("norm").forward(x, rows(), w, b, 1e-5, layer), n),
            Case(f"{kind} backward", 6, flops[1], lambda c, m=mean: c.norm_backward(rows(), x, w, m, s),
                 lambda t, layer=layer: t("norm").backward(rows(), None, x, w, s, s, layer, layer), n),
        ]  # fmt: skip
    return found


def _losses() -> list[Case]:
    found = []
    for columns in (32000, 50304, 128256):
        targets, scale = torch.zeros(2, dtype=torch.int64), torch.ones(2)
        found.append(
            Case(f"cross-entropy, whole, {columns}", 4, 5,
                 lambda c, v=columns, t=targets, s=scale: c.cross_entropy_fused_(rows(v, count=2), t, s, v),
                 lambda m, v=columns, t=targets, s=scale: m("cross_entropy").whole_triton_(rows(v, count=2), t, s, v),
                 2 * columns)
        )  # fmt: skip
    v, t, s = 32000, torch.zeros(2, dtype=torch.int64), torch.ones(2)
    return [
        *found,
        Case("cross-entropy, statistics", 2, 4, lambda c: c.cross_entropy_statistics(rows(v, count=2), t, v),
             lambda m: m("cross_entropy").statistics_triton(rows(v, count=2), t, v), 2 * v),
        Case("cross-entropy, gradient", 4, 4, lambda c: c.cross_entropy_gradient_(rows(v, count=2), t, s, s, v),
             lambda m: m("cross_entropy").gradient_triton_(rows(v, count=2), t, s, s, v, vocab=v), 2 * v),
    ]  # fmt: skip


def _rest() -> list[Case]:
    gate_up, grad, n = rows(2 * WIDTH), rows(), ROWS * WIDTH
    q, k, angle = (torch.randn(4, 2, h, d) for h, d in ((32, 128), (8, 128), (1, 64)))
    q, k, angle = q.to(BF16), k.to(BF16), angle[:, :, 0].contiguous()
    turn = dict(interleaved=False, inverse=False)
    return [
        Case("SwiGLU forward", 6, 5, lambda c: c.swiglu_forward(gate_up),
             lambda t: t("activation").gated_forward(gate_up, False), n),
        Case("SwiGLU backward", 10, 11, lambda c: c.swiglu_backward(grad, gate_up),
             lambda t: t("activation").gated_backward(grad, gate_up, False), n),
        Case("GeGLU forward", 6, 8, None, lambda t: t("activation").gated_forward(gate_up, True), n),
        Case("GeGLU backward", 10, 18, None, lambda t: t("activation").gated_backward(grad, gate_up, True), n),
        Case("bias + GELU forward", 4, 8, None, lambda t: t("activation").gelu_forward(grad, grad[0].clone()), n),
        Case("RoPE q and k", 4, 3, lambda c: c.rope(q, k, angle, angle, **turn),
             lambda t: t("rope").turn(q, k, angle, angle, in_place=False, **turn), q.numel() + k.numel()),
        Case("bias + dropout + residual", 6, 3, None,
             lambda t: t("dropout").forward(grad.view(8, 8, WIDTH), grad[0].clone(), rows().view(8, 8, WIDTH),
                                            (1, 2, 3), torch.arange(8), torch.arange(8), 0.1), n),
    ]  # fmt: skip


def _flat() -> list[Case]:
    n = 1 << 16
    flat = lambda: torch.rand(n)  # noqa: E731
    options = dict(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3)
    found = []
    for name, dtype, least in (("AdamW fp32", None, 28), ("AdamW fp32 + bf16 copy", BF16, 30)):

        def call(function: object, dtype: torch.dtype | None = dtype) -> object:
            model = None if dtype is None else torch.zeros(n, dtype=dtype)
            return function(flat(), flat(), flat(), flat(), model, **options)

        found.append(
            Case(name, least, 14, lambda c, call=call: call(c.adamw_),
                 lambda t, call=call: call(t("optimizer").adamw_triton_), n)
        )  # fmt: skip
    return [
        *found,
        Case("sum of squares", 4, 2, lambda c: c.square_sum(flat()),
             lambda t: t("optimizer").square_sum_triton(flat()), n),
    ]  # fmt: skip


def large(tensor: Tensor, elements: int) -> bool:
    """Whether a tensor counts: half as many elements as the case has, or the few key heads of RoPE."""
    return tensor.numel() >= elements // 2 or (tensor.numel() >= elements // 8 and tensor.dim() == 4)


def count_cuda() -> dict[str, list[float]]:
    """Case -> bytes an element that the CUDA kernels read, and write."""
    import ctypes

    from megapre.kernels import cuda
    from tests.kernels.simt import build, tape

    library = build.load(build.build("count"))
    library.simt_watch.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    library.simt_read.restype = library.simt_written.restype = ctypes.c_int64
    library.simt_configure(0, 0, 0, build.SHARED_LIMIT)
    sums, elements = [0, 0], 1

    def call(name: str, *arguments: object, refusal: int = 0) -> int:
        library.simt_watch(None, 0)
        seen = {a.data_ptr(): a for a in arguments if isinstance(a, Tensor) and large(a, elements)}
        for at, tensor in seen.items():
            library.simt_watch(at, tensor.numel() * tensor.element_size())
        code = getattr(library, name)(*tape.raw(arguments), None)
        error = library.simt_take_error().decode()
        assert not error and code in (0, refusal), f"{name}: {code} {error}"
        sums[0] += sum(library.simt_read(i) for i in range(len(seen)))
        sums[1] += sum(library.simt_written(i) for i in range(len(seen)))
        return code

    cuda._call, cuda.multiprocessors = call, lambda device: 1
    found = {}
    for case in cases():
        if case.cuda is not None:
            sums[:], elements = [0, 0], case.elements
            case.cuda(cuda)
            found[case.name] = [total / case.elements for total in sums]
    return found


def count_triton() -> dict[str, list[float]]:
    """Case -> bytes an element that the Triton kernels read, and write, and operations; run under the interpreter."""
    import importlib

    import numpy as np
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    sums, watched, elements = [0, 0, 0], [], [1]

    def access(which: int, pointers: object, mask: object) -> None:
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        lanes = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data.astype(bool), shape)].astype(np.int64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        sums[which] += size * sum(int(((lanes >= a) & (lanes < b)).sum()) for a, b in watched)

    def arithmetic(plain: object, cost: int) -> object:
        def method(self: object, *args: object) -> object:
            out = plain(self, *args)
            if out.dtype.scalar.is_floating() and out.data.dtype != bool:
                sums[2] += cost * out.data.size
            return out

        return method

    load, store = builder.create_masked_load, builder.create_masked_store
    builder.create_masked_load = lambda self, p, m, *rest: (access(0, p, m), load(self, p, m, *rest))[1]
    builder.create_masked_store = lambda self, p, v, m, *rest: (access(1, p, m), store(self, p, v, m, *rest))[1]
    for name, cost in (("binary_op", 1), ("unary_op", 1), ("create_fma", 2), ("create_rsqrt", 1)):
        setattr(builder, name, arithmetic(getattr(builder, name), cost))
    reduce = interpreter.ReduceOps.apply_impl

    def reduced(self: object, data: object) -> object:
        handle = data[0] if isinstance(data, tuple | list) else data
        sums[2] += handle.handle.data.size
        return reduce(self, data)

    interpreter.ReduceOps.apply_impl = reduced
    arguments = interpreter.GridExecutor._init_args_hst

    def watch(self: object, args: object, options: object) -> object:
        host = arguments(self, args, options)
        tensors = {t.data_ptr(): t for t in [*host[0], *host[1].values()] if isinstance(t, Tensor)}
        big = [t for t in tensors.values() if large(t, elements[0])]
        watched[:] = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in big]
        return host

    interpreter.GridExecutor._init_args_hst = watch
    found = {}
    for case in cases():
        sums[:], elements[0] = [0, 0, 0], case.elements
        case.triton(lambda name: importlib.import_module(f"megapre.kernels.triton.{name}"))
        found[case.name] = [total / case.elements for total in sums]
    return found


class Products(TorchDispatchMode):
    """Operations of every matrix product that torch is asked for."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.total += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return out


def head() -> str:
    """A sentence about linear + cross-entropy: products counted in one call, traffic from the chunks."""
    from megapre.kernels import linear_cross_entropy as lce

    n, width, vocab = 96, 64, 512
    x, w, t = torch.randn(n, width), torch.randn(vocab, width), torch.zeros(n, dtype=torch.int64)
    with Products() as counted:
        lce.linear_ce_torch(x, w, t, torch.ones(n), vocab, main_grad=torch.zeros(vocab, width))
    chunk, batch, h, v = lce.GPU_ROWS, 8192, 4096, 128256
    weights, logits = -(-batch // chunk) * v * h * (2 + 2 + 8), batch * v * 2 * 5
    return (
        f"linear + cross-entropy: products of {counted.total / (6 * n * width * vocab):.2f} times the least, 6 n h v. "
        f"With chunks of {chunk} rows a call of [{batch}, {h}] x {v} moves {weights / 1e9:.0f} GB of weights (W read "
        f"twice a chunk, dW in fp32 read and written once) and {logits / 1e9:.0f} GB of logits (written, read and "
        "written as gradient, read twice)."
    )


def table() -> str:
    """The table as markdown."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.kernels.traffic", "--count-triton"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    triton, cuda = json.loads(done.stdout.splitlines()[-1]), count_cuda()
    lines = [
        "| call (bf16) | least B/element | CUDA: read + written | Triton: read + written | least operations/element "
        "| Triton's |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases():
        told = ["-" if f is None else f"{f[0]:.1f} + {f[1]:.1f}" for f in (cuda.get(case.name), triton[case.name])]
        lines.append(
            f"| {case.name} | {case.bytes:g} | {told[0]} | {told[1]} | {case.flops:g} | {triton[case.name][2]:.0f} |"
        )
    return "\n".join([*lines, "", head()])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md too")
    parser.add_argument("--count-triton", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.count_triton:
        print(json.dumps(count_triton()))
        return
    text = table()
    print(text)
    if arguments.write:
        from benchmarks.kernels import docs

        docs.write("benchmarks/kernels/traffic.py", text)


if __name__ == "__main__":
    main()
