"""A pretraining run, from a job file's config to an exit code. Read this first.

config -> ranks -> grid -> engine (spec, layout, buffers, layers, step) -> data -> checkpoint -> loop. Next:
``training/step.py``, ``parallel/pipeline/executor.py``, ``parallel/buckets.py``, ``models/spec.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megapre.checkpoint import store
from megapre.config.load import to_toml
from megapre.config.schema import Config
from megapre.data import native
from megapre.data.check import check_data
from megapre.data.loader import Loader, held_out
from megapre.hub.folder import is_folder
from megapre.kernels.registry import report
from megapre.monitor.fingerprint import differences, fingerprint
from megapre.monitor.metrics import Monitor
from megapre.monitor.profile import Profile
from megapre.monitor.throughput import Throughput
from megapre.parallel import shared
from megapre.resilience import environment
from megapre.resilience.connect import connected, placement
from megapre.resilience.flight import recorded
from megapre.resilience.guard import Guard
from megapre.resilience.lock import run_lock
from megapre.resilience.memory import snapshot_on_exhaustion
from megapre.resilience.pace import Pace, Waits
from megapre.resilience.pulse import Pulse
from megapre.resilience.ranks import Ranks
from megapre.resilience.selftest import selftest
from megapre.resilience.signals import StopRequest
from megapre.training.engine import Engine, build
from megapre.training.profile import observe, profiled
from megapre.training.resume import restore, start_from
from megapre.training.trainer import HostSync, Trainer


def run(config: Config, ranks: Ranks, stop: StopRequest, *, profile: bool = False) -> int:
    """Train ``config`` as one rank of a launch; returns the exit code (0 done, 75 stopped with a checkpoint).

    ``profile``: also write what ``monitor/profile.py`` says.
    """
    vocab_size = check_data(config)
    run_dir = Path(config.train.run_dir)
    with connected(config, ranks) as (grid, device), run_lock(run_dir, grid.world.rank, HostSync(grid.host)):
        messages = shared.report(grid, device)
        pulse = Pulse(os.environ)
        waits = Waits(device)
        grid = recorded(grid, pulse, waits)
        seen = Profile(run_dir / "profile", grid.world.rank, device.type, config.monitor.warmup_steps)
        if profile:
            grid = profiled(seen, grid)
        engine = build(config, grid, device, vocab_size)
        main = grid.world.rank == 0
        if main:
            (run_dir / "job.toml").write_text(to_toml(config))
        monitor = Monitor(config, run_dir, active=main)
        # Of GPUs every rank says where it is bound, in its node's log; ranks on a CPU share their cores.
        if main:
            monitor.text(environment.shown(os.environ))
            monitor.text(placement(ranks, device))
        elif device.type == "cuda":
            print(placement(ranks, device), flush=True)
        for line in [*report(engine.kernels, device), native.missing(), messages]:
            if line:
                monitor.text(line)
        if config.resilience.selftest:
            selftest(grid, device, engine.model.dtype)
        state = resume(config, engine, monitor.text)
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        monitor.started(int(state.get("step", 0)), state.get("monitor"), attempt=attempt, ranks=ranks.world)
        pulse.resumed(int(state.get("step", 0)))
        place: dict[str, Any] = {"vocab_size": vocab_size, "data_rank": grid.data.rank, "data_size": grid.data.size}
        pace = Pace(grid, waits, monitor.text)
        trainer = Trainer(
            config,
            engine.step,
            lambda step, skipped: Loader(config, **place, start_step=step, skipped=skipped),
            held_out(config, **place),
            monitor,
            Throughput(config, vocab_size, grid.world.size, device.type),
            stop.requested,
            Guard(config, engine.step, monitor.text, pace),
            state,
        )
        if profile:
            observe(seen, trainer)
        try:
            with snapshot_on_exhaustion(run_dir / "log", grid.world.rank):
                code = trainer.run()
            monitor.event("end", trainer.done, code=code, signal=stop.reason)
            return code
        except BaseException as error:
            monitor.event("end", trainer.done, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            for line in seen.finish() if profile else []:
                monitor.text(line)
            if streamed := trainer.loader.report():
                monitor.text(streamed)
            trainer.loader.close()
            pace.close()
            monitor.close()


def resume(config: Config, engine: Engine, say: Callable[[str], None]) -> dict[str, Any]:
    """Load the newest valid checkpoint of the run (else ``checkpoint.load``); returns its state, or none."""
    sync = HostSync(engine.grid.host)
    found = ""
    if config.checkpoint.resume and engine.grid.world.rank == 0:
        newest = store.newest_valid(Path(config.train.run_dir) / "checkpoints", log=say)
        found = str(newest) if newest else ""
    found = sync.broadcast_text(found) or config.checkpoint.load
    if not found:
        return {}
    if found == config.checkpoint.load and (config.checkpoint.weights_only or is_folder(Path(found))):
        start_from(Path(found), config, engine.step)
        say(f"starting from the weights of {found}")
        return {}
    state = restore(Path(found), config, engine.step)
    say(f"resumed from {found} at step {state['step']}")
    changed = differences(state.get("environment", {}), fingerprint(config))
    if changed:
        say(f"the environment is not the checkpoint's, so the run may not be bitwise the same: {changed}")
    return state
