"""The static table of the CUDA kernels: registers, spills, shared memory and instructions, beside their peers' figures.

    python benchmarks/kernels/static.py [--write]

prints the table of docs/kernels.md, and with --write puts it there (needs nvcc; cuobjdump from the toolkit or from
Triton's wheel). Nothing is executed on a GPU. Instructions an element are static: all instructions x threads / elements
where a row is one straight line, else those of the hot loops / elements an iteration loads; the peers' figures
(peer_static.csv) were counted so too, but with padding: at a function's end, and what is predicated off for good.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Row:
    """One kernel held to a budget. ``pattern`` is found in its demangled name; figures are for (sm_80, sm_90)."""

    op: str
    pattern: str
    regs: tuple[int, int]
    """Budget of registers."""
    instr: tuple[float, float] | None = None
    """Budget of instructions an element."""
    elements: int = 0
    """Elements a thread, for straight-line kernels; 0: count loops."""
    loop: int = 0
    """Elements an iteration of the one loop, where its loads do not tell (several streams)."""
    scores: int = 0
    """Scores a thread has in one turn of the loop of tensor-core products, for attention: the instructions counted are
    those of that loop that are no products. At two tiles a turn, those of both."""
    lanes: int = 8
    """Elements in 16 bytes."""
    wide: tuple[int, int] = (1, 1)
    """At least so many 128-bit loads and stores."""
    bytes: str = ""
    """Traffic an element, in bytes."""
    peer: tuple[str, str] = ("", "")
    """kernel and config in peer_static.csv."""
    missed: str = ""
    """Why a budget is missed; the figures then stand under ``stands``."""
    stands: tuple[tuple[int, float], tuple[int, float]] | None = None
    """(registers, instructions) that hold in place of a missed budget."""


ROPE = (
    "fp32 tables and arithmetic take 3.75 by themselves (the peer's 3.4 with bf16 tables rounds each product to bf16), "
    "and four running pointers the rest"
)
TABLE = (
    Row("RMSNorm forward, width 4096", r"norms::forward<B, B, 2, false, false>", (32, 32), (16, 16), 16, wide=(4, 2),
        bytes="4", peer=("dao_rmsnorm_fwd", "H=4096 bf16")),
    Row("LayerNorm forward, width 4096", r"norms::forward<B, B, 2, true, false>", (40, 40), (21, 21), 16, wide=(6, 2),
        bytes="4", peer=("dao_lnnorm_fwd", "H=4096 bf16"),
        missed="the arithmetic is sm_80's, but sm_90 adds 14 LDC of parameters, 9 IMAD, 5 S2R and 7 SHF for PRMT",
        stands=((40, 21), (40, 23.5))),
    Row("RMSNorm + residual forward", r"norms::forward<B, B, 2, false, true>", (32, 32), None, 16, wide=(6, 4),
        bytes="8", peer=("dao_rmsnorm_fwd+residual", "H=4096 bf16")),
    Row("LayerNorm + residual forward", r"norms::forward<B, B, 2, true, true>", (40, 40), None, 16, wide=(8, 4),
        bytes="8", peer=("dao_lnnorm_fwd+residual", "H=4096 bf16")),
    Row("RMSNorm backward, width 4096", r"norms::backward<B, B, 2, false>", (80, 80), loop=16, wide=(6, 4), bytes="6",
        peer=("dao_rmsnorm_bwd", "H=4096 bf16")),
    Row("LayerNorm backward, width 4096", r"norms::backward<B, B, 2, true>", (104, 104), loop=16, wide=(6, 4),
        bytes="6", peer=("dao_lnnorm_bwd", "H=4096 bf16")),
    Row("cross-entropy, V <= 32768, one pass", r"fused_registers<B>", (62, 62), (19, 19), 32, wide=(4, 4), bytes="4",
        peer=("cross_entropy_fwd+bwd", "V=32000 bf16 BS=32768"),
        missed="on sm_80 64 registers, all that 1024 threads may have, and no spill; sm_90 adds 73 instructions to the "
        "same arithmetic (LDC, IMAD, LEA, SHF)",
        stands=((64, 19), (62, 21.5))),
    Row("cross-entropy, V <= 80k / 110k, one pass", r"fused_shared<B>", (62, 62), (19, 19), wide=(0, 1), bytes="4"),
    Row("cross-entropy statistics, any V", r"statistics<B, 8>", (59, 59), None, wide=(2, 0), bytes="2",
        peer=("cross_entropy_fwd+bwd", "V=128256 bf16 BS=32768")),
    Row("cross-entropy gradient, any V", r"gradient<B, 8>", (59, 59), None, wide=(2, 2), bytes="4"),
    Row("SwiGLU forward", r"^forward<B, 8>", (32, 32), (16, 16), 8, wide=(2, 1), bytes="6",
        peer=("swiglu_fwd", "F=8192 bf16 BS=8192")),
    Row("SwiGLU backward", r"^backward<B, 8>", (32, 32), None, 8, wide=(3, 2), bytes="10",
        peer=("swiglu_bwd", "F=8192 bf16 BS=8192")),
    Row("RoPE q and k, halves", r"rotate<B, 8, false>", (64, 64), (4, 4), wide=(6, 4), bytes="4",
        peer=("rope_qk", "hq=32 hk=8 d=128 bf16 cos=fp32"), missed=ROPE, stands=((64, 4.7), (64, 5.1))),
    Row("RoPE q and k, pairs", r"rotate<B, 8, true>", (64, 64), (4, 4), wide=(6, 4), bytes="4", missed=ROPE,
        stands=((64, 4.7), (64, 5.1))),
    *(Row(f"attention {name}, D {d}, causal", f"attention::{kernel}<{d}, 0>", (255, 255), budgets,
          scores=scores, wide=(0, 0), peer=(f"flash_{peer}", f"D={d} causal bf16"))
      for name, d, kernel, peer, budgets, scores in (
          ("forward", 64, "forward", "fwd", (6.8, 6.9), 112), ("forward", 128, "forward", "fwd", (9.8, 10.1), 64),
          ("backward", 64, "backward", "bwd", (15, 15), 64), ("backward", 128, "backward", "bwd", (20.5, 20.5), 32),
      )),
    Row("AdamW fp32", r"adamw<None, 4>", (40, 48), (27, 27), 4, wide=(4, 3), bytes="28",
        peer=("apex_fused_adam", "fp32 g,p,m,v")),
    Row("AdamW fp32 and bf16 copy", r"adamw<B, 4>", (40, 48), (27, 27), 4, wide=(4, 3), bytes="30"),
    Row("sum of squares fp32", r"squares<float, 4>", (32, 32), lanes=4, wide=(1, 0), bytes="4",
        peer=("apex_l2norm", "fp32")),
)  # fmt: skip


@dataclass
class Kernel:
    """What nvcc made of one kernel for one architecture."""

    name: str
    regs: int
    spills: int
    shared: int
    lines: list[tuple[int, str, int | None]] = field(default_factory=list)
    """Address, opcode with modifiers, branch target."""

    @property
    def mix(self) -> Counter[str]:
        """Instructions by opcode, without padding."""
        return Counter(op.split(".")[0] for _, op, _ in self.lines)

    def wide(self, op: str) -> int:
        """128-bit accesses of LDG, STG, LDS or STS."""
        return sum(name.startswith(op + ".") and ".128" in name for _, name, _ in self.lines)

    def loops(self) -> list[list[str]]:
        """Opcodes of the innermost loops."""
        spans = [(target, at) for at, _, target in self.lines if target is not None and target < at]
        inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
        return [[op for at, op, _ in self.lines if a <= at <= b] for a, b in inner]

    def hot(self) -> list[str]:
        """Opcodes of the loop with the most tensor-core products and no such loop inside, the shortest; or []."""
        spans = [(target, at) for at, _, target in self.lines if target is not None and target < at]
        bodies = {span: [op for at, op, _ in self.lines if span[0] <= at <= span[1]] for span in spans}
        counts = {span: sum(op.startswith("HMMA") for op in ops) for span, ops in bodies.items()}
        inner = [
            span for span, count in counts.items()
            if count and not any(n and o != span and span[0] <= o[0] and o[1] <= span[1] for o, n in counts.items())
        ]  # fmt: skip
        return bodies[max(inner, key=lambda span: (counts[span], -len(bodies[span])))] if inner else []

    def per_element(self, row: Row) -> float:
        """Instructions an element: all of them, or those of the largest loop of every kind."""
        if row.scores:
            return sum(not op.startswith("HMMA") for op in self.hot()) / row.scores
        if row.elements:
            return len(self.lines) / row.elements
        if row.loop:
            return max(len(loop) for loop in self.loops()) / row.loop
        kinds: dict[tuple[bool, ...], tuple[int, float]] = {}
        for loop in self.loops():
            loads = sum((op.startswith(("LDG.", "LDS.")) and ".128" in op) or op.startswith("LDGSTS") for op in loop)
            kind = tuple(any(op.startswith(k) for op in loop) for k in ("LDGSTS", "FMNMX", "MUFU", "STG"))
            if loads and loads >= kinds.get(kind, (0, 0.0))[0]:
                kinds[kind] = (loads, len(loop) / loads / row.lanes)
        return sum(cost for _, cost in kinds.values())


def find(tool: str) -> str | None:
    """Path of nvcc or cuobjdump: CUDA_HOME, PATH, Triton's wheel."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [Path(home) / "bin" / tool for home in homes if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / tool)
    return shutil.which(tool) or next((str(path) for path in places if os.access(path, os.X_OK)), None)


def missing() -> str:
    """Why the table cannot be made here, or ""."""
    absent = [tool for tool in ("nvcc", "cuobjdump", "c++filt") if find(tool) is None]
    return f"no {' and no '.join(absent)}: the CUDA kernels are not compiled here" if absent else ""


def compile_object(source: Path, arch: str) -> tuple[Path, str]:
    """Object of one source for one architecture and ptxas' report; kept under build/ by content."""
    nvcc = find("nvcc") or "nvcc"
    command = [nvcc, "-O3", "-std=c++17", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v",
               f"-gencode=arch=compute_{arch[3:]},code={arch}"]  # fmt: skip
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(repr((command, version, source.name)).encode())
    for path in _included(source):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "nvcc"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}-{arch}-{digest.hexdigest()[:16]}.o"
    report = target.with_suffix(".log")
    if not (target.exists() and report.exists()):
        partial = target.with_suffix(f".{os.getpid()}.o")
        result = subprocess.run([*command, "-c", str(source), "-o", str(partial)], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"nvcc refuses {source.name}:\n{result.stderr[-4000:]}")
        report.write_text(result.stderr)
        partial.replace(target)
    return target, report.read_text()


def _included(source: Path) -> list[Path]:
    """The source and every header of its folder that it includes, directly or not."""
    found, left = {source}, [source]
    while left:
        names = re.findall(r'#include "([\w.]+)"', left.pop().read_text())
        new = {source.parent / name for name in names} - found
        found |= new
        left += new
    return sorted(found)


@functools.cache
def kernels(arch: str) -> dict[str, Kernel]:
    """Every kernel of csrc/cuda by demangled name, compiled for ``arch``."""
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(2) as pool:
        compiled = list(pool.map(lambda source: compile_object(source, arch), sources))
    found: dict[str, Kernel] = {}
    for target, report in compiled:
        by_symbol = _parse_report(report)
        _parse_sass(target, by_symbol)
        pretty = subprocess.run([find("c++filt") or "c++filt"], input="\n".join(by_symbol), capture_output=True,
                                text=True, check=True).stdout.splitlines()  # fmt: skip
        for kernel, name in zip(by_symbol.values(), pretty):
            kernel.name = _short(name)
            found[f"{target.stem.split('-')[0]}: {kernel.name}"] = kernel
    return found


def _short(name: str) -> str:
    name = re.sub(r"\(anonymous namespace\)::|void ", "", name).replace("__nv_bfloat16", "B").replace("__half", "H")
    name = name.replace("(attention::Kind)", "")
    return re.sub(r"\(.*", "", name)


def _parse_report(report: str) -> dict[str, Kernel]:
    pattern = (
        r"Compiling entry function '(\S+)' for .*\n.*\n\s+\d+ bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\nptxas info\s+: Used (\d+) registers(.*)"
    )
    found = {}
    for m in re.finditer(pattern, report):
        shared = re.search(r"(\d+) bytes smem", m[5])
        found[m[1]] = Kernel(m[1], int(m[4]), int(m[2]) + int(m[3]), int(shared[1]) if shared else 0)
    return found


def _parse_sass(target: Path, found: dict[str, Kernel]) -> None:
    command = [find("cuobjdump") or "cuobjdump", "-sass", str(target)]
    current: Kernel | None = None
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if m := re.search(r"Function : (\S+)", line):
            current = found[m[1]]
        m = re.match(r"\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z0-9_.]+)(.*)", line)
        if m and current is not None and m[2] != "NOP" and "@!PT" not in line:  # padding, which does nothing
            branch = re.search(r"(0x[0-9a-f]+)", m[3]) if m[2].startswith("BRA") else None
            current.lines.append((int(m[1], 16), m[2], int(branch[1], 16) if branch else None))


def kernel_of(row: Row, arch: str) -> Kernel:
    """The one kernel of a row."""
    matches = [kernel for kernel in kernels(arch).values() if re.search(row.pattern, kernel.name)]
    if len(matches) != 1:
        raise LookupError(f"{row.pattern} names {len(matches)} kernels: {[kernel.name for kernel in matches]}")
    return matches[0]


def peer(row: Row, arch: str) -> str:
    """Registers and instructions an element of the peer, or ""."""
    with (Path(__file__).parent / "peer_static.csv").open() as file:
        for line in csv.DictReader(file):
            if row.peer[0] and (line["kernel"], line["config"], line["arch"]) == (*row.peer, arch):
                spilled = f", {line['spills']} B spilled" if line["spills"] != "0" else ""
                per = f", {line['instr_per_elem']}" if line["instr_per_elem"] else ""
                return f"{line['source']}: {line['regs']}{per}{spilled}"
    return ""


def table() -> str:
    """The table as Markdown."""
    lines = [
        "| kernel (bf16) | arch | registers (budget) | instr/element (budget) | spills | shared "
        "| 128-bit LDG, STG | bytes/element | peer: registers, instr/element |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in TABLE:
        for i, arch in enumerate(ARCHS):
            kernel = kernel_of(row, arch)
            budget = f" ({row.instr[i]:g})" if row.instr else ""
            count = kernel.per_element(row)
            per = f"{count:.1f}{budget}" if count else "-"
            over = kernel.regs > row.regs[i] or (row.instr is not None and count > row.instr[i])
            star = " *" if over else ""
            lines.append(
                f"| {row.op}{star} | {arch} | {kernel.regs} ({row.regs[i]}) | {per} | {kernel.spills} B "
                f"| {kernel.shared} B | {kernel.wide('LDG')}, {kernel.wide('STG')} | {row.bytes} | {peer(row, arch)} |"
            )
    lines += ["", *(f"\\* {row.op}: budget missed: {row.missed}." for row in TABLE if row.missed)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from benchmarks.kernels import docs

    text = missing() or table()
    print(text)
    if "--write" in sys.argv[1:] and not missing():
        docs.write("benchmarks/kernels/static.py", text)
