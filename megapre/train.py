"""A pretraining run, from a job file's config to an exit code. Read this first.

config -> ranks -> grid -> engine (spec, layout, buffers, layers, step) -> data -> checkpoint -> loop. Next:
``training/step.py``, ``parallel/pipeline/executor.py``, ``parallel/buckets.py``, ``models/spec.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megapre.checkpoint import store
from megapre.config.load import to_toml
from megapre.config.schema import Config
from megapre.data.check import check_data
from megapre.data.loader import Loader, validation
from megapre.kernels.registry import report
from megapre.monitor.fingerprint import differences, fingerprint
from megapre.monitor.metrics import Monitor
from megapre.monitor.throughput import Throughput
from megapre.resilience.connect import connected
from megapre.resilience.ranks import Ranks
from megapre.resilience.signals import StopRequest
from megapre.training.engine import Engine, build
from megapre.training.trainer import HostSync, Trainer, restore


def run(config: Config, ranks: Ranks, stop: StopRequest) -> int:
    """Train ``config`` as one rank of a launch; returns the exit code (0 done, 75 stopped with a checkpoint)."""
    vocab_size = check_data(config)
    with connected(config, ranks) as (grid, device):
        engine = build(config, grid, device, vocab_size)
        main = grid.world.rank == 0
        run_dir = Path(config.train.run_dir)
        if main:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "job.toml").write_text(to_toml(config))
        monitor = Monitor(config, run_dir, active=main)
        for line in report(engine.kernels, device):
            monitor.text(line)
        start = resume(config, engine, monitor.text)
        monitor.started(start)
        data_rank, data_size = grid.data.rank, grid.data.size
        loader = Loader(config, vocab_size=vocab_size, data_rank=data_rank, data_size=data_size, start_step=start)
        try:
            trainer = Trainer(
                config,
                engine.step,
                loader,
                validation(config, vocab_size=vocab_size, data_rank=data_rank, data_size=data_size),
                monitor,
                Throughput(config, vocab_size, grid.world.size, device.type),
                stop.requested,
                start,
            )
            return trainer.run()
        finally:
            if streamed := loader.report():
                monitor.text(streamed)
            loader.close()
            monitor.close()


def resume(config: Config, engine: Engine, say: Callable[[str], None]) -> int:
    """Load the newest valid checkpoint of the run (else ``checkpoint.load``); returns the step to run next."""
    sync = HostSync(engine.grid.host)
    found = ""
    if config.checkpoint.resume and engine.grid.world.rank == 0:
        newest = store.newest_valid(Path(config.train.run_dir) / "checkpoints", log=say)
        found = str(newest) if newest else ""
    found = sync.broadcast_text(found) or config.checkpoint.load
    if not found:
        return 0
    state = restore(Path(found), config, engine.step)
    say(f"resumed from {found} at step {state['step']}")
    changed = differences(state.get("environment", {}), fingerprint(config))
    if changed:
        say(f"the environment is not the checkpoint's, so the run may not be bitwise the same: {changed}")
    return int(state["step"])
