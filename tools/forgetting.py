"""What a run has learnt and forgotten: held-out loss on each of its paths, before its first step and after its last.

python tools/forgetting.py RUN_DIR [RUN_DIR ...]

Runs with train.eval_first and train.eval_by_path. Prints a Markdown table, a row for each run and path.
"""

import argparse
import json
import sys
from pathlib import Path

PREFIX = "loss_on/"


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 a run that does not tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, nargs="+")
    args = parser.parse_args(argv)
    try:
        print("\n".join(table({str(folder): folder for folder in args.run_dir})))
    except (ValueError, OSError) as error:
        print(f"forgetting: {error}", file=sys.stderr)
        return 2
    return 0


def table(runs: dict[str, Path]) -> list[str]:
    """Lines of the table of runs by name."""
    lines = ["| run | held-out text | before | after | change |", "|---|---|--:|--:|--:|"]
    for run, folder in runs.items():
        for name, (before, after) in losses(folder).items():
            lines.append(f"| {run} | {name} | {before:.3f} | {after:.3f} | {after - before:+.3f} |")
    return lines


def losses(run_dir: Path) -> dict[str, tuple[float, float]]:
    """Held-out loss on each path before the first step and at the last validation; ValueError where there is none."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("split") == "validation"]
    names = [key.removeprefix(PREFIX) for key in (rows[-1] if rows else {}) if key.startswith(PREFIX)]
    if not names or rows[0]["step"] != 0 or rows[-1]["step"] == 0:
        raise ValueError(f"{run_dir} has no loss of each path from step 0 on: set train.eval_first and eval_by_path.")
    found = {name: (rows[0].get(PREFIX + name), rows[-1][PREFIX + name]) for name in names}
    missing = [name for name, values in found.items() if None in values]
    if missing:
        raise ValueError(f"{run_dir} has no finite loss on {missing[0]} before and after.")
    return found


if __name__ == "__main__":
    sys.exit(main())
