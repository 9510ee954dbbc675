"""megapre's arm: ``megapre train`` itself, as a rank of a launch, whose steps wait for the token.

    python ours.py JOB.toml [table.key=value ...]

Only the call of the step is wrapped, so that a turn holds all that a run does between two steps: the step, the loader,
the guard, the metrics.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from turns import Turns, run_arm  # noqa: E402

from megapre import cli  # noqa: E402
from megapre.data.loader import Counts, Microbatch  # noqa: E402
from megapre.training.step import StepResult, TrainStep  # noqa: E402


def take_turns(turns: Turns) -> None:
    """Make every optimizer step of this process wait for its turn."""
    call, last = TrainStep.__call__, []

    def wait_and_step(
        step: TrainStep, microbatches: Sequence[Microbatch], counts: Counts, index: int, lr: float
    ) -> StepResult:
        turns.begin(**({"loss": float(last.pop().loss)} if last else {}))
        last.append(call(step, microbatches, counts, index, lr))
        return last[0]

    TrainStep.__call__ = wait_and_step  # type: ignore[method-assign]


def main(turns: Turns) -> None:
    take_turns(turns)
    sys.exit(cli.main(["train", *sys.argv[1:]]))


if __name__ == "__main__":
    run_arm(main)
