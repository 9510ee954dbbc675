"""Learn a tokenizer from text files: python tools/train_tokenizer.py --input a.jsonl --output tokenizer.json."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megapre.tokenizers.documents import BadLine
from megapre.tokenizers.inputs import expand_inputs
from megapre.tokenizers.load import load
from megapre.tokenizers.train import TYPES, fertility, sample_texts, train
from megapre.tokenizers.vocabulary import SENTINEL


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad arguments."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or patterns, as preprocess_data.py")
    parser.add_argument("--type", choices=TYPES, default="bpe")
    parser.add_argument("--backend", choices=("tokenizers", "sentencepiece"), default="tokenizers")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="ids, the special ones included")
    parser.add_argument("--special-tokens", nargs="+", default=[], metavar="NAME", help="beside <|endoftext|>, <mask> "
                        "and <pad>: <cls> <sep> for pairs of sentences, <fim_prefix> <fim_suffix> <fim_middle>")
    parser.add_argument("--vocab-extra-ids", type=int, default=0, metavar="N", help="also <extra_id_0> to "
                        "<extra_id_N-1>, the sentinels of span corruption")  # fmt: skip
    parser.add_argument("--output", required=True, help="tokenizer.json, or .model with sentencepiece")
    parser.add_argument("--json-key", default="text", help="key of the text in a JSON line")
    parser.add_argument("--on-bad-line", choices=("skip", "fail"), default="skip")
    parser.add_argument("--sample-mb", type=float, default=0, help="learn from about so much text (1e6 bytes), drawn "
                        "from all over the input; 0: all of it")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1234, help="of the sample")
    parser.add_argument("--report-mb", type=float, default=0.5, help="text for the fertility report; 0: none")
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
            sample_bytes=int(args.sample_mb * 1e6),
            seed=args.seed,
            specials=[*args.special_tokens, *(SENTINEL.format(n) for n in range(args.vocab_extra_ids))],
        )
    except (ValueError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    asked = "" if size == args.vocab_size else f" of the {args.vocab_size} asked for: the text has no more"
    print(f"{args.output}: {size} ids{asked}, {count} bad lines")
    if args.report_mb > 0:
        kind = "SentencePieceTokenizer" if args.backend == "sentencepiece" else "HuggingFaceTokenizer"
        texts = sample_texts(
            inputs, args.json_key, lambda line: None, int(args.report_mb * 1e6) or 1, args.seed, held_out=True
        )
        found = fertility(load(kind, args.output), texts)
        print("fertility: " + ", ".join(f"{value:.3g} {name}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
