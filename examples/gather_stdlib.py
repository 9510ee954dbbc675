"""Write this machine's Python standard library as JSON lines: python examples/gather_stdlib.py --output X.jsonl."""

import argparse
import json
import random
import sysconfig
from pathlib import Path


def main() -> int:
    """One line per source file, shuffled from a fixed seed so that training and validation are alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--megabytes", type=float, default=12.0, help="stop after this much text")
    args = parser.parse_args()
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests"}
    files = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    random.Random(0).shuffle(files)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    size = count = 0
    with open(args.output, "w", encoding="utf-8") as out:
        for path in files:
            text = path.read_text(encoding="utf-8", errors="ignore")
            if not text.strip():
                continue
            out.write(json.dumps({"text": text}) + "\n")
            size, count = size + len(text), count + 1
            if size > args.megabytes * 1e6:
                break
    print(f"{args.output}: {count} files, {size / 1e6:.1f} MB of text")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
