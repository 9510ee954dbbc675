"""Tokenize text files into .bin/.idx pairs, with the flags of Megatron-LM's tool of this name.

One command for one machine or many: under srun or mpirun the processes share the input by bytes. Killed or out of disk,
the same command goes on where it stopped.
"""

import argparse
import multiprocessing
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megapre.tokenizers.backends import BACKENDS
from megapre.tokenizers.inputs import expand_inputs
from megapre.tokenizers.load import TOKENIZERS
from megapre.tokenizers.preprocess import Job, preprocess
from megapre.tokenizers.team import Team, TeamError, find_team
from megapre.tokenizers.workers import WorkerError

# Flags that Megatron users type and that change nothing here.
HINTS = {
    "vocab": "--vocab is read as --vocab-file",
    "dataset_impl": "--dataset-impl mmap is the only format and needs no flag",
    "keep_newlines": "--keep-newlines is always so: a line break stays inside its sentence",
    "keep_sequential_samples": "--keep-sequential-samples is always so: output is in input order",
    "partitions": "--partitions is not needed: memory does not grow with the input",
    "lang": "--lang is not needed: sentences end by the same rules in all languages",
    "vocab_extra_ids": "--vocab-extra-ids is ignored: add the tokens to the tokenizer's file",
    "find_optimal_num_workers": "--find-optimal-num-workers is ignored: take the number of cores",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    p.add_argument("--input", nargs="+", required=True, help="files, folders or patterns: .jsonl (a line each), "
                   ".json (also one array), .txt (a document each), .parquet; each also .gz, .zst, .xz")  # fmt: skip
    p.add_argument("--json-keys", nargs="+", default=["text"], help="keys of the texts; one pair is written for each")
    p.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    p.add_argument("--output-prefix", required=True, help="PREFIX_{key}_document.bin, .idx and .json are written")
    p.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    p.add_argument("--log-interval", type=int, default=10_000, help="documents between lines of progress")
    p.add_argument("--tokenizer-type", default="HuggingFaceTokenizer", help=", ".join(TOKENIZERS))
    p.add_argument("--tokenizer-model", default="", help="tokenizer.json, SentencePiece .model or rank file")
    p.add_argument("--vocab-file", default="", help="vocab.json of GPT2BPETokenizer, vocab.txt of BertWordPiece*")
    p.add_argument("--merge-file", default="", help="merges.txt of GPT2BPETokenizer")
    p.add_argument("--vocab-size", type=int, default=0, help="NullTokenizer: ids without end-of-document")
    p.add_argument("--on-bad-line", choices=("skip", "fail"), default="skip", help="a line that is no document")
    p.add_argument("--split-sentences", action="store_true", help="a sequence a sentence: PREFIX_{key}_sentence")
    p.add_argument("--backend", choices=BACKENDS, default="auto", help="library that tokenizes; auto: the fastest "
                   "installed that gives the same ids as the tokenizer's own on the first documents")  # fmt: skip
    p.add_argument("--max-document-mb", type=float, default=64, help="longer documents are bad lines (MiB)")
    p.add_argument("--shard-tokens", type=int, default=0, help="tokens above which another pair is begun: "
                   "PREFIX_{key}_document_00000 and so on, listed in PREFIX_{key}_document.manifest.json")  # fmt: skip
    p.add_argument("--vocab", help=argparse.SUPPRESS)
    p.add_argument("--dataset-impl", choices=("mmap",), help=argparse.SUPPRESS)
    p.add_argument("--keep-newlines", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--keep-sequential-samples", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--partitions", type=int, help=argparse.SUPPRESS)
    p.add_argument("--lang", help=argparse.SUPPRESS)
    p.add_argument("--vocab-extra-ids", type=int, help=argparse.SUPPRESS)
    p.add_argument("--find-optimal-num-workers", action="store_true", help=argparse.SUPPRESS)
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad arguments or input."""
    args = parser().parse_args(argv)
    team = Team()
    try:
        team = find_team(f"{args.output_prefix}.team", _say)
        if team.rank == 0:
            for name, hint in HINTS.items():
                if getattr(args, name):
                    _say(f"{hint}.")
        report = preprocess(_job(args), _say, team)
    except (ValueError, OSError, TeamError, WorkerError) as error:
        if team.rank == 0 or not isinstance(error, TeamError):
            _say(str(error))
        if isinstance(error, OSError) and error.errno is not None:
            _say("what is finished is kept: run the same command to go on from there")
        return 2 if isinstance(error, (ValueError, OSError)) else 1
    if team.rank == 0:
        print(
            f"{report.documents} documents, {report.tokens} tokens, {report.empty} empty texts left out, "
            f"{report.bad_count} bad lines left out: {', '.join(report.prefixes)}"
        )
    return 0


def _say(message: str) -> None:
    print(f"preprocess_data: {message}", file=sys.stderr, flush=True)


def _job(args: argparse.Namespace) -> Job:
    if args.workers < 1 or args.log_interval < 1:
        raise ValueError(f"--workers {args.workers} and --log-interval {args.log_interval} must be at least 1.")
    if not 0 < args.max_document_mb <= 1 << 20 or args.shard_tokens < 0:
        raise ValueError(
            f"--max-document-mb {args.max_document_mb:g} or --shard-tokens {args.shard_tokens} is too small."
        )
    if len(set(args.json_keys)) != len(args.json_keys):
        raise ValueError(f"--json-keys {' '.join(args.json_keys)} names a key twice.")
    return Job(
        inputs=expand_inputs(args.input),
        prefix=args.output_prefix,
        keys=args.json_keys,
        tokenizer_type=args.tokenizer_type,
        tokenizer_model=_model(args),
        vocab_size=args.vocab_size,
        append_eod=args.append_eod,
        split_sentences=args.split_sentences,
        backend=args.backend,
        largest_document=int(args.max_document_mb * (1 << 20)),
        shard_tokens=args.shard_tokens,
        workers=args.workers,
        skip_bad_lines=args.on_bad_line == "skip",
        log_interval=args.log_interval,
    )


def _model(args: argparse.Namespace) -> str:
    vocab = args.vocab_file or args.vocab or ""
    return args.tokenizer_model or os.pathsep.join(filter(None, [vocab, args.merge_file]))


if __name__ == "__main__":
    # Workers start as copies of a process that has these imported already.
    multiprocessing.set_forkserver_preload(["megapre.tokenizers.pieces", "megapre.tokenizers.workers"])
    sys.exit(main())
