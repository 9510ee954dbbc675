"""Data of the jobs of this folder, from this machine's Python standard library: python examples/objectives/prepare.py.

One tokenizer with every special token that an objective asks for, the text as documents and as sentences, and rows of
sentences for the objectives that pair texts.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SEQUENCE = 64
"""``model.sequence`` of the jobs that read rows of sentences."""


SPLIT = ("0.95", "0.05", "0.0")
"""``data.split`` of the jobs."""


def run(*words: str) -> None:
    """Print a command and run it with this Python."""
    print("$ python", shlex.join(words), flush=True)
    done = subprocess.run([sys.executable, *words], cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


def main() -> None:
    """Write ``FOLDER/stdlib_text_document``, ``FOLDER/stdlib_text_sentence`` and ``FOLDER/tokenizer.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="data/objectives", help="folder")
    parser.add_argument("--megabytes", type=float, default=6.0)
    parser.add_argument("--vocab-size", type=int, default=1024)
    args = parser.parse_args()
    folder = Path(args.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    text, tokenizer, prefix = (str(folder / name) for name in ("stdlib.jsonl", "tokenizer.json", "stdlib"))
    run("examples/gather_stdlib.py", "--output", text, "--megabytes", str(args.megabytes))
    run("tools/train_tokenizer.py", "--input", text, "--output", tokenizer, "--vocab-size", str(args.vocab_size),
        "--special-tokens", "<cls>", "<sep>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "--vocab-extra-ids", "16",
        "--report-mb", "0")  # fmt: skip
    told = ("--input", text, "--output-prefix", prefix, "--tokenizer-type", "HuggingFaceTokenizer",
            "--tokenizer-model", tokenizer, "--append-eod")  # fmt: skip
    run("tools/preprocess_data.py", *told)
    run("tools/preprocess_data.py", *told, "--split-sentences")
    run("tools/pack_data.py", f"{prefix}_text_sentence", "--sequence", str(SEQUENCE), "--sentences",
        "--split", *SPLIT)  # fmt: skip


if __name__ == "__main__":
    main()
