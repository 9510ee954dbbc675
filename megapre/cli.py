"""The verbs of ``megapre``. Each imports what it needs itself, so that a bad job is refused without torch.

Exit codes: 0 done, 2 refused job, 75 stopped early with a checkpoint (requeue), anything else failed.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import megapre
from megapre.config.check import ConfigError, check, world_size
from megapre.config.load import from_toml, load, to_toml
from megapre.config.schema import Config
from megapre.resilience import environment
from megapre.resilience.ranks import ALONE, NodePlan, Ranks, discover, launched_world
from megapre.resilience.signals import STOP_SIGNALS, StopRequest
from megapre.resilience.worker import BAD_JOB, DONE, FAILED, STOPPED, is_refusal, sentence

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
PROBED = 1 << 16
"""Bytes that a run's folder must take before the run begins."""
LOCAL_RANK_VARIABLES = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; ``argv`` None means the command line."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not (hasattr(args, "overrides") and all(re.match(r"[a-z_]+\.[a-z_]+=", word) for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse stops collecting overrides at the first option
        args.overrides += rest
    args.from_shell = argv is None
    try:
        return int(args.verb(args))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        if not sentence(error):
            raise
        if _speaks(error):
            print(sentence(error), file=sys.stderr, flush=True)
        return BAD_JOB if is_refusal(error) else FAILED


def train(args: argparse.Namespace) -> int:
    """``megapre train``: as a rank of a launch, alone in this process, or as the supervisor of local ranks."""
    stop = StopRequest().install()
    config, plan = read_job(args.job, args.overrides)
    if plan is None and world_size(config) == 1:
        plan = ALONE
    if isinstance(plan, Ranks) and args.from_shell:
        _with_environment(config, plan)

    from megapre.data.check import check_data
    from megapre.data.stage import stage
    from megapre.monitor.metrics import check_sinks

    check_sinks(config)
    check_data(config)
    check_start(config)
    if not stage(config, stop.requested, lambda line: print(f"megapre: {line}", flush=True)):
        return STOPPED
    if isinstance(plan, Ranks):
        from megapre.train import run

        return run(config, plan, stop, profile=args.profile)

    from megapre.resilience.launcher import launch
    from megapre.resilience.peers import launch_name, shared_secret

    # Ranks get the job as it was read: an edit of the file must not reach half of them, or a restart.
    job = [to_toml(config), *(["--profile"] if args.profile else [])]
    node = plan or NodePlan(world_size(config), 1, 0, world_size(config), ALONE.address, 0)
    return launch(
        node.world,
        train_rank,
        job,
        nnodes=node.nodes,
        node_rank=node.node,
        address=node.address,
        port=node.port,
        max_restarts=config.resilience.max_restarts,
        threads=config.train.threads,
        preload=("megapre.train",),
        heartbeat=config.resilience.heartbeat,
        timeout=config.resilience.timeout,
        log=Path(config.train.run_dir) / "log",
        secret=shared_secret(Path(config.train.run_dir), node.node, launch_name(os.environ)) if node.nodes > 1 else b"",
        stop=stop,
    )


def check_start(config: Config) -> None:
    """ConfigError when the run would start from a checkpoint that is not there, or cannot write in its folder."""
    load, own = Path(config.checkpoint.load), Path(config.train.run_dir) / "checkpoints"
    if config.checkpoint.load and not load.is_dir() and not (config.checkpoint.resume and own.is_dir()):
        raise ConfigError(f"checkpoint.load names {str(load)!r}, which is no folder: name a checkpoint, .../step_N")
    try:
        Path(config.train.run_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=config.train.run_dir) as file:
            file.write(bytes(PROBED))
            file.flush()
    except OSError as error:
        raise ConfigError(
            f"train.run_dir = {config.train.run_dir!r} takes no {PROBED} bytes on {socket.gethostname()} "
            f"({error.strerror}): make it writable, make room, or set another"
        ) from None


def train_rank(argv: list[str]) -> int:
    """One rank under our launcher; ``argv`` holds the resolved job as TOML text, and perhaps ``--profile``."""
    stop = StopRequest().install()
    config = from_toml(argv[0])
    ranks = discover(os.environ, world_size(config))
    assert isinstance(ranks, Ranks), "the launcher sets torchrun's variables"
    from megapre.train import run

    return run(config, ranks, stop, profile="--profile" in argv[1:])


def read_job(path: str, overrides: Sequence[str]) -> tuple[Config, Ranks | NodePlan | None]:
    """Load and check a job against the launch this process belongs to; None when it was started alone."""
    config = load(path, overrides)
    config = check(config, launched_world(os.environ) if config.parallel.data == 0 else None)
    plan = discover(os.environ, world_size(config))
    return (check(config, plan.world) if plan else config), plan


def doctor(args: argparse.Namespace) -> int:
    """``megapre doctor``: whether this node is fit, and with a job how fast its ranks compute and communicate."""
    for option in ("mib", "write", "read", "gpus"):
        if not getattr(args, option) >= (option == "mib"):
            raise ConfigError(f"--{option} must be at least {int(option == 'mib')}, not {getattr(args, option)}")
    if args.only == "ranks" and not args.job:
        raise ConfigError("--only ranks measures those of a job: name its file")
    config, plan = read_job(args.job, args.overrides) if args.job else (None, None)
    from megapre.resilience.doctor.run import main as run

    return run(config, plan, args.mib, (args.write, args.read), args.gpus, args.only)


def verify(args: argparse.Namespace) -> int:
    """``megapre verify``: every layout against the unsharded fp64 reference."""
    if args.ranks < 1:
        raise ConfigError(f"--ranks must be at least 1, not {args.ranks}")
    config = check(load(args.job, args.overrides))
    from megapre.verify.table import main as run

    return run(config, args.layouts, args.ranks, seed=args.seed, full_size=args.full_size, processes=args.processes)


def trace(args: argparse.Namespace) -> int:
    """``megapre trace``: one rank of the job's grid, of any size, on this CPU without its memory."""
    config = check(load(args.job, args.overrides))
    from megapre.verify.trace import main as run

    return run(config, args.rank, args.json)


def plan(args: argparse.Namespace) -> int:
    """``megapre plan``: memory, time and cost of a job on devices that are not here, and the best layout."""
    from megapre.planner.run import Request
    from megapre.planner.run import main as run

    names = ("gpu", "gpus", "search", "write", "html", "tokens", "price", "runs", "scaling", "json")
    return run(args.job, args.overrides, Request(**{name: getattr(args, name) for name in names}))


def kernels(args: argparse.Namespace) -> int:
    """``megapre kernels``: the versions of every op, which one runs here, and why another does not."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from megapre.kernels.registry import rows

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = rows(torch.device(device), getattr(torch, DTYPES[args.dtype]))
    table = Table(title=f"kernels for {args.dtype} on {device}")
    for column in found[0]:
        table.add_column(column)
    marks = {True: "yes", False: "no"}
    for row in found:
        style = "bold" if row["picked"] else "" if row["usable"] else "dim"
        table.add_row(*(marks[v] if isinstance(v, bool) else str(v) for v in row.values()), style=style)
    Console().print(table)
    return DONE


def generate(args: argparse.Namespace) -> int:
    """``megapre generate``: text from a checkpoint."""
    for name, wrong in (
        ("--tokens must be at least 1", args.tokens < 1),
        ("--temperature must be at least 0", not args.temperature >= 0),
        ("--top-k must be at least 0", args.top_k < 0),
        ("--top-p must be greater than 0 and at most 1", not 0 < args.top_p <= 1),
    ):
        if wrong:
            option = name.split()[0]
            raise ConfigError(f"{name}, not {getattr(args, option.strip('-').replace('-', '_'))}")
    from megapre.evaluation.generate import main as run

    return run(
        args.checkpoint,
        args.prompt,
        tokens=args.tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        tokenizer=args.tokenizer,
    )


def checkpoint_list(args: argparse.Namespace) -> int:
    """``megapre checkpoint list``: steps of a run folder and what a quick look finds."""
    from megapre.checkpoint.store import list_checkpoints

    root = _checkpoints(args.dir)
    entries = list_checkpoints(root)
    if not entries:
        print(f"no checkpoints in {root}")
    for entry in entries:
        print(f"step {entry.step:>9}  {entry.path}  {entry.problem or 'ok'}")
    return DONE


def checkpoint_check(args: argparse.Namespace) -> int:
    """``megapre checkpoint check``: every checksum of one checkpoint, or of each finished one in a run folder."""
    from megapre.checkpoint.store import check as check_checkpoint
    from megapre.checkpoint.store import list_checkpoints

    root = _checkpoints(args.dir)
    paths = [entry.path for entry in list_checkpoints(root) if entry.finished] or [root]
    code = DONE
    for path in paths:
        problems = check_checkpoint(path)
        code = FAILED if problems else code
        for problem in problems or [f"{path}: ok"]:
            print(problem)
    return code


def _checkpoints(text: str) -> Path:
    """The folder of checkpoints that the user means: itself, or that of a run folder."""
    path = Path(text)
    if not path.is_dir():
        raise ConfigError(f"{text} is not a folder")
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def _with_environment(config: Config, ranks: Ranks) -> None:
    """Start this process anew under `environment.prepare`, once, before torch is loaded."""
    if not environment.uses_glibc() or "GLIBC_TUNABLES" in os.environ:
        return
    env = dict(os.environ)
    threads = environment.threads_per_rank(config.train.threads, ranks.local_world, env)
    environment.prepare(env, threads, single_host=ranks.local_world == ranks.world)
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    environment.restart_with(env)


def _speaks(error: Exception) -> bool:
    """Whether this rank prints a refusal: rank 0 what all share, one rank a host what a host may have alone."""
    names = RANK_VARIABLES if isinstance(error, ConfigError) else LOCAL_RANK_VARIABLES
    return all(os.environ.get(name, "0") == "0" for name in names)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megapre", description="Pretraining of language models.")
    parser.add_argument("--version", action="version", version=f"megapre {megapre.__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, function: object, text: str, job: bool = False) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=text)
        added.set_defaults(verb=function)
        if job:
            added.add_argument("job", metavar="JOB.toml", help="the job file")
            added.add_argument("overrides", nargs="*", metavar="table.key=value", help="settings over the file's")
        return added

    added = verb("train", train, "train a job, alone or as a rank of torchrun, Slurm or Open MPI", job=True)
    added.add_argument("--profile", action="store_true", help="write RUN_DIR/profile: time by phase, and a trace")
    added = verb("doctor", doctor, "examine this node: driver, GPUs, network, file system, limits")
    added.add_argument("job", metavar="JOB.toml", nargs="?", help="also measure the job's ranks and axes")
    added.add_argument("overrides", nargs="*", metavar="table.key=value", help="settings over the file's")
    added.add_argument("--only", choices=("node", "ranks"), default="", help="with a job: one half of it")
    added.add_argument("--gpus", type=int, default=0, help="GPUs that must be there (default: as many as there are)")
    added.add_argument("--mib", type=int, default=256, help="MiB to write and read (default: 256)")
    added.add_argument("--write", type=float, default=0.0, help="least write rate in MiB/s (default: any)")
    added.add_argument("--read", type=float, default=0.0, help="least read rate in MiB/s (default: any)")
    added = verb("verify", verify, "prove a job's layouts equal to an unsharded fp64 reference", job=True)
    added.add_argument("--layouts", default="pairs", help="'all', 'pairs' (few that hold every pair of options; the "
                       "default), or TPxPPxDP with options, separated by commas")  # fmt: skip
    added.add_argument("--ranks", type=int, default=4, help="most ranks of a layout of 'all' and 'pairs' (default: 4)")
    added.add_argument("--seed", type=int, default=0, help="draws the layouts of 'pairs' and the made-up batches")
    added.add_argument("--full-size", action="store_true", help="the job's own model, not one scaled down")
    added.add_argument("--processes", action="store_true", help="ranks as processes, as in training, not as threads")
    added = verb("trace", trace, "peak memory and bytes sent of one rank of any grid, without GPUs", job=True)
    added.add_argument("--rank", type=int, default=0, help="the rank to trace (default: 0)")
    added.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    added = verb("plan", plan, "predict memory, speed and cost, or search the best layout, without GPUs", job=True)
    added.add_argument("--gpu", default="h100", help="device, or the path of a profile.toml (default: h100)")
    added.add_argument("--gpus", type=int, default=0, help="number of devices (default: the ranks of the job)")
    added.add_argument("--search", action="store_true", help="rank all layouts on --gpus devices and take the best")
    added.add_argument("--write", default="", metavar="JOB.toml", help="write the planned job there")
    added.add_argument("--html", default="", metavar="FILE", help="write a page with charts there")
    added.add_argument("--tokens", type=float, default=0.0, help="tokens of the run (default: those of train.steps)")
    added.add_argument("--price", type=float, default=0.0, help="dollars per device hour (default: the profile's)")
    added.add_argument("--scaling", action="store_true", help="also print compute-optimal model sizes")
    added.add_argument("--runs", nargs="+", default=[], metavar="RUN_DIR", help="small runs to fit a scaling law to")
    added.add_argument("--json", action="store_true", help="print one JSON object")
    added = verb("kernels", kernels, "list the versions of every op and which one runs here")
    added.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda when there is one")
    added.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    added = verb("generate", generate, "continue a prompt with a checkpoint's model")
    added.add_argument("checkpoint", metavar="CKPT", help="a checkpoint, RUN_DIR/checkpoints/step_N")
    added.add_argument("--prompt", required=True)
    added.add_argument("--tokens", type=int, default=64, help="tokens to generate (default: 64)")
    added.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)")
    added.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest; 0: all")
    added.add_argument("--top-p", type=float, default=1.0, help="sample among the likeliest of this total share")
    added.add_argument("--seed", type=int, default=1)
    added.add_argument("--tokenizer", default="", help="tokenizer file; default: the job's")
    inner = verbs.add_parser("checkpoint", help="look at checkpoints").add_subparsers(metavar="ACTION", required=True)
    for name, function, text in (
        ("list", checkpoint_list, "list the checkpoints of a run"),
        ("check", checkpoint_check, "verify every checksum of a checkpoint, or of all in a run"),
    ):
        added = inner.add_parser(name, help=text, description=text)
        added.add_argument("dir", metavar="DIR", help="RUN_DIR or a checkpoint")
        added.set_defaults(verb=function)
    return parser
