"""Hugging Face checkpoints in and out, and the start of a larger model from a smaller one.

python tools/convert_checkpoint.py import FOLDER --job OUT.toml            a job that starts from the folder's weights
python tools/convert_checkpoint.py export STEP_FOLDER OUT_FOLDER           a folder for transformers' from_pretrained
python tools/convert_checkpoint.py grow STEP_FOLDER OUT_FOLDER JOB.toml    weights for the larger model of a job
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megapre.checkpoint import store
from megapre.checkpoint.grow import write_grown
from megapre.config.check import ConfigError, check
from megapre.config.load import from_dict, load, to_toml
from megapre.config.rules_objectives import ARCHITECTURES
from megapre.config.schema import Config
from megapre.hub.export import DTYPES, export
from megapre.hub.families import FAMILIES
from megapre.hub.folder import is_folder
from megapre.hub.load import Import
from megapre.models.grow import DEPTHS, growths


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad arguments, folder or checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    bring = verbs.add_parser("import", help="check a folder and write a job that starts from it")
    bring.add_argument("folder", type=Path)
    bring.add_argument("--job", type=Path, required=True, help="the job file to write")
    bring.add_argument("--base", type=Path, help="a job file whose other tables are kept")
    take = verbs.add_parser("export", help="write a checkpoint as a folder of Hugging Face")
    take.add_argument("checkpoint", type=Path, help="a .../step_N folder")
    take.add_argument("folder", type=Path, help="a new folder")
    take.add_argument("--family", choices=list(FAMILIES), default="", help="default: the first that fits")
    take.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    take.add_argument("--tokenizer", type=Path, help="a folder whose tokenizer files are copied")
    more = verbs.add_parser("grow", help="write weights for a larger model that computes what the smaller one does")
    more.add_argument("checkpoint", type=Path, help="a .../step_N folder, or one of Hugging Face")
    more.add_argument("folder", type=Path, help="a new folder")
    more.add_argument("job", metavar="JOB.toml", help="the larger model's job file")
    more.add_argument("overrides", nargs="*", metavar="table.key=value", help="settings over the file's")
    more.add_argument("--depth", choices=DEPTHS, default=DEPTHS[0],
                      help="new blocks that add nothing yet (the default), or all once more on top, no longer the same")
    more.add_argument("--noise", type=float, default=0.0,
                      help="tells copies apart, over a tensor's root mean square; cancels in their sum (default: 0)")
    more.add_argument("--seed", type=int, default=1, help="key of the noise (default: 1)")  # fmt: skip
    args = parser.parse_args(argv)
    try:
        if args.verb == "import":
            print(write_job(args.folder, args.job, args.base))
        elif args.verb == "grow":
            config = check(load(args.job, args.overrides))
            print(grow(args.checkpoint, args.folder, config, args.depth, args.noise, args.seed))
        else:
            state = store.read_state(args.checkpoint)
            config, vocab_size = from_dict(state["job"]), state["vocab_size"]
            found = export(
                args.checkpoint, args.folder, config, vocab_size,
                kind=args.family, dtype=args.dtype, tokenizer=args.tokenizer,
            )  # fmt: skip
            print(f"{args.folder}: {found.architecture}, {args.dtype}")
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    return 0


def write_job(folder: Path, job: Path, base: Path | None) -> str:
    """Write a job that starts from ``folder``; returns what to say of it."""
    source = Import(folder)
    config = load(str(base), []) if base else Config()
    config = replace(config, model=source.model, checkpoint=replace(config.checkpoint, load=str(folder)))
    if (folder / "tokenizer.json").exists():
        tokenizer = str(folder / "tokenizer.json")
        config = replace(config, data=replace(config.data, tokenizer_model=tokenizer))
    if job.exists():
        raise ValueError(f"{job} exists: choose another --job.")
    config = config if base else _with_objective(config)
    check(config)
    job.write_text(to_toml(config))
    count = len(source.folder.shapes)
    return f"{job}: {source.family.architecture}, {count} tensors; set [data] and [train], then megapre train {job}"


def _with_objective(config: Config) -> Config:
    """The job with the first objective that its model can learn; as it is where there is none."""
    for objective in ARCHITECTURES.get(config.model.architecture, ()):
        fitting = replace(config, data=replace(config.data, objective=objective))
        try:
            return check(fitting)
        except ConfigError:
            continue
    return config


def grow(checkpoint: Path, folder: Path, config: Config, depth: str, noise: float, seed: int) -> str:
    """Write weights for the model of ``config`` to ``folder``; returns what to say of them."""
    if not 0 <= noise < float("inf"):
        raise ValueError(f"--noise must be at least 0, not {noise:g}")
    if is_folder(checkpoint):
        source = Import(checkpoint)
        small, vocab_size = source.model, source.model.vocab_size
        read: Callable[[str], Tensor] = source.whole
    else:
        state = store.read_state(checkpoint)
        small, vocab_size = from_dict(state["job"]).model, state["vocab_size"]
        read = partial(_weight, checkpoint)
    if config.model.vocab_size not in (0, vocab_size):
        raise ValueError(f"model.vocab_size = {config.model.vocab_size}, but {checkpoint} has {vocab_size} ids.")
    path = write_grown(folder, growths(small, config.model, vocab_size, depth), read, config, vocab_size,
                       noise=noise, seed=seed)  # fmt: skip
    return f"{path}: set checkpoint.load = \"{path}\" and checkpoint.weights_only = true"


def _weight(checkpoint: Path, name: str) -> Tensor:
    return store.whole(checkpoint, f"weight/{name}")


if __name__ == "__main__":
    sys.exit(main())
