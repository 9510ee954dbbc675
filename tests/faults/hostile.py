"""Crafted checkpoints, datasets, archives, tokenizers and job files, each read in this process under guard.

``python -m tests.faults.hostile FOLDER`` prints one JSON line per case: what came out, how much memory it took, and
every event of Python's audit hook that would mean that code ran, a process started, a socket opened or a file outside
of the case's folder was written.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet  # noqa: F401  (loaded before the guard stands, as all that a reader imports)
import torch
import zstandard

from megapre.checkpoint import format as disk
from megapre.checkpoint import store
from megapre.checkpoint.reshard import CheckpointError
from megapre.checkpoint.store import SingleProcess
from megapre.config.check import check
from megapre.config.load import load as load_job
from megapre.data.indexed import HEADER, MAGIC, IndexedDataset
from megapre.data.sidecar import read_sidecar
from megapre.parallel.placement import Address
from megapre.tokenizers import huggingface, sentence_piece, tiktoken_ranks  # noqa: F401
from megapre.tokenizers.documents import documents
from megapre.tokenizers.inputs import expand_inputs
from megapre.tokenizers.load import load as load_tokenizer

MIB = 2**20
SPARE = 768 * MIB
"""Address space beyond what is there before a case: an allocation by a crafted number fails in it."""
FORBIDDEN = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen",
             "socket.connect", "socket.bind", "ctypes.dlopen", "marshal.loads")  # fmt: skip
ADDRESS = Address("w", (64,), (0,), (64,), 0, 64)


class Payload:
    """What a pickle would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def saved(folder: Path) -> Path:
    return store.save(folder, 1, [(ADDRESS, torch.arange(64.0))], {"a": 1}, rank=0, world=1, sync=SingleProcess())


def resigned(path: Path, **changes: Any) -> None:
    """Change fields of the manifest, or of its piece (``piece_``), so that every digest agrees."""
    file = path / disk.manifest_name(0)
    manifest = json.loads(file.read_bytes())
    for name, value in changes.items():
        if name.startswith("piece_"):
            manifest["pieces"][0][name[6:]] = value
        else:
            manifest[name] = value
    replace_manifest(path, json.dumps(manifest).encode())


def replace_manifest(path: Path, text: bytes) -> None:
    (path / disk.manifest_name(0)).write_bytes(text)
    body = json.loads((path / disk.ROOT).read_bytes())["body"]
    body["manifests"][0] = hashlib.sha256(text).hexdigest()
    (path / disk.ROOT).write_bytes(disk.seal(body))


def reseal(path: Path, **changes: Any) -> None:
    body = json.loads((path / disk.ROOT).read_bytes())["body"]
    (path / disk.ROOT).write_bytes(disk.seal({**body, **changes}))


def sparse(path: Path, size: int) -> None:
    path.unlink(missing_ok=True)
    with open(path, "wb") as file:
        file.truncate(size)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def use_checkpoint(path: Path) -> None:
    """All that a run and an operator do with one."""
    problems = store.check(path)
    assert bool(problems) == (store.newest_valid(path.parent, log=lambda line: None) is None)
    store.load(path, [(ADDRESS, torch.zeros(64))])


def pair(
    prefix: Path, version: int, code: int, counts: tuple[int, int], lengths: list[int], pointers: list[int]
) -> None:
    body = struct.pack(
        f"<{len(lengths)}i{len(pointers)}q{len(lengths) + 1}q", *lengths, *pointers, *range(len(lengths) + 1)
    )
    Path(f"{prefix}.idx").write_bytes(HEADER.pack(MAGIC, version, code, *counts) + body)
    np.arange(100, dtype=np.uint16).tofile(f"{prefix}.bin")


def use_pair(prefix: Path) -> None:
    data = IndexedDataset(str(prefix), verify=True)
    for document in range(min(len(data), 8)):
        data.document(document)
    data.read(0, data.total_tokens)


def use_text(path: Path) -> None:
    bad = texts = 0
    for found, problems in documents(expand_inputs([str(path)]), ["text"]):
        texts, bad = texts + len(found), bad + len(problems)
    if bad or not texts:
        raise ValueError(f"{bad} bad lines, {texts} texts")


def use_job(path: Path) -> None:
    check(load_job(path))


def job(text: str) -> Callable[[Path], Callable[[], None]]:
    def make(folder: Path) -> Callable[[], None]:
        path = folder / "job.toml"
        path.write_text(text)
        return lambda: use_job(path)

    return make


def checkpoint(change: Callable[[Path], object]) -> Callable[[Path], Callable[[], None]]:
    def make(folder: Path) -> Callable[[], None]:
        path = saved(folder)
        change(path)
        return lambda: use_checkpoint(path)

    return make


def poisoned(name: str) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(pickle.dumps(Payload(path.parent / "pwned")))


def dataset(*arguments: Any) -> Callable[[Path], Callable[[], None]]:
    def make(folder: Path) -> Callable[[], None]:
        pair(folder / "d", *arguments)
        return lambda: use_pair(folder / "d")

    return make


def text_file(name: str, content: bytes) -> Callable[[Path], Callable[[], None]]:
    def make(folder: Path) -> Callable[[], None]:
        (folder / name).write_bytes(content)
        return lambda: use_text(folder / name)

    return make


def gzip_bomb(folder: Path) -> Callable[[], None]:
    """One line of half a gigabyte from half a megabyte."""
    with gzip.open(folder / "a.jsonl.gz", "wb", compresslevel=9) as file:
        for _ in range(512):
            file.write(bytes(MIB))
    return lambda: use_text(folder / "a.jsonl.gz")


def tokenizer(type_: str, name: str, content: bytes) -> Callable[[Path], Callable[[], None]]:
    def make(folder: Path) -> Callable[[], None]:
        (folder / name).write_bytes(content)
        return lambda: (load_tokenizer(type_, str(folder / name)).encode("text"), None)[1]  # type: ignore[attr-defined]

    return make


def sidecar(folder: Path) -> Callable[[], None]:
    (folder / "s.json").write_bytes(b'{"tokenizer":' * 50_000)
    return lambda: (read_sidecar(folder / "s.json"), None)[1]


TAR = b"../../../../tmp/megapre-escaped".ljust(100, b"\0") + b"0000644\0" + bytes(404)
CASES: dict[str, Callable[[Path], Callable[[], None]]] = {
    "checkpoint: pickle as shard": checkpoint(poisoned(disk.shard_name(0))),
    "checkpoint: pickle as manifest": checkpoint(poisoned(disk.manifest_name(0))),
    "checkpoint: pickle as root": checkpoint(poisoned(disk.ROOT)),
    "checkpoint: signed pickle as manifest": checkpoint(
        lambda path: replace_manifest(path, pickle.dumps(Payload(path.parent / "pwned")))
    ),
    "checkpoint: chunk of a terabyte": checkpoint(
        lambda path: (resigned(path, chunk=2**40, bytes=2**40, crc32=[0]), sparse(path / disk.shard_name(0), 2**40))
    ),
    "checkpoint: tensor of 2^62 elements": checkpoint(
        lambda path: resigned(path, piece_shape=[2**62], piece_size=[2**62], piece_end=2**62)
    ),
    "checkpoint: root of 8 GiB": checkpoint(lambda path: sparse(path / disk.ROOT, 8 * 2**30)),
    "checkpoint: root nested 100,000 deep": checkpoint(
        lambda path: (path / disk.ROOT).write_bytes(_sealed(b'{"state":' + b"[" * 100_000))
    ),
    "checkpoint: a billion writers": checkpoint(lambda path: reseal(path, world=10**9)),
    "checkpoint: piece begins past the end": checkpoint(lambda path: resigned(path, piece_begin=2**61)),
    "checkpoint: shard named ../../etc/passwd": checkpoint(
        lambda path: resigned(path, piece_key="../../etc/passwd", piece_name="../../etc/passwd")
    ),
    "checkpoint: shard is a pipe": checkpoint(lambda path: fifo(path / disk.shard_name(0))),
    "checkpoint: root is a pipe": checkpoint(lambda path: fifo(path / disk.ROOT)),
    "checkpoint: shard links to itself": checkpoint(
        lambda path: ((path / disk.shard_name(0)).unlink(), (path / disk.shard_name(0)).symlink_to(disk.shard_name(0)))
    ),
    "dataset: 2^40 sequences": dataset(1, 8, (2**40, 2**40), [1], [0]),
    "dataset: length -1": dataset(1, 8, (2, 3), [-1, 101], [0, 2]),
    "dataset: pointers that overlap": dataset(1, 8, (2, 3), [50, 50], [0, 20]),
    "dataset: unknown token type": dataset(1, 200, (1, 2), [5], [0]),
    "dataset: sidecar nested 50,000 deep": sidecar,
    "archive: half a gigabyte in half a megabyte": gzip_bomb,
    "archive: window of 2 GiB": text_file(
        "a.jsonl.zst", struct.pack("<I", zstandard.MAGIC_NUMBER) + bytes([0, 21 << 3]) + bytes([1, 0, 0]) + b"x" * 64
    ),
    "archive: tar of ../ under a name of its own": text_file("a.jsonl", TAR),
    "text: nested 100,000 deep": text_file("a.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n"),
    "text: number of 10 million digits": text_file("a.jsonl", b'{"text": "a", "n": ' + b"9" * 10**7 + b"\n"),
    "parquet: magic and noise": text_file("a.parquet", b"PAR1" + bytes(2**16) + b"\xff\xff\xff\x7fPAR1"),
    "tokenizer: pickle": tokenizer("HuggingFaceTokenizer", "tokenizer.json", pickle.dumps(Payload(Path("pwned")))),
    "tokenizer: merges of what is not there": tokenizer(
        "HuggingFaceTokenizer", "tokenizer.json",
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["b c", "bc bc"]}}',
    ),
    "tokenizer: noise as a SentencePiece model": tokenizer("SentencePieceTokenizer", "t.model", os.urandom(4096)),
    "job: kernel that names a module": job('[kernels]\nnorm = "os:system"\n'),
    "job: objective that names a module": job('[data]\nobjective = "os.system"\npaths = ["x"]\n'),
    "job: nested 100,000 deep": job("[model]\nlayers = " + "[" * 100_000),
    "job: number of a million digits": job("[model]\nlayers = " + "9" * 10**6),
    "job: 64 MiB": job("# " + "x" * 2**26),
    "job: shell in a path": job('[train]\nrun_dir = "$(touch pwned)`touch pwned`"\nsteps = 0\n'),
}  # fmt: skip


def _sealed(text: bytes) -> bytes:
    body = b'"body": ' + text + b"}\n"
    return b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'",\n' + body


def peak() -> int:
    """Most resident bytes since the last reset."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) * 1024


def virtual() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main(root: Path) -> None:
    """Run every case in a folder of its own under ``root``."""
    events: list[str] = []
    allowed = [""]

    def guard(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            events.append(f"{event} {arguments!r}"[:200])
        if event == "open" and isinstance(arguments[0], str):
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            inside = os.path.abspath(arguments[0]).startswith((allowed[0], "/dev/null", "/proc/self"))
            if flags & (os.O_WRONLY | os.O_RDWR) and not inside:
                events.append(f"wrote {arguments[0]}")

    # What the libraries load lazily is theirs: each reader reads something sound first.
    warm = root / "warm"
    warm.mkdir()
    store.check(saved(warm))
    use_text_warm = warm / "a.jsonl"
    use_text_warm.write_text('{"text": "a"}\n')
    use_text(use_text_warm)
    sys.addaudithook(guard)
    for name, make in CASES.items():
        folder = root / hashlib.sha256(name.encode()).hexdigest()[:8]
        folder.mkdir()
        allowed[0] = str(folder)
        use = make(folder)
        before = set(folder.rglob("*"))
        events.clear()
        Path("/proc/self/clear_refs").write_text("5")
        resident, began = peak(), time.monotonic()
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (virtual() + SPARE, limits[1]))
        outcome = "accepted"
        try:
            use()
        except (CheckpointError, ValueError) as error:
            outcome = f"refused: {str(error).splitlines()[0][:160]}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"[:200]
        resource.setrlimit(resource.RLIMIT_AS, limits)
        found = {
            "case": name,
            "outcome": outcome,
            "events": list(events),
            "new": sorted(str(path) for path in set(folder.rglob("*")) - before),
            "mib": (peak() - resident) / MIB,
            "seconds": time.monotonic() - began,
        }
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
