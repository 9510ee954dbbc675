"""Tokenize .jsonl or .txt files into .bin/.idx pairs, with the flags of Megatron-LM's tool of this name."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megapre.tokenizers.documents import expand_inputs
from megapre.tokenizers.load import TOKENIZERS
from megapre.tokenizers.preprocess import Job, preprocess

# Flags that Megatron users type and that change nothing here.
HINTS = {
    "vocab": "--vocab is read as --tokenizer-model",
    "dataset_impl": "--dataset-impl mmap is the only format and needs no flag",
    "keep_newlines": "--keep-newlines is always so",
    "keep_sequential_samples": "--keep-sequential-samples is always so: output is in input order",
    "partitions": "--partitions is not needed: memory does not grow with the input",
    "lang": "--lang is only for --split-sentences",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--input", nargs="+", required=True, help="files or glob patterns: .jsonl (a document a line), "
                   ".txt (a document a file), each also .gz")  # fmt: skip
    p.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the texts; one pair is written for each")
    p.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    p.add_argument("--output-prefix", required=True, help="PREFIX_{key}_document.bin, .idx and .json are written")
    p.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    p.add_argument("--log-interval", type=int, default=10_000, help="documents between lines of progress")
    p.add_argument("--tokenizer-type", default="HuggingFaceTokenizer", help=", ".join(TOKENIZERS))
    p.add_argument("--tokenizer-model", default="", help="tokenizer.json or SentencePiece .model")
    p.add_argument("--vocab-size", type=int, default=0, help="NullTokenizer: ids without end-of-document")
    p.add_argument("--on-bad-line", choices=("skip", "fail"), default="skip", help="a line that is no document")
    p.add_argument("--split-sentences", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--vocab", help=argparse.SUPPRESS)
    p.add_argument("--dataset-impl", choices=("mmap",), help=argparse.SUPPRESS)
    p.add_argument("--keep-newlines", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--keep-sequential-samples", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--partitions", type=int, help=argparse.SUPPRESS)
    p.add_argument("--lang", help=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad arguments or input."""
    args = parser().parse_args(argv)
    for name, hint in HINTS.items():
        if getattr(args, name):
            print(f"preprocess_data: {hint}.", file=sys.stderr)
    try:
        report = preprocess(_job(args))
    except (ValueError, OSError) as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return 2
    print(
        f"{report.documents} documents, {report.tokens} tokens, {report.empty} empty texts left out, "
        f"{report.bad_count} bad lines left out: {', '.join(report.prefixes)}"
    )
    return 0


def _job(args: argparse.Namespace) -> Job:
    if args.workers < 1 or args.log_interval < 1:
        raise ValueError(f"--workers {args.workers} and --log-interval {args.log_interval} must be at least 1.")
    if args.split_sentences:
        raise ValueError("--split-sentences is not offered: documents are stored whole.")
    if len(set(args.json_keys)) != len(args.json_keys):
        raise ValueError(f"--json-keys {' '.join(args.json_keys)} names a key twice.")
    return Job(
        inputs=expand_inputs(args.input),
        prefix=args.output_prefix,
        keys=args.json_keys,
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=args.tokenizer_model or args.vocab or "",
        vocab_size=args.vocab_size,
        append_eod=args.append_eod,
        workers=args.workers,
        skip_bad_lines=args.on_bad_line == "skip",
        log_interval=args.log_interval,
    )


if __name__ == "__main__":
    sys.exit(main())
