"""Shows that each objective learns: python benchmarks/learning.py [NAME ...] [--write].

Runs the jobs of examples/objectives through `megapre train` on this machine's Python standard library, each on two
ranks or four, and compares the held-out loss with the best that a model without any context could reach: the unigram
entropy of the very targets that are asked for, or ln 2 for a choice of two. Exits with 1 when a job does not get
clearly below.
``--write`` puts the table of all jobs that have run so far in the folder into docs/learning.md.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from megapre.config.check import check
from megapre.config.load import load
from megapre.config.schema import Config
from megapre.data.check import check_data
from megapre.data.loader import validation
from megapre.training.loss import loss_parts

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "learning.md"
START, END = "<!-- learning -->\n", "<!-- end of learning -->"
CLEARLY = 0.98
"""Share of the loss without context that is below it by more than a few hundred held-out samples leave open."""
HEAD = (
    "| objective | layout | steps | seconds | loss | held-out | without context | |",
    "|---|---|--:|--:|---|--:|--:|---|",
)


def main() -> int:
    """Train what is named, or every job; 1 when one is not better than no context."""
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
    rows = json.loads(results.read_text()) if results.exists() else {}
    for name in args.names or known:
        rows[name] = measure(name, folder)
        results.write_text(json.dumps(rows, indent=1, sort_keys=True))
        print("\n".join(lines({name: rows[name]})), flush=True)
    if args.write:
        text = DOCS.read_text()
        before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
        DOCS.write_text(before + "\n".join([*HEAD, *lines(rows)]) + "\n" + after)
    losses = [loss for row in rows.values() for loss in row["losses"]]
    return 1 if any(loss["held_out"] >= CLEARLY * loss["chance"] for loss in losses) else 0


def measure(name: str, folder: Path) -> dict:
    """Train one job from nothing; what its last validation says beside what no context gives."""
    job, run = f"examples/objectives/{name}.toml", folder / "runs" / name
    paths = [str(folder / Path(path).name) for path in load(ROOT / job).data.paths]
    changes = [f"data.paths={json.dumps(paths)}", f"data.tokenizer_model={folder / 'tokenizer.json'}",
               f"train.run_dir={run}", "checkpoint.resume=false"]  # fmt: skip
    config = check(load(ROOT / job, changes))
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "megapre", "train", job, *changes], cwd=ROOT, check=True)
    seconds = time.monotonic() - begin
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in found if row.get("split") == "validation"][-1]
    losses = [{"name": "tokens", "held_out": last.get("loss/tokens", last["loss"]), "chance": unigram(config)}]
    losses += [
        {"name": part, "held_out": last[f"loss/{part}"], "chance": math.log(2)}
        for part in loss_parts(config.model)
        if part != "tokens"
    ]
    return {"layout": layout(config), "steps": config.train.steps, "seconds": seconds, "losses": losses}


def unigram(config: Config) -> float:
    """Entropy, in nats, of the held-out targets: no distribution without context predicts them better."""
    counts = np.zeros(check_data(config), np.int64)
    for m in validation(config, vocab_size=len(counts), data_rank=0, data_size=1):
        counts += np.bincount(m.targets[m.weights > 0].numpy(), minlength=len(counts))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def layout(config: Config) -> str:
    """The axes that are cut."""
    grid = config.parallel
    sizes = {"TP": grid.tensor, "PP": grid.pipeline, "DP": grid.data, "CP": grid.context}
    return " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1) or "1 rank"


def lines(rows: dict[str, dict]) -> list[str]:
    """Rows of the table."""
    made = []
    for name, row in sorted(rows.items()):
        for loss in row["losses"]:
            better = "below" if loss["held_out"] < CLEARLY * loss["chance"] else "not shown"
            made.append(
                f"| `{name}` | {row['layout']} | {row['steps']} | {row['seconds']:.0f} | "
                f"{loss['name']} | {loss['held_out']:.3f} | {loss['chance']:.3f} | {better} |"
            )
    return made


if __name__ == "__main__":
    raise SystemExit(main())
