"""Which settings of a job are fastest here: a short timed run of each combination, ranked by tokens/s and memory.

    python benchmarks/sweep.py JOB.toml --vary parallel.tensor=1,2,4 train.microbatch=1,2,4 [--set table.key=value ...]
        [--steps 10] [--output runs/sweep/JOB] [--timeout 900]

Every combination runs ``megapre train`` in a folder of its own; its speed is the median of ``tokens_per_s`` after the
warm-up, its memory the peak of rank 0 (of its device, else of its process). A combination that the checks refuse is
listed with their sentence and never started. Started again, it goes on where it was; failed runs are tried again.
OUTPUT/sweep.csv and OUTPUT/sweep.html (charts need plotly) hold all that has run so far.

Inside a Slurm job every run is one ``srun`` over the job's nodes, with one supervisor on each. In an array
(``sbatch --array=0-3 --wrap "python benchmarks/sweep.py ..."``) the tasks share the combinations out among them.
"""

from __future__ import annotations

import argparse
import csv
import html
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megapre.config.check import ConfigError, check, world_size  # noqa: E402
from megapre.config.load import load  # noqa: E402

Result = dict[str, Any]
COLUMNS = ("status", "ranks", "tokens_per_s", "step_ms", "mfu", "memory_gib", "loss", "reason")
OVERRIDE = re.compile(r"[a-z_]+\.[a-z_0-9]+=.+")
SHORT = (
    "schedule.kind=constant", "schedule.warmup=0", "train.batch_ramp=[]", "train.sequence_ramp=[]",
    "train.eval_samples=0", "train.eval_interval=0", "checkpoint.interval=0", "checkpoint.minutes=0.0",
    "monitor.interval=1", "monitor.tensorboard=false", "monitor.wandb=",
)  # fmt: skip
"""What makes a job a short run at full size: no warm-up, ramp, validation or checkpoint on the way."""
LEAST_STEPS = 2
"""Steps that must be left after the warm-up."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, metavar="JOB.toml")
    parser.add_argument("--vary", nargs="+", required=True, metavar="table.key=a,b,...")
    parser.add_argument("--set", nargs="+", default=[], metavar="table.key=value", help="settings of every run")
    parser.add_argument("--steps", type=int, default=10, help="steps of a run, warm-up included (default 10)")
    parser.add_argument("--output", type=Path, help="folder of the results (default: runs/sweep/JOB)")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds after which a run is ended (default 900)")
    args = parser.parse_args(argv)
    output = args.output or Path("runs/sweep") / args.job.stem
    try:
        warmup = load(args.job, args.set).monitor.warmup_steps
        if args.steps < warmup + LEAST_STEPS:
            raise ConfigError(
                f"--steps {args.steps} leaves nothing after monitor.warmup_steps = {warmup}: give at least "
                f"{warmup + LEAST_STEPS}"
            )
        trials = combinations(args.vary)
    except ConfigError as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    for settings in mine(trials, os.environ):
        folder = output / "trials" / name(settings)
        known = read(folder)
        if known is None or known["status"] == "failed":
            known = trial(args.job, [*args.set, *settings], folder, args.steps, args.timeout)
            known["settings"] = settings
            write(folder / "result.json", json.dumps(known, indent=1) + "\n")
        print(f"{' '.join(settings)}: {told(known)}", flush=True)
    found = rank([known for settings in trials if (known := read(output / "trials" / name(settings)))])
    keys = [option.partition("=")[0] for option in args.vary]
    write(output / "sweep.csv", as_csv(found, keys))
    print("\n" + "\n".join(as_table(found, keys)))
    if importlib.util.find_spec("plotly") is None:
        print("sweep: no page, as plotly is not installed: pip install megapre[plan]", file=sys.stderr)
    else:
        write(output / "sweep.html", page(f"{args.job.name}: {len(found)} of {len(trials)} runs", found, keys))
    return 0


def combinations(vary: Sequence[str]) -> list[list[str]]:
    """Every combination, as overrides. A comma inside brackets belongs to the value."""
    options = []
    for option in vary:
        key, equals, values = option.partition("=")
        if not equals or not OVERRIDE.fullmatch(option):
            raise ConfigError(f"--vary takes table.key=a,b,..., not {option!r}")
        options.append([f"{key}={value}" for value in re.split(r",(?![^\[]*\])", values)])
    return [list(chosen) for chosen in itertools.product(*options)]


def mine(trials: list[list[str]], env: Mapping[str, str]) -> list[list[str]]:
    """All, or those of this task of a Slurm array."""
    if "SLURM_ARRAY_TASK_ID" not in env:
        return trials
    task, first, count = (int(env[f"SLURM_ARRAY_TASK_{x}"]) for x in ("ID", "MIN", "COUNT"))
    return trials[task - first :: count]


def name(settings: Sequence[str]) -> str:
    """A folder's name."""
    return re.sub(r"[^\w=.,+-]", "_", ",".join(settings))


def trial(job: Path, overrides: list[str], folder: Path, steps: int, timeout: float) -> Result:
    """Run one combination; what came of it."""
    run_dir = folder / "run"
    overrides = [*overrides, *SHORT, f"train.steps={steps}", f"train.run_dir={run_dir}"]
    try:
        config = check(load(job, overrides))
    except ConfigError as error:
        return {"status": "refused", "reason": str(error)}
    ranks = world_size(config)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    log = folder / "log.txt"
    command = [*launcher(ranks, os.environ), sys.executable, "-m", "megapre", "train", str(job), *overrides]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    with open(log, "wb") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"status": "failed", "ranks": ranks, "reason": f"not done after {timeout:.0f} s"}
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    if code:
        lines = log.read_text(errors="replace").strip().splitlines() or ["without a word"]
        said = next((line for line in reversed(lines) if line.startswith("megapre: ")), lines[-1])
        if code == 2:
            return {"status": "refused", "ranks": ranks, "reason": said.removeprefix("megapre: ")}
        return {"status": "failed", "ranks": ranks, "reason": f"exit code {code}: {said[:300]}"}
    return {"status": "ok", "ranks": ranks, **figures(run_dir / "metrics.jsonl")}


def launcher(ranks: int, env: Mapping[str, str]) -> list[str]:
    """What starts a run: nothing, or srun with one supervisor a node."""
    if "SLURM_JOB_ID" not in env:
        return []
    nodes = min(int(env.get("SLURM_JOB_NUM_NODES", env.get("SLURM_NNODES", "1"))), ranks)
    return ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none"]


def figures(metrics: Path) -> Result:
    """Medians over the steps after the warm-up."""
    steps = [line for line in map(json.loads, metrics.read_text().splitlines()) if line.get("split") == "train"]
    timed = [line for line in steps if "tokens_per_s" in line]
    found: Result = {key: statistics.median(line[key] for line in timed if key in line)
                     for key in ("tokens_per_s", "step_ms", "mfu") if any(key in line for line in timed)}  # fmt: skip
    memory = "device_peak_gib" if "device_peak_gib" in steps[-1] else "host_peak_gib"
    return {**found, "memory_gib": max(line.get(memory, 0.0) for line in steps), "loss": steps[-1]["loss"]}


def told(result: Result) -> str:
    if result["status"] != "ok":
        return f"{result['status']}: {result['reason']}"
    return f"{result['tokens_per_s']:,.0f} tokens/s, {result['memory_gib']:.2f} GiB"


def read(folder: Path) -> Result | None:
    """The result in a folder; None where there is none yet."""
    try:
        found: Result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    return found


def write(path: Path, text: str) -> None:
    """Under its name only when complete: the tasks of an array write the same tables."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def rank(results: list[Result]) -> list[Result]:
    """Fastest first, of equals the one with less memory; then what was refused, then what failed."""
    order = {"ok": 0, "refused": 1, "failed": 2}
    return sorted(results, key=lambda r: (order[r["status"]], -r.get("tokens_per_s", 0.0), r.get("memory_gib", 0.0)))


def cells(result: Result, keys: Sequence[str]) -> list[Any]:
    """The values of ``keys``, then `COLUMNS`."""
    settings = dict(setting.split("=", 1) for setting in result["settings"])
    return [settings.get(key, "") for key in keys] + [result.get(column, "") for column in COLUMNS]


def shown(result: Result, keys: Sequence[str]) -> list[str]:
    """As text, numbers in four figures."""
    return [f"{x:.4g}" if isinstance(x, float) else str(x) for x in cells(result, keys)]


def as_csv(results: list[Result], keys: Sequence[str]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*keys, *COLUMNS])
    writer.writerows(cells(result, keys) for result in results)
    return file.getvalue()


def as_table(results: list[Result], keys: Sequence[str]) -> list[str]:
    """Markdown."""
    rows = [shown(result, keys) for result in results]
    return [f"| {' | '.join(row)} |" for row in ([*keys, *COLUMNS], ["---"] * (len(keys) + len(COLUMNS)), *rows)]


def page(title: str, results: list[Result], keys: Sequence[str]) -> str:
    """Speed of every run, speed against memory, and the table, in one file that loads nothing."""
    from plotly.offline import get_plotlyjs

    from megapre.planner.page import STYLE, _chart, _figure

    done = [result for result in results if result["status"] == "ok"]
    names = [" ".join(result["settings"]) for result in done]
    speed, memory = ([result[key] for result in done] for key in ("tokens_per_s", "memory_gib"))
    bars = _figure("", xaxis_title="tokens/s", showlegend=False)
    bars.add_bar(x=speed, y=names, orientation="h", marker_color="#4269d0")
    bars.update_yaxes(autorange="reversed", automargin=True)
    points = _figure("tokens/s", xaxis_title="GiB, peak of rank 0", showlegend=False)
    points.add_scatter(mode="markers", x=memory, y=speed, text=names, marker={"size": 10, "color": "#4269d0"})
    lines = [[*keys, *COLUMNS], *(shown(result, keys) for result in results)]
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in lines)
    charts = f"<h2>Speed</h2>{_chart(bars)}<h2>Speed against memory</h2>{_chart(points)}" if done else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n<script>{get_plotlyjs()}</script></head>\n<body><h1>{html.escape(title)}</h1>\n"
        f'{charts}<h2>Runs</h2><div class="scroll"><table>{rows}</table></div></body></html>\n'
    )


if __name__ == "__main__":
    sys.exit(main())
