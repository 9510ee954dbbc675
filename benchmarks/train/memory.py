"""What a rank's resident memory is, by kind, at the peak of a step.

    python benchmarks/train/memory.py [--jobs J1 J2] [--dtype bf16] [--threads 2] [--steps 4] [--write]

Weights, gradients, optimizer and activations are those of ``megapre trace``, which counts the tensors that are alive;
what the interpreter and the libraries take is read before the run, and the peak of resident memory after it, in a
process that does as ``megapre train`` does. The rest is neither: fragments of the allocator, memory that kernels take
for themselves, threads. ``--write`` puts the tables into docs/performance.md.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]

from turns import peak_bytes  # noqa: E402

GIB = 2.0**30
KINDS = {
    "weights": "weights, {dtype}",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer: fp32 weights and AdamW's two moments",
    "activations": "activations, with a chunk of the output layer's logits",
    "logits": "logits in whole",
    "update": "memory of the update",
}
"""Kinds of ``megapre trace`` and what to call them."""
COPIED = 12
"""Bytes of a parameter that a checkpoint holds, which a save beside the training copies."""


def train(arguments: list[str]) -> int:
    """A run, with a line of JSON about this process's memory before and after it."""
    import megapre.train  # noqa: F401
    from megapre import cli

    before = peak_bytes()
    code = cli.main(["train", *arguments])
    print(json.dumps({"before": before, "peak": peak_bytes()}))
    return code


def measured(path: Path, overrides: list[str], threads: int) -> tuple[int, int]:
    """Bytes of resident memory (before the run, at its peak) of ``megapre train`` under the launcher's settings."""
    from megapre.resilience.environment import prepare

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    prepare(env, threads, single_host=True)
    command = [sys.executable, str(HERE / "memory.py"), "train", str(path), *overrides]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines() or ["without a word"]
        raise RuntimeError(f"the run ended with exit code {done.returncode}: {said[-1]}")
    found = json.loads(lines[-1])
    return found["before"], found["peak"]


def table(name: str, dtype: str, threads: int, living: dict[str, int], parameters: int, before: int, peak: int) -> str:
    """The page's section, from bytes."""
    rows = [("Python, torch and megapre's code", before)]
    rows += [(told.format(dtype=dtype), living[kind]) for kind, told in KINDS.items() if living.get(kind)]
    rows += [("the rest", peak - sum(size for _, size in rows)), ("peak of resident memory", peak)]
    lines = [f"**{name} {dtype}, {threads} thread{'s' * (threads > 1)}**", "", "| kind | GiB |", "|---|---|"]
    lines += [f"| {told} | {size / GIB:.2f} |" for told, size in rows]
    copied = COPIED * parameters / GIB
    return "\n".join([*lines, "", f"From the first save beside the training on, its copies: {copied:.2f} GiB more."])


def main() -> int:
    import job
    import run
    from profiles import JOBS, parser, small

    from benchmarks.kernels import docs
    from megapre.verify.trace import trace

    options = parser(__doc__)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--steps", type=int, default=4, help="steps of the run (default 4)")
    args = options.parse_args()
    for name in args.jobs:
        path, folder = HERE / JOBS[name], args.work / "runs" / f"{name}-memory"
        shutil.rmtree(folder, ignore_errors=True)
        overrides = [
            *(small(name) if args.quick else []), f"precision.dtype={args.dtype}", f"train.threads={args.threads}",
            f"train.steps={args.steps}", f"schedule.warmup={min(4, args.steps - 1)}",
        ]  # fmt: skip
        config = job.read(path, args.work, overrides)
        found = trace(config, config.model.vocab_size, 0)
        paths = [f'data.paths=["{config.data.paths[0]}"]', f"train.run_dir={folder}"]
        before, peak = measured(path, [*overrides, *paths], args.threads)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        shown = table(name, args.dtype, args.threads, found.peak, found.parameters, before, peak)
        text = "\n".join([*run.heading(), "", shown])
        print(f"{text}\n", flush=True)
        if args.write:
            docs.write(f"benchmarks/train/memory.py {name}", text, docs.PAGE.with_name("performance.md"))
    return 0


if __name__ == "__main__":
    sys.exit(train(sys.argv[2:]) if sys.argv[1:2] == ["train"] else main())
