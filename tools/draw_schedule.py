"""Draw a pipeline schedule as SVG: python tools/draw_schedule.py --schedule zb-h1 --pipeline 4 --output x.svg."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megapre.parallel.pipeline.draw import timeline
from megapre.parallel.pipeline.schedules import SCHEDULES, plans
from megapre.parallel.pipeline.simulate import simulate


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad arguments."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--schedule", choices=tuple(SCHEDULES), default="1f1b")
    parser.add_argument("--pipeline", type=int, default=4, help="pipeline ranks")
    parser.add_argument("--chunks", type=int, default=0, help="stages per rank (default: what the schedule needs)")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--forward", type=float, default=1.0, help="cost of F on one stage")
    parser.add_argument("--backward", type=float, default=0.0, help="cost of B (default: 1 where there is W, else 2)")
    parser.add_argument("--weight", type=float, default=1.0, help="cost of W")
    parser.add_argument("--output", required=True, help="the SVG file")
    args = parser.parse_args(argv)
    chunks = args.chunks or (2 if args.schedule in ("interleaved", "zb-v") else 1)
    fits = args.schedule != "interleaved" or args.microbatches % max(1, args.pipeline) == 0
    if min(args.pipeline, args.microbatches) < 1 or not fits:
        print(
            f"draw_schedule: --microbatches {args.microbatches} and --pipeline {args.pipeline} must be at least 1, and "
            f"interleaved needs a multiple of the ranks.",
            file=sys.stderr,
        )
        return 2
    backward = args.backward or (1.0 if args.schedule.startswith("zb") else 2.0)
    made = plans(args.schedule, args.pipeline, chunks, args.microbatches)
    prediction = simulate(made, args.forward, backward, args.weight)
    Path(args.output).write_text(timeline(prediction, f"{args.schedule}, {args.pipeline} ranks"))
    print(f"{args.output}: {prediction.time:g} units, bubble {prediction.bubble:.1%}, in flight {prediction.in_flight}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
