"""Plan rows for data.packing = "best-fit" or pairs of sentences: python tools/pack_data.py PREFIX --sequence 4096."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megapre.config.schema import DataConfig
from megapre.data.manifest import members
from megapre.data.pack import plan


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad arguments or data."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("prefix", nargs="+", help="prefixes of pairs, or manifests")
    parser.add_argument("--sequence", type=int, required=True, help="tokens a row: model.sequence of the job")
    parser.add_argument("--sentences", action="store_true", help="rows of sentences, for objectives that pair texts")
    parser.add_argument("--split", type=float, nargs="+", default=DataConfig().split, help="data.split of the job")
    args = parser.parse_args(argv)
    try:
        if args.sequence < 1:
            raise ValueError(f"--sequence {args.sequence} must be at least 1.")
        for prefix in (pair for path in args.prefix for pair in members(path)):
            made = plan(prefix, args.sequence, args.split, sentences=args.sentences)
            kind = "sentences" if args.sentences else "pack"
            print(f"{prefix}.{kind}{args.sequence}: rows {made['rows']}, {made['fill']:.2%} of their places filled")
    except (ValueError, OSError) as error:
        print(f"pack_data: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
