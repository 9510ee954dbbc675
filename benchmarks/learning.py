"""Shows that each objective learns: python benchmarks/learning.py [NAME ...] [--write].

Runs the jobs of examples/objectives through `megapre train` on this machine's Python standard library, each on two
ranks or four, and compares the held-out loss with the best that a model without any context could reach: the unigram
entropy of the very targets that are asked for, ln 2 for a choice of two, or the entropy of how often tokens are
replaced. The last checkpoint's loss is measured on one rank, part by part of the held-out samples, which also tells how
far off it may be.

Exits with 1 when a job does not get clearly below, or takes more processor time than two cores have in three minutes:
seconds on the clock say more about what else a machine does.
``--write`` puts the table of all jobs that have run so far in the folder into docs/learning.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from megapre.config.check import check
from megapre.config.load import load
from megapre.config.schema import Config
from megapre.data.loader import Microbatch, count, validation
from megapre.evaluation.generate import open_checkpoint, resolve
from megapre.training.loss import loss_parts

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "learning.md"
START, END = "<!-- learning -->\n", "<!-- end of learning -->"
CLEARLY = 0.98
"""Largest share of the loss without context that is clearly below it, and"""
SIGMAS = 3.0
"""how many standard errors lie between the two at least."""
BUDGET = 2 * 180.0
"""Most seconds of processor time of a whole command, its start, validation and checkpoint included."""
COUNTED = {"tokens": "targets", "sentences": "labels", "detection": "tokens"}
"""Loss -> what it is a mean over, of ``megapre.data.loader.Counts``."""
SUBREAPER = 36
"""Linux, prctl(2): orphaned descendants become this process's children, so that their time is counted."""
HEAD = (
    "| objective | layout | steps | CPU s | wall s | loss | held-out | without context | |",
    "|---|---|--:|--:|--:|---|--:|--:|---|",
)


def main() -> int:
    """Train what is named, or every job; 1 when one is not better than no context, or too dear."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(path.stem for path in (ROOT / "examples" / "objectives").glob("*.toml"))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all when none is named")
    parser.add_argument("--folder", default="build/learning", help="data, runs and results")
    parser.add_argument("--write", action="store_true", help="put the table into docs/learning.md")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(known))
    if unknown:
        parser.error(f"there is no examples/objectives/{unknown[0]}.toml")
    folder = Path(args.folder).resolve()
    if not (folder / "stdlib_text_sentence.sentences64").exists():
        prepare = [sys.executable, "examples/objectives/prepare.py", "--output", str(folder)]
        subprocess.run(prepare, cwd=ROOT, check=True)
    results = folder / "results.json"
    chosen = args.names or known
    for name in chosen:
        row = measure(name, folder)
        rows = {**(json.loads(results.read_text()) if results.exists() else {}), name: row}
        results.write_text(json.dumps(rows, indent=1, sort_keys=True))
        print("\n".join(lines({name: row})), flush=True)
    if args.write:
        text = DOCS.read_text()
        before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
        DOCS.write_text(before + "\n".join([*HEAD, *lines(rows)]) + "\n" + after)
    return 0 if all(good(rows[name]) for name in chosen) else 1


def measure(name: str, folder: Path) -> dict:
    """Train one job from nothing; its held-out losses beside what no context gives."""
    job, run = f"examples/objectives/{name}.toml", folder / "runs" / name
    paths = [str(folder / Path(path).name) for path in load(ROOT / job).data.paths]
    changes = [f"data.paths={json.dumps(paths)}", f"data.tokenizer_model={folder / 'tokenizer.json'}",
               f"train.run_dir={run}", "checkpoint.resume=false"]  # fmt: skip
    config = check(load(ROOT / job, changes))
    shutil.rmtree(run, ignore_errors=True)  # an earlier run of more steps has the newer checkpoint
    wall, cpu = timed([sys.executable, "-m", "megapre", "train", job, *changes])
    return {"layout": layout(config), "steps": config.train.steps, "wall": wall, "cpu": cpu, "losses": held_out(run)}


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds by the clock and of processors, of a command and all that it starts; an error when it fails."""
    if ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl refused to make this process a subreaper: processor time cannot be counted")
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, check=True)
    wall = time.monotonic() - begin
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def held_out(run: Path) -> list[dict]:
    """Losses of the run's last checkpoint on one rank, their standard errors, and those without context."""
    config, engine = open_checkpoint(resolve(run))
    parts = validation(config, vocab_size=engine.model.vocab_size, data_rank=0, data_size=1)
    counts = [count([m]) for m in parts]
    found = [engine.step.held_out([m], of) for m, of in zip(parts, counts)]
    names = loss_parts(config.model)
    rows = []
    for name in names:
        sizes = np.array([getattr(of, COUNTED[name]) for of in counts], np.float64)
        means = np.array([float(told[f"loss/{name}" if len(names) > 1 else "loss"]) for told in found])
        mean = float(means @ sizes / sizes.sum())
        spread = (((means - mean) * sizes) ** 2).sum() / (1 - 1 / len(parts))
        if name == "tokens":
            chance = unigram(parts, engine.model.vocab_size)
        elif name == "detection":
            chance = entropy([float(told["replaced"]) for told in found] @ sizes / sizes.sum())
        else:
            chance = math.log(2)
        rows.append({"name": name, "held_out": mean, "error": math.sqrt(spread) / float(sizes.sum()), "chance": chance})
    agrees(run, rows)
    return rows


def agrees(run: Path, rows: list[dict]) -> None:
    """Hold the losses on one rank against those that the run said of its last step on its own layout."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in found if row.get("split") == "validation"][-1]
    for row in rows:
        said = last.get(f"loss/{row['name']}", last["loss"])
        if abs(said - row["held_out"]) > 1e-3 * said:
            raise RuntimeError(f"{run} said {said} of its {row['name']}, one rank says {row['held_out']}")


def unigram(parts: list[Microbatch], vocab_size: int) -> float:
    """Entropy, in nats, of the held-out targets: no distribution without context predicts them better."""
    counts = np.zeros(vocab_size, np.int64)
    for m in parts:
        counts += np.bincount(m.targets[m.weights > 0].numpy(), minlength=vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def entropy(share: float) -> float:
    """Loss, in nats, of who knows nothing but how often a choice of two goes one way; at most ln 2."""
    return -share * math.log(share) - (1 - share) * math.log(1 - share)


def below(loss: dict) -> bool:
    """Whether a held-out loss is clearly below the one without context."""
    return loss["held_out"] < min(CLEARLY * loss["chance"], loss["chance"] - SIGMAS * loss["error"])


def good(row: dict) -> bool:
    """Whether all of a job's losses are clearly below, at the price that it may have."""
    return row["cpu"] <= BUDGET and all(map(below, row["losses"]))


def layout(config: Config) -> str:
    """The axes that are cut."""
    grid = config.parallel
    sizes = {"TP": grid.tensor, "PP": grid.pipeline, "DP": grid.data, "CP": grid.context}
    return " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "1 rank"


def lines(rows: dict[str, dict]) -> list[str]:
    """Rows of the table."""
    made = []
    for name, row in sorted(rows.items()):
        dear = f", above {BUDGET:.0f} CPU s" if row["cpu"] > BUDGET else ""
        for loss in row["losses"]:
            verdict = ("below" if below(loss) else "not shown") + dear
            made.append(
                f"| `{name}` | {row['layout']} | {row['steps']} | {row['cpu']:.0f} | {row['wall']:.0f} | "
                f"{loss['name']} | {loss['held_out']:.3f} ± {loss['error']:.3f} | {loss['chance']:.3f} | {verdict} |"
            )
    return made


if __name__ == "__main__":
    raise SystemExit(main())
