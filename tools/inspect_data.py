"""Look into .bin/.idx pairs, and at what a run reads of them.

python tools/inspect_data.py PREFIX                            what it holds
python tools/inspect_data.py PREFIX --decode 17 --tokenizer-model T    document 17 as text
python tools/inspect_data.py PREFIX --validate                 check every offset, digest and id; kept in the sidecar
python tools/inspect_data.py PREFIX --histogram lengths.svg    a picture of the lengths of documents
python tools/inspect_data.py PREFIX --objective masked --tokenizer-model T     what a model reads and is asked, as text
python tools/inspect_data.py --run RUN_DIR --step 20           source, document and offset of every sample of step 20
python tools/inspect_data.py --run RUN_DIR --find "some text"  documents that hold it, and the steps that see them
"""

import argparse
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megapre.config.lengths import corruption_of_source, noise
from megapre.config.load import load as load_job
from megapre.config.ramp import Steps
from megapre.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from megapre.data.check import check_data
from megapre.data.indexed import IndexedDataset
from megapre.data.manifest import members
from megapre.data.provenance import pieces, step_samples, visits
from megapre.data.samples import Samples
from megapre.data.statistics import histogram, summary, validate
from megapre.objectives.table import OBJECTIVES
from megapre.tokenizers import show
from megapre.tokenizers.base import Tokenizer
from megapre.tokenizers.load import load

SHOWN = 12
"""Visits of a document that are printed."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("prefix", nargs="*", help="prefixes of pairs, or manifests")
    p.add_argument("--validate", action="store_true", help="read everything")
    p.add_argument("--histogram", metavar="SVG", help="write a picture (of the first pair)")
    p.add_argument("--decode", type=int, nargs="+", metavar="N", help="print documents as text")
    p.add_argument("--tokenizer-type", default="", help="default: the job's, or what wrote the pair")
    p.add_argument("--tokenizer-model", default="", help="the tokenizer's file")
    p.add_argument("--objective", choices=OBJECTIVES, help="print samples as this objective makes them")
    p.add_argument("--sample", type=int, nargs="+", default=[0], help="with --objective: numbers of samples")
    p.add_argument("--sequence", type=int, default=64, help="with --objective: about so many tokens of text")
    p.add_argument("--run", metavar="RUN_DIR", help="a run folder, or a job file")
    p.add_argument("--step", type=int, help="print the samples of this step, from 0")
    p.add_argument("--find", metavar="TEXT", help="search the documents of the run's data")
    p.add_argument("--epochs", type=int, default=0, help="with --find: epochs of a source to look at (0: the run's)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 1 nothing found, 2 bad arguments or data."""
    args = parser().parse_args(argv)
    warnings.simplefilter("ignore")
    try:
        if args.run:
            return run(args)
        if not args.prefix:
            raise ValueError("name a pair, or a run with --run.")
        for prefix in (pair for path in args.prefix for pair in members(path)):
            prefix = prefix.removesuffix(".idx").removesuffix(".bin")
            if args.objective:
                examples(args, job_of(args.objective, prefix, args.sequence))
            else:
                inspect(args, prefix)
    except (ValueError, OSError, IndexError) as error:
        print(f"inspect_data: {error}", file=sys.stderr)
        return 2
    return 0


def tokenizer_of(args: argparse.Namespace, dataset: IndexedDataset, model: str = "") -> Tokenizer:
    """The tokenizer that wrote a pair; ValueError when the one that is named did not."""
    record = dataset.sidecar.tokenizer if dataset.sidecar else None
    kind = args.tokenizer_type or (record.type if record else "HuggingFaceTokenizer")
    size = record.eod if record and record.eod is not None and kind == "NullTokenizer" else 0
    tokenizer = load(kind, args.tokenizer_model or model, size)
    if record and record.digest and tokenizer.digest != record.digest:
        raise ValueError(f"{dataset.prefix} was written by another tokenizer (sha256 {record.digest[:12]}).")
    return tokenizer


def inspect(args: argparse.Namespace, prefix: str) -> None:
    """One pair."""
    dataset = IndexedDataset(prefix)
    print(prefix)
    if args.validate:
        for name, value in validate(prefix).items():
            print(f"  {name:20} {value}")
        print("  all offsets, documents, digests and ids are right; recorded in the sidecar")
    if args.histogram:
        Path(args.histogram).write_text(histogram(dataset, prefix))
        print(f"  {args.histogram} written")
    if args.decode:
        tokenizer = tokenizer_of(args, dataset)
        for number in args.decode:
            print(f"--- document {number}\n{tokenizer.decode(dataset.document(number).tolist())}")
    if not (args.validate or args.histogram or args.decode):
        for name, value in summary(dataset).items():
            print(f"  {name:20} {value}")


def job_of(objective: str, prefix: str, sequence: int) -> Config:
    """A job of ``objective`` on a pair, with the shares of its paper and lengths that fit about ``sequence`` tokens."""
    usual = {"denoising": 0.3, "permuted": 1 / 6}
    data = DataConfig(paths=[prefix], objective=objective, mask_probability=usual.get(objective, 0.15))
    model = ModelConfig(sequence=sequence)
    if objective == "span_corruption":
        model = ModelConfig(sequence=corruption_of_source(sequence, data).target, source_sequence=sequence)
    elif objective == "denoising":
        data = replace(data, permute_sentences=float(IndexedDataset(prefix).sequences > len(IndexedDataset(prefix))))
        model = replace(model, source_sequence=noise(sequence, data).source)
    return Config(model=model, data=data, train=TrainConfig(eval_samples=0))


def examples(args: argparse.Namespace, config: Config) -> None:
    """Samples of a job, decoded."""
    samples = Samples(config, vocab_size=check_data(config))
    for number in args.sample:
        source, _ = samples.locate(number)
        tokenizer = tokenizer_of(args, source.dataset, config.data.tokenizer_model)
        print(f"--- {config.data.objective}, sample {number} of {source.path}")
        for name, text in show.lines(samples.sample(number).example, tokenizer):
            print(f"{name}: {text}")


def run(args: argparse.Namespace) -> int:
    """The data of a run."""
    path = Path(args.run)
    config = load_job(path / "job.toml" if path.is_dir() else path)
    if args.objective:
        if args.objective != config.data.objective:
            raise ValueError(f"{path} is a job of data.objective = '{config.data.objective}', not '{args.objective}'.")
        examples(args, config)
        return 0
    samples = Samples(config, vocab_size=check_data(config))
    if args.step is not None:
        if args.step < 0:
            raise ValueError(f"--step {args.step} is below 0.")
        for number in step_samples(config, args.step):
            for piece in pieces(samples, number):
                print(f"step {args.step} sample {number}: {piece.path} document {piece.document} "
                      f"tokens {piece.offset}-{piece.offset + piece.tokens - 1}")  # fmt: skip
        return 0
    if not args.find:
        raise ValueError("--run needs --step N or --find TEXT.")
    kind = args.tokenizer_type or config.data.tokenizer_type
    tokenizer = load(kind, args.tokenizer_model or config.data.tokenizer_model, samples.vocab_size - 1)
    found = 0
    for source, document in search(samples, tokenizer, args.find):
        found += 1
        steps = describe(config, samples, source, document, args.epochs)
        print(f"{samples.sources[source].path} document {document}: {steps}")
    return 0 if found else 1


def search(samples: Samples, tokenizer: Tokenizer, text: str) -> Iterator[tuple[int, int]]:
    """Documents of every source that hold ``text``. Each is decoded: ids depend on what stands around a text."""
    for number, source in enumerate(samples.sources):
        for document in range(len(source.dataset)):
            if text in tokenizer.decode(source.dataset.document(document).tolist()):
                yield number, document


def describe(config: Config, samples: Samples, source: int, document: int, epochs: int) -> str:
    """The steps that see a document, and which of them the run reaches."""
    if not epochs:
        last = Steps(config).at(config.train.steps).first
        epochs = 1 + max((rank for s in range(max(0, last - 64), last) for where, rank in [samples.blend.locate(s)]
                          if where == source), default=0) // samples.sources[source].order.windows  # fmt: skip
    seen = sorted((visit.step, visit.sample) for visit in visits(config, samples, source, document, epochs))
    if not seen:
        return "in no training step (another split, or cut off)"
    steps = [
        f"{step} (sample {sample}{', after the end' if step >= config.train.steps else ''})" for step, sample in seen
    ]
    return f"step {', '.join(steps[:SHOWN])}" + (f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else "")


if __name__ == "__main__":
    sys.exit(main())
