"""Compile every Triton kernel for sm_80 and sm_90 without a GPU and print what ptxas made of it, as markdown.

    python -m benchmarks.kernels.triton_static [--json | --sweep | --write]

The launchers run as they are, over a driver that names an architecture and launches nothing: triton specialises the
arguments (1, divisible by 16, alignment of pointers) as it does on a device, and block and warps are the shipped ones.
Registers, spills and shared memory are ptxas's, the instructions the machine code's (cuobjdump of triton's wheel).
An instruction count is static: straight-line code x threads / elements of one program; where a program loops over rows
or blocks, its loops' bodies alone count. Liger's column is the same compilation and the same count of liger-kernel in
the same run (``liger.py``), apex's is from ``triton_peers.csv``. Nothing here is a time: no kernel has run on a GPU.
``--write`` puts the table into docs/kernels.md.
"""
# mypy: ignore-errors

from __future__ import annotations

import argparse
import collections
import csv
import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import zeros
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks.kernels import docs

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", re.M)
MULTIPROCESSORS = {80: 108, 90: 132}
SHARED = {80: 164 * 1024, 90: 228 * 1024}


@dataclass
class Row:
    """One kernel as compiled for one architecture."""

    case: str
    kernel: str
    arch: int
    warps: int
    registers: int
    spills: int
    """Bytes of spill stores and loads."""
    shared: int
    per_sm: int
    """Programs that fit on a multiprocessor."""
    instructions: int
    """All of the kernel."""
    per_element: float
    """Instructions of the counted part x threads / elements of one program (or of one turn of the hot loop)."""
    wide: float
    """Bytes an element that pass through 128-bit loads and stores."""
    local: int
    """LDL and STL anywhere."""
    body: list[int]
    """Instructions of each loop, in the order of the code."""
    products: int
    """Tensor-core instructions (HMMA, HGMMA)."""
    hopper: int
    """HGMMA among them."""
    copies: int
    """Asynchronous copies to shared memory (LDGSTS)."""
    local_in_loops: int
    """LDL and STL in innermost loops."""


class NoDevice:
    """A driver that names an architecture and has no device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        """The architecture."""
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        """A number that keeps the compiled kernels of the architectures apart."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        """No stream."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are."""
        return torch.device("cpu")


@dataclass
class Case:
    """A call whose first kernel is measured."""

    name: str
    peer: tuple[str, str]
    """Kernel and configuration in ``triton_peers.csv``."""
    elements: int | tuple[int, int]
    """Elements of one program, or of one turn of its hot loop; where sm_90 has other tiles, of (sm_80, sm_90)."""
    looped: bool
    traffic: int
    """Bytes an element that must pass: the operands that are read and written in full."""
    call: object
    skip: int = 0
    """Launches of the call before the one that is measured."""


HALF = torch.bfloat16
NONE = ("", "")
MISSED = {
    "RoPE": "more than 4 instructions, which a peer reaches with cosines and products in bf16: ours are fp32 for "
    "positions past 1000, where 2 instructions a pair for widening and narrowing and 4 for the rotation alone make "
    "3.75",
    "attention": "more than 6.8 and 9.8 (sm_80), 7.8 and 7.4 (sm_90) instructions a score at 64 and 128 features: "
    "every turn computes 64-bit addresses of every row, 0.5 to 1 a score; on sm_80 at 128 features a tile has 64 keys, "
    "so sums are rescaled twice a score",
}
"""Budgets that are missed, and why."""


def cases() -> list[Case]:
    """Every kernel in the configuration of the budgets: bf16, width 4096 and the like."""
    norms = [*_norms("RMSNorm", False), *_norms("LayerNorm", True), *_wide_norms()]
    rotations = [_rotation(*shape, mixed) for shape in ((32, 8, 128), (16, 16, 64)) for mixed in (False, True)]
    rest = [*_losses(32000), *_losses(50304), *rotations, *_activations(), *_dropouts(), *_flat()]
    return [*norms, *rest, *_attention(64), *_attention(128), *_experts()]


def _norms(kind: str, layer: bool) -> list[Case]:
    from megapre.kernels.triton import norm

    x, w, s = zeros(512, 4096, dtype=HALF), zeros(4096, dtype=HALF), zeros(512)
    bias = w if layer else None
    return [
        Case(f"{kind} forward", NONE, 4096, False, 4, lambda: norm.forward(x, None, w, bias, 1e-5, layer)),
        Case(f"{kind} + residual forward", NONE, 4096, False, 8, lambda: norm.forward(x, x, w, bias, 1e-5, layer)),
        Case(f"{kind} backward", NONE, 4096, True, 6, lambda: norm.backward(x, None, x, w, s, s, layer, layer)),
        Case(f"{kind} + residual backward", NONE, 4096, True, 8,
             lambda: norm.backward(x, x, x, w, s, s, layer, layer)),
    ]  # fmt: skip


def _wide_norms() -> list[Case]:
    """Rows of 16384 features, by blocks of columns; the second read of a row is in the L2 cache."""
    from megapre.kernels.triton import norm

    x, w, s = zeros(64, 16384, dtype=HALF), zeros(16384, dtype=HALF), zeros(64)
    back = lambda: norm.backward(x, x, x, w, s, s, True, True)  # noqa: E731
    return [
        Case("LayerNorm + residual forward, wide", NONE, 4096, True, 8, lambda: norm.forward(x, x, w, w, 1e-5, True)),
        Case("LayerNorm + residual backward, wide", NONE, 4096, True, 8, back),
        Case("LayerNorm weight gradient, wide", NONE, 4096, True, 4, back, 1),
    ]


def _losses(columns: int) -> list[Case]:
    from megapre.kernels.triton import cross_entropy as ce

    logits, targets, scale = zeros(4, columns, dtype=HALF), zeros(4, dtype=torch.int64), zeros(4)
    once = columns <= ce.IN_REGISTERS
    whole = Case(f"cross-entropy, whole, {columns}", NONE, 32768 if once else 8192, not once, 4 if once else 6,
                 lambda: ce.whole_triton_(logits, targets, scale, columns))  # fmt: skip
    parts = [
        Case("cross-entropy, statistics", NONE, 8192, True, 2, lambda: ce.statistics_triton(logits, targets, columns)),
        Case("cross-entropy, gradient", NONE, 4096, False, 4,
             lambda: ce.gradient_triton_(logits, targets, scale, scale, columns, vocab=columns)),
    ]  # fmt: skip
    return [whole] if once else [whole, *parts]


def _rotation(heads: int, keys: int, dim: int, interleaved: bool) -> Case:
    from megapre.kernels.triton import rope

    q, k, t = zeros(8, 2, heads, dim, dtype=HALF), zeros(8, 2, keys, dim, dtype=HALF), zeros(8, 2, dim // 2)
    return Case(
        f"RoPE q, k, d = {dim}{', interleaved' if interleaved else ''}", NONE, (heads + keys) * dim, False, 4,
        lambda: rope.turn(q, k, t, t, interleaved=interleaved, inverse=False, in_place=False),
    )  # fmt: skip


def _activations() -> list[Case]:
    from megapre.kernels.triton import activation

    gate_up, grad, bias = zeros(8, 28672, dtype=HALF), zeros(8, 14336, dtype=HALF), zeros(14336, dtype=HALF)
    found = []
    for name, gelu in (("SwiGLU", False), ("GeGLU", True)):
        found += [
            Case(f"{name} forward", NONE, 4096, False, 6,
                 lambda gelu=gelu: activation.gated_forward(gate_up, gelu)),
            Case(f"{name} backward", NONE, 2048, False, 10,
                 lambda gelu=gelu: activation.gated_backward(grad, gate_up, gelu)),
        ]  # fmt: skip
    return [
        *found,
        Case("bias + GELU forward", NONE, 4096, False, 4, lambda: activation.gelu_forward(grad, bias)),
        Case("bias + GELU backward", NONE, 2048, True, 6, lambda: activation.gelu_backward(grad, grad, bias)),
    ]


def _dropouts() -> list[Case]:
    from megapre.kernels.triton import dropout

    x, w, places = zeros(8, 8, 4096, dtype=HALF), zeros(4096, dtype=HALF), zeros(8, dtype=torch.int64)
    place = ((1, 2, 3), places, places, 0.1)
    name = "bias + dropout + residual"
    return [
        Case(f"{name} forward", NONE, 2048, False, 6, lambda: dropout.forward(x, w, x, *place)),
        Case(f"{name} backward", NONE, 2048, True, 4, lambda: dropout.backward_bias(x, *place)),
    ]


def _attention(width: int) -> list[Case]:
    """Causal attention; an element is a score. Of the instructions of the hot loop, those that are no products."""
    from megapre.kernels.attention import Problem
    from megapre.kernels.mask import CAUSAL
    from megapre.kernels.triton import attention

    q, sums, problem = zeros(256, 1, 2, width, dtype=HALF), zeros(1, 2, 256), Problem(CAUSAL, None, None, 0.125)

    def backward() -> object:
        return attention._backward_triton(q, q, q, q, sums, sums, problem)

    name, config = f"attention, d = {width},", f"D={width} causal fp16"
    tile = 128 * 64 if width == 64 else (128 * 64, 128 * 128)
    return [
        Case(f"{name} forward", ("flash_fwd", config), tile, True, 0,
             lambda: attention._forward_triton(q, q, q, problem)),
        Case(f"{name} dq", NONE, 64 * 64, True, 0, backward),
        Case(f"{name} dk and dv", ("flash_bwd", config), 64 * 64, True, 0, backward, 1),
    ]  # fmt: skip


def _experts() -> list[Case]:
    """Mixture of experts, width 4096; an element of a product is one of C times a step of 64 along the sum. Of its loop
    those instructions are counted that are no products."""
    from megapre.kernels.triton import moe

    x, y, up = zeros(8, 4096, dtype=HALF), zeros(16, 4096, dtype=HALF), zeros(16, 1024, dtype=HALF)
    scores, weights, rows = zeros(64, 128), zeros(8, 2), zeros(8, 2, dtype=torch.int64)
    weight, main, source = zeros(2, 1024, 4096, dtype=HALF), zeros(2, 1024, 4096), zeros(16, dtype=torch.int64)
    return [
        Case("experts, top 8 of 128", NONE, 1024, True, 0, lambda: moe.top_k_triton(scores, 8)),
        Case("experts, permute", NONE, 1024, False, 4, lambda: moe._gather_triton(x, source)),
        Case("experts, unpermute", NONE, 1024, True, 2, lambda: moe._combine_triton(y, weights, rows)),
        Case("experts, unpermute backward", NONE, 1024, True, 6,
             lambda: moe._spread_triton(x, y, weights, source, rows)),
        Case("experts, x W", NONE, 128 * 128, True, 0, lambda: moe.grouped_mm_triton(y, weight, [9, 7])),
        Case("experts, dy W^T", NONE, 128 * 128, True, 0,
             lambda: moe.grouped_mm_triton(up, weight.transpose(1, 2), [9, 7])),
        Case("experts, dW", NONE, 128 * 128, True, 0, lambda: moe.grouped_dw_triton_(main, up, y, [9, 7])),
    ]  # fmt: skip


def _flat() -> list[Case]:
    from megapre.kernels.triton import launch, optimizer

    x, model, partial = zeros(1 << 16), zeros(1 << 16, dtype=HALF), zeros(1, 264, 4096)
    numbers = dict(lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=3)
    master = ("apex_fused_adam_master", "bf16 g,p + fp32 master,m,v")
    return [
        Case("AdamW fp32", ("apex_fused_adam", "fp32 g,p,m,v"), 1024, False, 28,
             lambda: optimizer.adamw_triton_(x, x, x, x, None, **numbers), 1),
        Case("AdamW fp32 + bf16 copy", master, 1024, False, 30,
             lambda: optimizer.adamw_triton_(x, x, x, x, model, **numbers), 1),
        Case("sum of squares", ("apex_l2norm", "fp32"), 4096, True, 4, lambda: optimizer.square_sum_triton(x)),
        Case("column sum", NONE, 2048, True, 4, lambda: launch.column_sum(partial)),
    ]  # fmt: skip


def capture(function, arch: int) -> list[tuple[str, tuple, object]]:
    """Call ``function`` with launches replaced by compilation; (kernel's name, grid, compiled) of each launch."""
    launches, plain = [], JITFunction.run

    def run(self, *args, grid, warmup, **options):
        compiled = plain(self, *args, grid=grid, warmup=True, **options)
        bound = dict(zip(self.arg_names, args)) | options
        launches.append((self.fn.__name__, grid(bound) if callable(grid) else grid, compiled))
        return compiled

    triton.runtime.driver.set_active(NoDevice(arch))
    JITFunction.run = run
    try:
        function()
    finally:
        JITFunction.run = plain
    return launches


def loops(code: list[tuple[int, str, str]]) -> list[list[int]]:
    """Loops of the machine code: indices of the instructions between a backward branch's target and the branch."""
    place = {address: i for i, (address, _, _) in enumerate(code)}
    found = []
    for i, (address, name, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target.group(1), 16) < address:
            found.append(list(range(place[int(target.group(1), 16)], i + 1)))
    return sorted(found)


def measure(case: str, kernel: str, arch: int, compiled, elements: int, looped: bool) -> Row:
    """Read registers, spills and machine code of one compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "k.cubin", Path(folder) / "k.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", cubin], capture_output=True, text=True, check=True)
        name = f"sm_{arch}{'a' if arch >= 90 else ''}"
        verbose = subprocess.run(
            [TOOLS / "ptxas", "-v", "-arch", name, ptx, "-o", Path(folder) / "out"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    registers = int(re.search(r"REG:(\d+)", usage.stdout).group(1))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", verbose))
    code = [(int(a, 16), op, rest) for a, op, rest in LINE.findall(sass.stdout)]
    while code and code[-1][1].split(".")[0] in ("NOP", "BRA"):
        code.pop()
    names = collections.Counter(op.split(".")[0] for _, op, _ in code)
    wide = sum(op.startswith(("LDG", "STG")) and "128" in op for _, op, _ in code)
    threads = 32 * compiled.metadata.num_warps
    bodies = loops(code)
    inner = {i for body in bodies if not any(set(o) < set(body) for o in bodies) for i in body}
    counted = len({i for body in bodies for i in body}) if looped else len(code)
    products = [sum(code[i][1].startswith(("HMMA", "HGMMA")) for i in body) for body in bodies]
    if any(products):  # of the loop with the most products, and none such inside, what is no product
        hot = [
            (count, -len(body)) for body, count in zip(bodies, products)
            if count and not any(n and set(o) < set(body) for o, n in zip(bodies, products))
        ]  # fmt: skip
        counted = -max(hot)[1] - max(hot)[0]
    shared = compiled.metadata.shared + (1024 if arch >= 90 else 0)
    per_sm = min(
        65536 // (threads * max(16, (registers + 7) // 8 * 8)), 2048 // threads, 32,
        SHARED[arch] // shared if shared else 32,
    )  # fmt: skip
    return Row(
        case, kernel, arch, compiled.metadata.num_warps, registers, spills, compiled.metadata.shared, per_sm, len(code),
        round(counted * threads / elements, 1), round(16 * wide * threads / elements, 1),
        names["LDL"] + names["STL"], [len(body) for body in bodies], names["HMMA"] + names["HGMMA"], names["HGMMA"],
        names["LDGSTS"],
        sum(code[i][1].startswith(("LDL", "STL")) for i in inner),
    )  # fmt: skip


def rows() -> list[Row]:
    """Every case for both architectures."""
    found = []
    for case in cases():
        for arch in (80, 90):
            name, _, compiled = capture(case.call, arch)[case.skip]
            elements = case.elements if isinstance(case.elements, int) else case.elements[arch == 90]
            found.append(measure(case.name, name.removeprefix("_"), arch, compiled, elements, case.looped))
    return found


def sweep() -> list[str]:
    """Launches of other widths and types that spill; none should."""
    from megapre.kernels.triton import activation, cross_entropy, norm, rope

    found = []
    for dtype in (torch.float32, torch.bfloat16):
        calls = {}
        for width in (64, 1000, 2048, 4096, 8192):
            x, w, s = zeros(4, width, dtype=dtype), zeros(width, dtype=dtype), zeros(4)
            calls |= {
                f"add_layer_norm {width}": lambda x=x, w=w: norm.forward(x, x, w, w, 1e-5, True),
                f"rms_norm backward {width}": lambda x=x, w=w: norm.backward(x, None, x, w, s, s, False, False),  # noqa: B023
                f"add_layer_norm backward {width}": lambda x=x, w=w: norm.backward(x, x, x, w, s, s, True, True),  # noqa: B023
                f"geglu backward {width}": lambda x=x: activation.gated_backward(x[:, ::2].contiguous(), x, True),
            }
        for columns in (1000, 32000, 50257, 50304):
            logits, targets, s = zeros(4, columns, dtype=dtype), zeros(4, dtype=torch.int64), zeros(4)
            calls[f"cross-entropy {columns}"] = lambda logits=logits, n=columns: cross_entropy.whole_triton_(
                logits, targets, s, n, smoothing=0.1  # noqa: B023
            )
        for heads, dim in ((33, 96), (40, 256), (8, 32)):
            q, t = zeros(4, 2, heads, dim, dtype=dtype), zeros(4, 2, dim // 2)
            calls[f"rope {heads} x {dim}"] = lambda q=q, t=t: rope.turn(
                q, q, t, t, interleaved=False, inverse=False, in_place=False
            )
        for name, call in calls.items():
            for arch in (80, 90):
                row = measure(name, "", arch, capture(call, arch)[0][2], 1, False)
                found += [f"{name} {dtype} sm_{arch}: {row.spills} B"] if row.spills + row.local else []
    return found


def liger_rows() -> dict[str, list[Row]]:
    """Liger's kernels for both architectures, by the name of our case; {} where Liger is not installed."""
    from benchmarks.kernels import liger

    found: dict[str, list[Row]] = {}
    for name, (call, elements, looped) in {} if liger.missing() else liger.calls().items():
        for arch in (80, 90):
            kernel, _, compiled = capture(call, arch)[0]
            found.setdefault(name, []).append(measure(name, kernel, arch, compiled, elements, looped))
    return found


def table(found: list[Row]) -> str:
    """The rows as markdown, one line for a case with both architectures in a cell, beside the peer's figures."""
    from benchmarks.kernels import liger

    with open(Path(__file__).parent / "triton_peers.csv") as file:
        apex = {(r["kernel"], r["config"], r["arch"]): r for r in csv.DictReader(file)}
    peers = liger_rows()
    beside_what = liger.missing() or f"liger-kernel {importlib.metadata.version('liger-kernel')}"
    lines = [
        f"triton {triton.__version__}; {beside_what}. Two figures: sm_80 / sm_90.",
        "",
        "| kernel | warps | registers | spills, B | shared, B | programs an SM | instructions an element "
        "| 128-bit B an element (needed) | peer: registers | spills, B | instructions an element |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_case = {case.name: case for case in cases()}
    for a, b in zip(found[::2], found[1::2]):
        case = by_case[a.case]
        beside = ["", "", ""]
        if a.case in peers:
            names = ("registers", "spills", "per_element")
            beside = [" / ".join(str(getattr(row, name)) for row in peers[a.case]) for name in names]
            beside[0] = f"Liger: {beside[0]}"
        elif case.peer != NONE:
            pair = [apex[(*case.peer, f"sm_{arch}")] for arch in (80, 90)]
            names = ("regs", "spill_st", "instr_per_elem")
            beside = [" / ".join(row[name] or "-" for row in pair) for name in names]
            source = "tutorial" if "tutorial" in pair[0]["source"] else "apex"
            beside[0] = f"{source}: {beside[0]}"
        measured = ("registers", "spills", "shared", "per_sm", "per_element")
        cells = [f"{getattr(a, name)} / {getattr(b, name)}" for name in measured]
        cells = [a.case, str(a.warps), *cells, f"{a.wide} / {b.wide} ({case.traffic})", *beside]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"Budget missed, {name}: {why}." for name, why in MISSED.items())]
    return "\n".join(lines)


def main() -> None:
    """Print the table, or its rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="rows instead of the table, with the traffic needed")
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md too")
    parser.add_argument("--sweep", action="store_true", help="look for spills at other widths and types instead")
    arguments = parser.parse_args()
    if arguments.sweep:
        found_spills = sweep()
        print("\n".join(found_spills) or "no spills")
        sys.exit(bool(found_spills))
    found = rows()
    if arguments.json:
        needed = {case.name: case.traffic for case in cases()}
        json.dump([{**asdict(row), "traffic": needed[row.case]} for row in found], sys.stdout)
    else:
        text = table(found)
        print(text)
        if arguments.write:
            docs.write("benchmarks/kernels/triton_static.py", text)


if __name__ == "__main__":
    main()
