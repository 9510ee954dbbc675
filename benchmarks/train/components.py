"""Where a step's time goes, by phase and by operation, and what of it is no kernel.

    python benchmarks/train/components.py [--jobs J1 J2] [--dtype bf16] [--write]

Phases and operations are those of ``megapre train --profile`` on one thread, in CPU seconds. The overhead is a
measurement of its own: the same layers and microbatches on 8 tokens of few features, where kernels have next to nothing
to do, so that what is left is Python, dispatch, the loader, the guard and the metrics. Its share of the job's step is
an upper bound. ``--write`` puts the tables into docs/performance.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]

import run  # noqa: E402
from profiles import parser, profile, small  # noqa: E402

from benchmarks.kernels import docs  # noqa: E402

SHOWN, GOAL = 12, 0.03
TINY = {
    "J1": ("model.hidden=24", "model.sequence=8", "model.vocab_size=64", "train.global_batch=1", "train.microbatch=1"),
    "J2": ("model.hidden=32", "model.kv_heads=4", "model.ffn_hidden=64", "model.sequence=8", "model.vocab_size=64",
           "train.global_batch=2", "train.microbatch=1"),
}  # fmt: skip
"""As many layers, heads and microbatches as the job has, and next to no arithmetic."""


def section(name: str, dtype: str, seen: dict[str, Any], tiny: dict[str, Any]) -> str:
    """Phases, operations, overhead."""
    cpu = seen["cpu"]
    lines = [f"**{name} {dtype}, 1 thread**: {cpu:.3f} CPU-s a step.", ""]
    lines += ["| phase | CPU ms | share |", "|---|---|---|"]
    for phase, found in sorted(seen["phases"].items(), key=lambda item: -item[1]["cpu"]):
        lines.append(f"| {phase} | {1e3 * found['cpu']:.1f} | {found['cpu'] / cpu:.1%} |")
    whole = sum(op["seconds"] for op in seen["ops"])
    lines += ["", "| operation | calls | CPU ms of its own | share of those listed |", "|---|---|---|---|"]
    for op in seen["ops"][:SHOWN]:
        lines.append(
            f"| `{op['name']}` | {op['calls']:.0f} | {1e3 * op['seconds']:.1f} | {op['seconds'] / whole:.1%} |"
        )
    share = tiny["cpu"] / cpu
    verdict = "reached" if share < GOAL else "missed"
    told = f"Outside kernels: at most {1e3 * tiny['cpu']:.1f} ms, {share:.1%} of the step"
    return "\n".join([*lines, "", f"{told} (goal below {GOAL:.0%}: {verdict})."])


def main() -> int:
    args = parser(__doc__).parse_args()
    for name in args.jobs:
        overrides = [f"precision.dtype={args.dtype}", "train.threads=1"]
        _, (seen,) = profile(name, [*(small(name) if args.quick else []), *overrides], args.work, f"{name}-profile")
        _, (tiny,) = profile(name, [*overrides, *TINY[name]], args.work, f"{name}-tiny")
        text = "\n".join([*run.heading(), "", section(name, args.dtype, seen, tiny)])
        print(f"{text}\n", flush=True)
        if args.write:
            docs.write(f"benchmarks/train/components.py {name}", text, docs.PAGE.with_name("performance.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
