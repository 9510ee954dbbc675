"""Runs of ``megapre train --profile`` and what they wrote."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]

import job  # noqa: E402

from megapre.config.check import world_size  # noqa: E402
from megapre.monitor.profile import TIMED, TRACED  # noqa: E402

JOBS = {"J1": "j1.toml", "J2": "j2.toml"}
QUICK = (
    "model.layers=4", "model.hidden=32", "model.heads=2", "model.sequence=32", "model.vocab_size=211",
    "train.global_batch=8", "train.microbatch=4",
)  # fmt: skip
QUICK_LLAMA = ("model.kv_heads=2", "model.ffn_hidden=64")
"""The jobs in small, to see that a script works."""


def parser(text: str, jobs: tuple[str, ...] = tuple(JOBS)) -> argparse.ArgumentParser:
    """The options that all scripts about single jobs have."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--jobs", nargs="+", choices=tuple(JOBS), default=list(jobs))
    made.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    made.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder for data and runs")
    made.add_argument("--quick", action="store_true", help="a tiny model, to see that all of this works")
    made.add_argument("--write", action="store_true", help="put the results into docs/performance.md")
    return made


def small(name: str) -> list[str]:
    return [*QUICK, *(QUICK_LLAMA if name != "J1" else ())]


def profile(name: str, overrides: list[str], work: Path, label: str) -> tuple[Any, list[dict[str, Any]]]:
    """The job as it was run, and the profile of every rank."""
    path, folder = HERE / JOBS[name], work / "runs" / label
    shutil.rmtree(folder, ignore_errors=True)
    config = job.read(path, work, overrides)
    steps = config.monitor.warmup_steps + TIMED + TRACED + 1
    paths = [f'data.paths=["{config.data.paths[0]}"]', f"train.run_dir={folder}", f"train.steps={steps}"]
    command = [sys.executable, "-m", "megapre", "train", str(path), "--profile", *overrides, *paths]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise RuntimeError(f"{label}: exit code {done.returncode}: {lines[-1] if lines else 'without a word'}")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    ranks = range(world_size(config))
    return config, [json.loads((folder / "profile" / f"phases_{rank}.json").read_text()) for rank in ranks]
