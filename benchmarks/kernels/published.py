"""Causal attention at the shapes of the published figures: python benchmarks/kernels/published.py [--write].

Prints TFLOP/s of FlashAttention-2 and -3, cuDNN and Triton as their authors published them
(``published_attention.csv``), and beside them, on a GPU of the same kind, what ours reach at the same shape: 16,384
tokens in all, 2,048 features over all heads. FLOPs are counted as they do: 4 * length^2 * 2048 a sequence, halved for
the causal mask, 3.5 of that for forward + backward. The columns of ours are empty where there is no such GPU; none has
been used yet. ``--write`` puts the table into docs/kernels.md.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

TABLE = Path(__file__).with_name("published_attention.csv")
TOKENS, WIDTH, ROUNDS = 16384, 2048, 30
OURS = ("triton", "cuda")
Row = tuple[str, str, int, int]
"""GPU, passes (``fwd`` or ``fwd+bwd``), features of a head, length."""


def published() -> tuple[dict[Row, dict[str, str]], list[str]]:
    """TFLOP/s by row and kernel, and all kernels in the order of the file."""
    found: dict[Row, dict[str, str]] = {}
    kernels: dict[str, None] = {}
    with TABLE.open(newline="") as stream:
        for line in csv.DictReader(stream):
            row = (line["gpu"], line["passes"], int(line["head_dim"]), int(line["length"]))
            found.setdefault(row, {})[line["kernel"]] = line["tflops"] or "out of memory"
            kernels[line["kernel"]] = None
    return found, list(kernels)


def work(passes: str, length: int) -> float:
    """FLOPs of a call, as the published figures count them."""
    return TOKENS / length * 4 * length**2 * WIDTH / 2 * (3.5 if passes == "fwd+bwd" else 1.0)


def measured(row: Row) -> dict[str, str]:
    """TFLOP/s of our versions where this machine has the row's GPU."""
    import torch

    gpu, passes, features, length = row
    if not torch.cuda.is_available() or gpu not in torch.cuda.get_device_name():
        return {}
    from benchmarks.kernels import timing
    from benchmarks.kernels.setting import BF16
    from megapre.config.schema import KernelsConfig
    from megapre.kernels import registry
    from megapre.kernels.mask import CAUSAL

    found = {}
    shape = (length, TOKENS // length, WIDTH // features, features)
    q, k, v, up = (torch.randn(shape, dtype=BF16, device="cuda") for _ in range(4))
    inputs = [x.requires_grad_(passes == "fwd+bwd") for x in (q, k, v)]
    for name in OURS:
        attention = registry.choose(KernelsConfig(attention=name), q.device, BF16).attention

        def call(attention: Callable = attention) -> object:
            y = attention(q, k, v, mask=CAUSAL)
            return torch.autograd.grad(y, inputs, up) if y.requires_grad else y

        times = sorted(timing.events(call) for _ in range(ROUNDS + 5))  # the first calls compile, and are the slowest
        found[name] = f"{work(passes, length) / timing.median(times[:ROUNDS]) / 1e12:.0f}"
    return found


def table() -> str:
    """All rows, as markdown."""
    rows, kernels = published()
    columns = ["GPU, passes, D, length", *(f"our {name}" for name in OURS), *kernels]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1)]
    for row, theirs in sorted(rows.items()):
        ours = measured(row)
        cells = [ours.get(name, "") for name in OURS] + [theirs.get(kernel, "-") for kernel in kernels]
        lines.append(f"| {row[0]}, {row[1]}, {row[2]}, {row[3]:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    args = parser.parse_args()
    text = table()
    print(text)
    if args.write:
        from benchmarks.kernels import docs

        docs.write("benchmarks/kernels/published.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
