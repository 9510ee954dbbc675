"""Tokens per CPU-second of preprocess_data against its peers and its back end's own limit, and its memory.

    python benchmarks/data/tokenise.py --mb 200 [--large-mb 2000] [--peers VENV/bin/python] [--runs 3]

The corpus is text that this machine holds (corpus.py); the tokenizer is a 50,000-id byte-level BPE trained on it. Arms
run in turn, each in a process of its own whose descendants are counted, and medians are printed:

  ours, N workers    tools/preprocess_data.py --workers N, back end auto, all of it counted
  limit, N processes the back end's own reader, the input in N parts in N processes: ids in memory, nothing checked or
                     written. A process has a cache of its own, so the limit of two is below that of one.
  limit, in memory   one process of the back end over texts that are in memory already: neither JSON nor files
  datasets           Hugging Face datasets.map over the tokenizer, with peers' Python
  megatron           Megatron-LM's classic path: json.loads, tokenizer.encode, megatron-core's IndexedDatasetBuilder

The peers see a part of the corpus (--peer-mb), since they need minutes for all of it. Their clock starts behind their
imports and the loading of the tokenizer; ours counts all of it, in every process.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILE_LIMIT = """
import json, sys, gigatoken
content = json.load(open(sys.argv[2])); content["added_tokens"] = []
tokenizer = gigatoken.Tokenizer.from_json(json.dumps(content))
found = tokenizer.encode_files(gigatoken.JsonlFileSource([sys.argv[1]]), parallel=False)
print(len(found.layout.content.data))
"""
MEMORY_LIMIT = """
import json, sys, time, gigatoken, orjson
content = json.load(open(sys.argv[2])); content["added_tokens"] = []
tokenizer = gigatoken.Tokenizer.from_json(json.dumps(content))
texts = [orjson.loads(line)["text"] for line in open(sys.argv[1], "rb")]
started = time.process_time()
tokens = sum(len(tokenizer.encode(text)) for text in texts)
print(tokens, time.process_time() - started)
"""
DATASETS = """
import sys, time, datasets, tokenizers
datasets.disable_caching(); datasets.disable_progress_bars()
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[2]); tokenizer.encode_special_tokens = True
def work(batch):
    return {"ids": [e.ids for e in tokenizer.encode_batch_fast(batch["text"], add_special_tokens=False)]}
started = time.process_time()
data = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[3])
data = data.map(work, batched=True, remove_columns=["text"])
spent = time.process_time() - started
print(sum(len(row) for row in data["ids"]), spent)
"""
MEGATRON = """
import json, sys, time, numpy, torch, transformers
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=sys.argv[2])
builder = IndexedDatasetBuilder(sys.argv[3] + ".bin", dtype=numpy.uint16)
tokens, started = 0, time.process_time()
for line in open(sys.argv[1], encoding="utf-8"):
    ids = tokenizer.encode(json.loads(line)["text"], split_special_tokens=True, add_special_tokens=False)
    if ids:
        ids.append(0)
        builder.add_document(ids, [len(ids)])
        tokens += len(ids)
builder.finalize(sys.argv[3] + ".idx")
print(tokens, time.process_time() - started)
"""


def watch(command: list[str], env: dict[str, str]) -> tuple[str, float, float]:
    """Output, CPU seconds and peak resident MB of a command with all its descendants."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans become ours, so that their CPU time is counted
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env, stderr=subprocess.DEVNULL)
    peak, over = [0.0], threading.Event()

    def sample() -> None:
        while not over.wait(0.05):
            peak[0] = max(peak[0], sum(map(resident, descendants(process.pid))))

    thread = threading.Thread(target=sample)
    thread.start()
    output = process.communicate()[0]
    while True:
        try:
            os.wait()
        except ChildProcessError:
            break
    over.set()
    thread.join()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"tokenise: {command[:3]} failed with {process.returncode}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return output, cpu, peak[0] / 1e6


def descendants(pid: int) -> list[int]:
    """A process and everything started from it or adopted here: all below this benchmark."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, ValueError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], children.get(os.getpid(), [])
    while todo:
        found.append(todo.pop())
        todo += children.get(found[-1], [])
    return found


def resident(pid: int) -> float:
    """Bytes of a process that are its own: shared pages are counted once, by the share of each (PSS)."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=float, default=200)
    parser.add_argument("--large-mb", type=float, default=0, help="a second corpus, for memory alone")
    parser.add_argument("--peer-mb", type=float, default=8)
    parser.add_argument(
        "--peers", default="", help="Python of an environment with datasets, megatron-core, transformers"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", default="", help="for corpora; kept when given")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    python, tool = sys.executable, str(ROOT / "tools" / "preprocess_data.py")

    def corpus(megabytes: float) -> Path:
        path = folder / f"corpus_{megabytes:g}.jsonl"
        if not path.exists():
            subprocess.run(
                [python, str(ROOT / "benchmarks/data/corpus.py"), str(path), "--mb", str(megabytes)], check=True
            )
        return path

    whole, part, tokenizer = corpus(args.mb), corpus(args.peer_mb), folder / "tokenizer.json"
    if not tokenizer.exists():
        subprocess.run(
            [python, str(ROOT / "tools/train_tokenizer.py"), "--input", str(whole), "--sample-mb", "16", "--vocab-size",
             "50000", "--output", str(tokenizer)], check=True, env=env,
        )  # fmt: skip
    ours = [python, tool, "--tokenizer-model", str(tokenizer), "--append-eod", "--workers"]
    split = halves(whole)
    rates: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}

    def record(name: str, tokens: float, cpu: float, peak: float) -> None:
        rates.setdefault(name, []).append(tokens / cpu / 1e6)
        memory.setdefault(name, []).append(peak)
        print(f"  {name}: {tokens / cpu / 1e6:.2f} M tokens/CPU-s, peak {peak:.0f} MB", flush=True)

    for _ in range(args.runs):
        for workers, parts in ((2, split), (1, [whole])):
            command = [*ours, str(workers), "--input", str(whole), "--output-prefix", str(folder / "ours")]
            out, cpu, peak = watch(command, env)
            record(f"ours, {workers} workers", int(out.split(" documents, ")[1].split()[0]), cpu, peak)
            jobs = [f"{shlex.join([python, '-c', FILE_LIMIT, str(part), str(tokenizer)])} &" for part in parts]
            out, cpu, peak = watch(["sh", "-c", " ".join([*jobs, "wait"])], env)
            record(f"limit, {workers} processes", sum(map(int, out.split())), cpu, peak)
        out, _, peak = watch([python, "-c", MEMORY_LIMIT, str(whole), str(tokenizer)], env)
        record("limit, in memory", float(out.split()[0]), float(out.split()[1]), peak)
        if args.peers:
            peers(args.peers, [*ours, "2"], part, tokenizer, folder, env, record)
    if args.large_mb:
        command = [*ours, "2", "--input", str(corpus(args.large_mb)), "--output-prefix", str(folder / "large")]
        out, cpu, peak = watch(command, env)
        record(f"ours, 2 workers, {args.large_mb:g} MB", int(out.split(" documents, ")[1].split()[0]), cpu, peak)
    table(rates, memory)


def halves(path: Path) -> list[Path]:
    """A file of lines as two."""
    parts = [path.with_suffix(f".part{i}.jsonl") for i in range(2)]
    if not all(part.exists() for part in parts):
        content = path.read_bytes()
        middle = content.find(b"\n", len(content) // 2) + 1
        parts[0].write_bytes(content[:middle])
        parts[1].write_bytes(content[middle:])
    return parts


def peers(
    python: str, ours: list[str], part: Path, tokenizer: Path, folder: Path, env: dict[str, str],
    record: Callable[[str, float, float, float], None],
) -> None:  # fmt: skip
    for name, code in (("datasets", DATASETS), ("megatron", MEGATRON)):
        target = str(folder / f"peer_{name}_{time.time_ns()}")
        out, _, peak = watch([python, "-c", code, str(part), str(tokenizer), target], env)
        record(name, float(out.split()[-2]), float(out.split()[-1]), peak)
        if name == "megatron":
            watch([*ours, "--input", str(part), "--output-prefix", str(folder / "same")], env)
            for suffix in (".bin", ".idx"):
                mine = Path(f"{folder}/same_text_document{suffix}").read_bytes()
                print(f"  same {suffix} as megatron's builder: {mine == Path(target + suffix).read_bytes()}")


def table(rates: dict[str, list[float]], memory: dict[str, list[float]]) -> None:
    """Medians, and two workers of ours against each; the limits also against as many workers of ours."""
    middle = {name: statistics.median(found) for name, found in rates.items()}
    print("| arm | M tokens per CPU-second | peak MB | ours, 2 workers / it |\n|---|---|---|---|")
    for name, found in middle.items():
        ratio = middle["ours, 2 workers"] / found
        print(f"| {name} | {found:.2f} | {max(memory[name]):.0f} | {ratio:.2f} |")
    for workers in (2, 1):
        pairs = zip(rates[f"ours, {workers} workers"], rates[f"limit, {workers} processes"])
        share = statistics.median(mine / limit for mine, limit in pairs)
        print(f"ours, {workers} workers, of the limit of {workers} processes: {share:.0%} (median of runs in turn)")


if __name__ == "__main__":
    main()
