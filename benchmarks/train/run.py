"""megapre against other training stacks, step by step in turn, on the jobs J1 and J2.

    python benchmarks/train/run.py [--jobs J1 J2] [--dtypes bf16 fp32] [--threads 1 2] [--steps 10] [--write]

Every stack is a process of its own under the launcher's allocator settings. All begin with the same weights and read
the same batches at the same learning rates; a driver lets one of them at a time take one step, in an order that turns
with the rounds, and between its turns a process sleeps. megapre is ``megapre train`` (``ours.py``), the peers are in
``peers.py`` and run in ``build/bench`` (``make bench-env``) where that is there. Ratios above 1 mean that megapre needs
less, as median and quartiles of the rounds' ratios. Where the losses of one step are further apart than rounding can
make them, no speed is printed and the exit code is 1. A peer that the first counted rounds find 1.2 times as slow as
another stops there. ``--write`` puts the tables into docs/performance.md (on a GPU docs/gpu_results.md); ``--quick``
runs a tiny model to see that all of this works.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(ROOT), str(HERE)]

import job  # noqa: E402
import table  # noqa: E402
import torch  # noqa: E402
from turns import Absent, Arm  # noqa: E402

from benchmarks.gemm import processor  # noqa: E402
from benchmarks.kernels import docs  # noqa: E402
from megapre.config.schema import Config  # noqa: E402
from megapre.monitor import throughput  # noqa: E402
from megapre.resilience.environment import prepare  # noqa: E402

JOBS = {"J1": "j1.toml", "J2": "j2.toml", "1B": "llama_1b.toml"}
PEERS = {"plain": "learned", "litgpt": "rope", "transformers": "", "deepspeed": ""}
"""Peers, and the kind of positions without which a peer is no model of the job's shape."""
WARMUP, PROBE, SLOWER = 2, 3, 1.2
"""Rounds not counted (compilation); counted rounds after which peers so many times as slow as the best one stop."""
QUICK = (
    "model.layers=2", "model.hidden=32", "model.heads=2", "model.sequence=32", "model.vocab_size=211",
    "train.global_batch=4", "train.microbatch=2", "optimizer.lr=1e-2",
)  # fmt: skip
QUICK_LLAMA = ("model.kv_heads=1", "model.ffn_hidden=64")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--jobs", nargs="+", choices=tuple(JOBS), default=list(JOBS) if gpu else ["J1", "J2"])
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=["bf16", "fp32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1] if gpu else [1, 2])
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks of every stack")
    parser.add_argument("--steps", type=int, default=10, help="counted steps (default 10)")
    parser.add_argument("--peers", nargs="*", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--python", default="", help="Python of the peers (default: build/bench, else this one)")
    parser.add_argument("--eager", action="store_true", help="peers without torch.compile")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench", help="folder for data, weights, logs")
    parser.add_argument("--quick", action="store_true", help="a tiny model, peers without torch.compile")
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    args = parser.parse_args()
    code = 0
    print("\n".join(heading()), flush=True)
    for name in args.jobs:
        for dtype in args.dtypes:
            for threads in args.threads:
                found, text = compare(args, name, dtype, threads)
                print(text, flush=True)
                code |= found
                if args.write and table.HEAD[0] in text:
                    write(f"{name} {dtype} {threads} {args.ranks}", text)
    return code


def compare(args: argparse.Namespace, name: str, dtype: str, threads: int) -> tuple[int, str]:
    """One section of the page: exit code and text."""
    overrides = [f"precision.dtype={dtype}", f"train.threads={threads}", f"parallel.data={args.ranks}"]
    tiny = [*QUICK, *(QUICK_LLAMA if name != "J1" else ())] if args.quick else []
    train = job.load(HERE / JOBS[name], tiny).train
    overrides.append(f"train.microbatch={min(train.microbatch, train.global_batch // args.ranks)}")
    config = job.read(HERE / JOBS[name], args.work, [*tiny, *overrides])
    cell = table.Cell(
        name, dtype, threads, args.ranks, config.train.global_batch * config.model.sequence, job.step_flops(config)
    )
    if torch.cuda.is_available():
        cell.peak = throughput.data_sheet_peak(torch.cuda.get_device_name(), dtype) * 1e12 * args.ranks
    arms, ceiling = start(args, cell, config, [*tiny, *overrides])
    try:
        if "megapre" in arms:
            run(cell, arms, ceiling, args.steps)
        if "megapre" not in arms:
            return 1, section(cell, [f"megapre: {cell.absent.get('megapre', 'is not there')}"])
        ours = arms.pop("megapre")
        tracking, wrong = table.judge(cell, ours, list(arms.values()))
        lines = [f"{peer}: {why}" for peer, why in cell.absent.items()] + wrong
        shown = table.rows(cell, ours, tracking, ceiling) if tracking else []
        return int(bool(wrong)), section(cell, [*shown, "", *lines])
    finally:
        for arm in [*arms.values(), *([ceiling] if ceiling else [])]:
            arm.close()


def start(
    args: argparse.Namespace, cell: table.Cell, config: Config, overrides: list[str]
) -> tuple[dict[str, Arm], Arm | None]:
    """Every arm that can take part, one after the other, and the ceiling's where there is no GPU."""
    work = args.work / f"{cell.job}-{cell.dtype}-{cell.threads}-{cell.ranks}"
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(config.train.run_dir, ignore_errors=True)
    work.mkdir(parents=True)
    python = args.python or next((str(p) for p in [ROOT / "build/bench/bin/python"] if p.exists()), sys.executable)
    steps = WARMUP + args.steps
    spec = job.peer_spec(config, work, steps, not (args.quick or args.eager), port())
    (work / "spec.json").write_text(job.json.dumps(spec))
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_CACHE_DIR": str(args.work / "inductor")}
    prepare(env, cell.threads, single_host=True)
    paths = [f'data.paths=["{config.data.paths[0]}"]', f"train.run_dir={config.train.run_dir}"]
    commands = {"megapre": [sys.executable, HERE / "ours.py", HERE / JOBS[cell.job], *overrides, *paths]}
    commands |= {peer: [python, HERE / "peers.py", peer, work / "spec.json"] for peer in args.peers
                 if PEERS[peer] in ("", config.model.positions)}  # fmt: skip
    arms: dict[str, Arm] = {}
    for name, command in commands.items():
        try:
            if not torch.cuda.is_available():
                enough(job.memory_needed(config) * cell.ranks)
            arms[name] = Arm(name, list(map(str, command)), env, work / name, cell.ranks, port())
        except Absent as why:
            cell.absent[name] = str(why)
    if torch.cuda.is_available():
        return arms, None
    command = [sys.executable, HERE / "ceiling.py", cell.dtype, cell.threads * cell.ranks]
    return arms, Arm("ceiling", list(map(str, command)), env, work / "ceiling")


def run(cell: table.Cell, arms: dict[str, Arm], ceiling: Arm | None, steps: int) -> None:
    """All rounds. An arm that fails leaves; so do peers that are clearly slower than another, after `PROBE` rounds."""
    for index in range(WARMUP + steps):
        print(f"{cell.name}: round {index + 1} of {WARMUP + steps}", file=sys.stderr, flush=True)
        names = [*arms, *(["ceiling"] if ceiling else [])]
        for name in names[index % len(names) :] + names[: index % len(names)]:
            try:
                arm = ceiling if ceiling and name == "ceiling" else arms[name]
                arm.turn(reset=index == WARMUP, counted=index >= WARMUP)
            except Absent as why:
                arms.pop(name).close()
                cell.absent[name] = str(why)
        if "megapre" not in arms:
            return
        if index == WARMUP + PROBE - 1:
            times = {name: table.median(arm.counted("cpu")) for name, arm in arms.items() if name != "megapre"}
            for name, time in times.items():
                if time > SLOWER * min(times.values()):
                    arms[name].stop()


def enough(needed: int) -> None:
    """Raise `Absent` where the machine has less memory free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            free = int(line.split()[1]) * 1024
    if free < needed:
        raise Absent(f"needs about {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free")


def port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def heading() -> list[str]:
    """The machine, and what it lacks."""
    if torch.cuda.is_available():
        return [f"{torch.cuda.get_device_name()}, torch {torch.__version__}"]
    lacks = "" if "AMX" in processor() else "; without AMX, so that bf16 is no faster than the vector units"
    return [f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}{lacks}"]


def section(cell: table.Cell, lines: list[str]) -> str:
    text = "\n".join([f"**{cell.name}**", "", *lines]).rstrip()
    return "\n" + text


def write(name: str, text: str) -> None:
    """Put a section where the page has it."""
    page = docs.PAGE.with_name("gpu_results.md" if torch.cuda.is_available() else "performance.md")
    docs.write(f"benchmarks/train/run.py {name}", "\n".join([*heading(), text]), page)


if __name__ == "__main__":
    sys.exit(main())
