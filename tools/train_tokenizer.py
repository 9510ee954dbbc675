"""Learn a tokenizer from .jsonl or .txt files: python tools/train_tokenizer.py --input a.jsonl --output tok.json."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megapre.tokenizers.documents import BadLine, expand_inputs
from megapre.tokenizers.train import TYPES, train


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad arguments."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, help="files or glob patterns: .jsonl, .txt, each also .gz")
    parser.add_argument("--type", choices=TYPES, default="bpe")
    parser.add_argument("--backend", choices=("tokenizers", "sentencepiece"), default="tokenizers")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="ids, the special ones included")
    parser.add_argument("--output", required=True, help="tokenizer.json, or .model with sentencepiece")
    parser.add_argument("--json-key", default="text", help="key of the text in a JSON line")
    parser.add_argument("--on-bad-line", choices=("skip", "fail"), default="skip")
    args = parser.parse_args(argv)
    count = 0

    def report(line: BadLine) -> None:
        nonlocal count
        count += 1
        if count <= 20:
            print(f"skipped {line}", file=sys.stderr)

    try:
        inputs = expand_inputs(args.input)
        folder = os.path.dirname(args.output)
        if folder:
            os.makedirs(folder, exist_ok=True)
        size = train(
            inputs,
            args.output,
            type=args.type,
            backend=args.backend,
            vocab_size=args.vocab_size,
            key=args.json_key,
            bad=report if args.on_bad_line == "skip" else None,
        )
    except (ValueError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    asked = "" if size == args.vocab_size else f" of the {args.vocab_size} asked for: the text has no more"
    print(f"{args.output}: {size} ids{asked}, {count} bad lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
