"""Put .bin/.idx pairs behind one another into one: python tools/merge_datasets.py --input a b --output-prefix all."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megapre.data.indexed import CODES, IndexedDataset
from megapre.data.manifest import members
from megapre.data.merge import Part, merge


def pairs(inputs: list[str]) -> list[str]:
    """Prefixes of pairs: those given, those of manifests, and those of the folders given, by name."""
    found: list[str] = []
    for name in inputs:
        if os.path.isdir(name):
            inside = sorted(str(path)[:-4] for path in Path(name).glob("*.idx") if path.with_suffix(".bin").exists())
            if not inside:
                raise ValueError(f"--input {name} is a folder without a pair.")
            found += inside
        else:
            found += [pair.removesuffix(".idx").removesuffix(".bin") for pair in members(name)]
    if len(set(found)) != len(found):
        raise ValueError("--input names a pair twice.")
    return found


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad arguments or pairs."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, help="prefixes of pairs, manifests, or folders of pairs")
    parser.add_argument("--output-prefix", required=True, help="prefix of the pair to write")
    parser.add_argument("--workers", type=int, default=1, help="threads that copy")
    args = parser.parse_args(argv)
    try:
        prefixes = pairs(args.input)
        if os.path.abspath(args.output_prefix) in map(os.path.abspath, prefixes):
            raise ValueError(f"--output-prefix {args.output_prefix} is one of the inputs.")
        sets = [IndexedDataset(prefix) for prefix in prefixes]
        records = [data.sidecar.tokenizer if data.sidecar else None for data in sets]
        for prefix, record in zip(prefixes, records):
            if record != records[0]:
                raise ValueError(
                    f"{prefixes[0]} and {prefix} are of different tokenizers or settings: {records[0]} and {record}."
                )
        dtype = max((data.dtype for data in sets), key=lambda d: (d.itemsize, CODES[d]))
        parts = [Part(data.prefix, data.total_tokens, data.sequences, len(data), pair=True) for data in sets]
        os.makedirs(os.path.dirname(args.output_prefix) or ".", exist_ok=True)
        made = merge(args.output_prefix, dtype, parts, records[0], max(1, args.workers))
    except (ValueError, OSError) as error:
        print(f"merge_datasets: {error}", file=sys.stderr)
        return 2
    print(f"{args.output_prefix}: {made.documents} documents, {made.tokens} tokens of {len(parts)} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
