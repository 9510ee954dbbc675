"""The ceiling's arm: the blocks' matrix products into memory that is there already, once a round.

python ceiling.py DTYPE THREADS
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

from turns import Turns, run_arm  # noqa: E402

from benchmarks.gemm import ceiling  # noqa: E402


def main(turns: Turns) -> None:
    dtype, threads, result = sys.argv[1], int(sys.argv[2]), {}
    while True:
        turns.begin(loss=0.0, **result)
        wall, cpu, fastest = ceiling(dtype, threads)
        result = {"rate_wall": wall, "rate_cpu": cpu, "fastest": fastest}


if __name__ == "__main__":
    run_arm(main)
