"""First batch and random samples of a blend of 1e12 tokens, 1e8 documents and 1,000 sources.

The sources are sparse files that share one index by hard links; each is opened and mapped by itself. Every arm runs in
a process of its own, several times; medians of CPU and of wall-clock time are printed, as the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from megapre.data.indexed import CODES, HEADER, MAGIC
from megapre.data.sidecar import Sidecar, TokenizerRecord

SOURCES, TOKENS, DOCUMENTS = 1000, 10**9, 10**5
ARM = """
import json, random, resource, sys, time
from dataclasses import replace
started = time.process_time(), time.perf_counter()
import numpy as np
from megapre.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from megapre.data.samples import Samples
def resident():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["RssAnon"].split()[0]) / 1024
imported = time.process_time(), time.perf_counter()
before = resident()
folder, count, reset = sys.argv[1], int(sys.argv[2]), bool(int(sys.argv[3]))
paths = [f"{folder}/s{i:04d}" for i in range(count)]
weights = [1 / (i + 3) for i in range(count)]
data = DataConfig(paths=paths, weights=weights, split=[0.99, 0.01, 0.0], reset_attention=reset, reset_positions=reset)
config = Config(model=ModelConfig(sequence=4096), data=data, train=TrainConfig(eval_samples=0))
samples = Samples(config, vocab_size=50304)
batch = [samples.sample(n) for n in range(8)]
opened = time.process_time(), time.perf_counter()
rng, times = random.Random(1), []
for _ in range(2000):
    n = rng.randrange(10**9)
    t = time.perf_counter(); c = time.process_time()
    samples.sample(n)
    times.append((time.process_time() - c, time.perf_counter() - t))
cpu, wall = (sorted(x)[len(x) // 2] * 1e6 for x in zip(*times))
print(json.dumps({"open_cpu_s": opened[0] - imported[0], "open_wall_s": opened[1] - imported[1],
                  "import_cpu_s": imported[0] - started[0], "anonymous_mb": resident() - before,
                  "sample_cpu_us": cpu, "sample_wall_us": wall}))
"""


def build(folder: Path, sources: int) -> None:
    """Sparse pairs: one .bin, .idx and .json, linked under every source's name."""
    length = TOKENS // DOCUMENTS
    with open(folder / "one.bin", "wb") as file:
        file.truncate(2 * TOKENS)
    pointers = np.arange(DOCUMENTS, dtype="<i8") * (2 * length)
    with open(folder / "one.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, CODES[np.dtype("<u2")], DOCUMENTS, DOCUMENTS + 1))
        file.write(np.full(DOCUMENTS, length, "<i4").tobytes() + pointers.tobytes())
        file.write(np.arange(DOCUMENTS + 1, dtype="<i8").tobytes())
    size = (folder / "one.idx").stat().st_size
    record = TokenizerRecord("NullTokenizer", "0" * 64, 50304, 0, None, True)
    Sidecar("uint16", DOCUMENTS, DOCUMENTS, TOKENS, 2 * TOKENS, size, None, None, record).write(folder / "one.json")
    for number in range(sources):
        for suffix in (".bin", ".idx", ".json"):
            os.link(folder / f"one{suffix}", folder / f"s{number:04d}{suffix}")


def measure(folder: Path, sources: int, reset: bool, runs: int) -> dict[str, float]:
    """Medians over processes."""
    found = []
    for _ in range(runs):
        command = [sys.executable, "-c", ARM, str(folder), str(sources), str(int(reset))]
        found.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return {key: statistics.median(row[key] for row in found) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sources", type=int, default=SOURCES)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        build(Path(name), arguments.sources)
        print(f"{arguments.sources} sources, {arguments.sources * TOKENS:.3g} tokens, "
              f"{arguments.sources * DOCUMENTS:.3g} documents, samples of 4,096 tokens")  # fmt: skip
        for reset in (False, True):
            found = measure(Path(name), arguments.sources, reset, arguments.runs)
            print(f"document masks {'on' if reset else 'off'}:")
            for key, limit in (("open_cpu_s", 1.0), ("open_wall_s", 1.0), ("anonymous_mb", 200), ("sample_cpu_us", 60),
                               ("sample_wall_us", 60)):  # fmt: skip
                print(f"  {key:15} {found[key]:8.3f}   share of the limit {limit:g}: {found[key] / limit:.2f}")


if __name__ == "__main__":
    main()
