"""The whole path, from raw text to a generating model, on this machine: `make demo` runs this.

Every step is an ordinary command, printed before it runs, so that you can repeat it by hand. In the middle of
training one rank is killed with SIGKILL; the launcher starts the ranks again from the newest checkpoint.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("demo_run")
JOB = "examples/demo.toml"
KILL_AT = 0.5
"""Share of the steps after which a rank is killed."""


def say(text: str) -> None:
    """A line that stands out."""
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}", flush=True)


def command(*words: str) -> list[str]:
    """Print a command and return it with this Python in front."""
    shown = ["megapre", *words[2:]] if words[:2] == ("-m", "megapre") else ["python", *words]
    say("$ " + shlex.join(shown))
    return [sys.executable, *words]


def run(*words: str) -> str:
    """Run a command, show and return what it prints."""
    done = subprocess.run(command(*words), stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        raise SystemExit(f"demo: exit code {done.returncode} from {shlex.join(words)}")
    return done.stdout


def metrics(run_dir: Path, split: str) -> list[dict]:
    """Rows of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row.get("split") == split]


def descendants(pid: int) -> list[int]:
    """Processes below ``pid``, parents first."""
    found = [pid]
    for parent in found:
        try:
            tasks = list(Path(f"/proc/{parent}/task").iterdir())
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found[1:]


def kill_one_rank(launcher: subprocess.Popen, run_dir: Path, step: int) -> None:
    """SIGKILL the last-born rank once the run has logged ``step``."""
    while launcher.poll() is None:
        rows = metrics(run_dir, "train")
        if rows and rows[-1]["step"] >= step:
            victim = descendants(launcher.pid)[-1]
            say(f"demo: SIGKILL to process {victim}, a rank of the run, after step {rows[-1]['step']}")
            os.kill(victim, signal.SIGKILL)
            return
        time.sleep(0.2)


def train(steps: int) -> None:
    """The main run, with a rank killed half way."""
    launcher = subprocess.Popen(command("-m", "megapre", "train", JOB))
    threading.Thread(target=kill_one_rank, args=(launcher, OUT / "run", int(steps * KILL_AT)), daemon=True).start()
    if launcher.wait():
        raise SystemExit(f"demo: training ended with exit code {launcher.returncode}")
    starts = [row["step"] for row in map(json.loads, (OUT / "run" / "metrics.jsonl").read_text().splitlines())
              if row.get("event") == "start"]  # fmt: skip
    if len(starts) < 2:
        raise SystemExit("demo: the run was not resumed; it should have been, after the SIGKILL")
    print(f"demo: the run started at step {starts[0]} and resumed by itself at step {starts[-1]}")


def reload(name: str, *layout: str) -> float:
    """Validation loss of the trained checkpoint on another layout."""
    checkpoint = sorted((OUT / "run" / "checkpoints").glob("step_*"))[-1]
    run("-m", "megapre", "train", JOB, *layout, f"train.run_dir={OUT / name}", f"checkpoint.load={checkpoint}")
    return metrics(OUT / name, "validation")[-1]["loss"]


def main() -> int:
    """Exit code 0 when every claim of the README held."""
    started = time.monotonic()
    os.chdir(ROOT)
    if OUT.exists():
        subprocess.run(["rm", "-r", str(OUT)], check=True)
    OUT.mkdir()
    run("examples/gather_stdlib.py", "--output", "demo_run/stdlib.jsonl")
    run("tools/train_tokenizer.py", "--input", "demo_run/stdlib.jsonl", "--type", "bpe", "--vocab-size", "2048",
        "--output", "demo_run/tokenizer.json")  # fmt: skip
    run("tools/preprocess_data.py", "--input", "demo_run/stdlib.jsonl", "--output-prefix", "demo_run/stdlib",
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "demo_run/tokenizer.json",
        "--append-eod", "--workers", "2")  # fmt: skip
    train(steps=400)
    loss = metrics(OUT / "run", "validation")[-1]["loss"]
    bigram = float(run("examples/bigram.py", JOB).split("validation loss ")[1].split(",")[0])
    one = reload("one_rank", "parallel.tensor=1", "parallel.pipeline=1")
    two = reload("data_2", "parallel.tensor=1", "parallel.pipeline=1", "parallel.data=2")
    run("-m", "megapre", "generate", str(OUT / "run"), "--prompt", "def ", "--tokens", "60", "--temperature", "0.7",
        "--top-p", "0.9", "--seed", "1")  # fmt: skip
    claims = {
        f"held-out loss {loss:.4f} is below the bigram's {bigram:.4f}": loss < bigram,
        f"one rank: {one:.6f}, equal within 1e-5 to {loss:.6f}": abs(one - loss) < 1e-5,
        f"data-parallel 2: {two:.6f}, equal within 1e-5": abs(two - loss) < 1e-5,
    }
    say(f"demo: done in {time.monotonic() - started:.0f} s")
    for claim, holds in claims.items():
        print("  yes:" if holds else "  NO: ", claim)
    return 0 if all(claims.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
