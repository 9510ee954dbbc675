"""Hugging Face checkpoints in and out.

python tools/convert_checkpoint.py import FOLDER --job OUT.toml       a job that starts from the folder's weights
python tools/convert_checkpoint.py export STEP_FOLDER OUT_FOLDER      a folder for transformers' from_pretrained
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megapre.checkpoint import store
from megapre.config.check import check
from megapre.config.load import from_dict, load, to_toml
from megapre.config.schema import Config
from megapre.hub.export import DTYPES, export
from megapre.hub.families import FAMILIES
from megapre.hub.load import Import


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
    args = parser.parse_args(argv)
    try:
        if args.verb == "import":
            print(write_job(args.folder, args.job, args.base))
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
    check(config)
    job.write_text(to_toml(config))
    count = len(source.folder.shapes)
    return f"{job}: {source.family.architecture}, {count} tensors; set [data] and [train], then megapre train {job}"


if __name__ == "__main__":
    sys.exit(main())
