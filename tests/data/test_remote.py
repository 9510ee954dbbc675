"""Remote pairs give the same samples, within a bounded folder; failures are retried and then told."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from megapre.data.check import check_data
from megapre.data.indexed import IndexedDataset
from megapre.data.loader import Loader
from megapre.data.remote import Cache, RemoteFile
from tests.data.corpora import VOCAB, job, write_pair

fsspec = pytest.importorskip("fsspec")


@pytest.fixture
def pair(tmp_path):
    prefix = write_pair(tmp_path / "a", [37] * 400)
    memory = fsspec.filesystem("memory")
    for suffix in (".bin", ".idx", ".json"):
        with open(prefix + suffix, "rb") as file:
            memory.pipe_file(f"/set/a{suffix}", file.read())
    yield prefix
    memory.rm("/set", recursive=True)


def size_of(path: Path) -> int:
    """Bytes of a block; none when it went while the folder was read."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_the_same_batches_from_anywhere(tmp_path, pair, scheme, monkeypatch):
    monkeypatch.setattr("megapre.data.samples.Cache", lambda folder, limit: Cache(folder, 8192, 1024))
    url = "memory://set/a" if scheme == "memory" else f"file://{pair}"
    cache = tmp_path / "cache"
    config = job([url], cache_dir=str(cache), reset_attention=True)
    assert check_data(config) == VOCAB
    local = Loader(job([pair], reset_attention=True), vocab_size=VOCAB, data_rank=0, data_size=1)
    remote = Loader(config, vocab_size=VOCAB, data_rank=0, data_size=1)
    for a, b in islice(zip(local, remote), 60):
        for x, y in zip(a.microbatches, b.microbatches, strict=True):
            assert torch.equal(x.tokens, y.tokens) and torch.equal(x.segments, y.segments)
        held = sum(map(size_of, cache.glob("*/*.block")))
        assert held <= 8192 + 4 * 1024  # blocks under way
    report = remote.report()
    assert "reads were there" in report and "MB fetched" in report
    assert remote._samples.cache.hits > 50  # of 500; as many as 100 when the reading threads take turns evenly
    local.close()
    remote.close()


def test_a_second_run_finds_its_blocks_and_another_version_does_not(tmp_path, pair):
    def tokens() -> tuple[list[int], int]:
        cache = Cache(str(tmp_path / "cache"), 1 << 20, 1024)
        try:
            data = IndexedDataset("memory://set/a", cache=cache)
            return data.read(100, 5000).tolist(), cache.fetched
        finally:
            cache.close()

    local = IndexedDataset(pair).read(100, 5000).tolist()
    first, again = tokens(), tokens()
    assert first[0] == again[0] == local and first[1] > 9800 and again[1] == 0
    other = write_pair(tmp_path / "b", [37] * 400, seed=8)
    memory = fsspec.filesystem("memory")
    for suffix in (".bin", ".idx", ".json"):
        with open(other + suffix, "rb") as file:
            memory.pipe_file(f"/set/a{suffix}", file.read())
    assert tokens()[0] == IndexedDataset(other).read(100, 5000).tolist() != local


def test_failures_are_retried_and_then_told(tmp_path, pair, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    cache = Cache(str(tmp_path / "cache"), 1 << 20, 1024)
    file, left = RemoteFile("memory://set/a.bin", cache), [2]
    whole = file._system.cat_file

    def flaky(path: str, start: int, end: int) -> bytes:
        if left[0] > 0:
            left[0] -= 1
            raise OSError("connection reset")
        return whole(path, start=start, end=end)

    monkeypatch.setattr(file._system, "cat_file", flaky)
    assert file.pread(10, 5) == np.fromfile(pair + ".bin", "u1")[5:15].tobytes()
    left[0] = 99
    with pytest.raises(OSError, match="connection reset"):
        file.pread(10, 5000)
    left[0] = 0
    monkeypatch.setattr(file._system, "cat_file", lambda path, start, end: b"short")
    with pytest.raises(OSError, match="gave 5 bytes of a block"):
        file.pread(10, 9000)
    cache.close()


def test_missing_files_and_drivers_are_named(tmp_path):
    for url, message in (
        ("memory://nowhere/x", r"x\.bin does not exist; data\.paths"),
        ("nosuch://bucket/x", "no file system that fsspec knows|needs"),
    ):
        with pytest.raises(ValueError, match=message):
            IndexedDataset(url, cache=Cache(str(tmp_path / "c"), 1 << 20))


def test_processes_share_no_folder(tmp_path):
    first, second = Cache(str(tmp_path), 1 << 20), Cache(str(tmp_path), 1 << 20)
    assert first._folder != second._folder
    first.close()
    third = Cache(str(tmp_path), 1 << 20)
    assert third._folder == first._folder and os.path.isdir(second._folder)
    second.close()
    third.close()
