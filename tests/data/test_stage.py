"""``data.stage``: whole copies or none, the same batches, one copier a node, and nothing of others touched."""

from __future__ import annotations

import json
import os
import threading
from itertools import count, islice
from pathlib import Path

import pytest

from megapre import cli
from megapre.config.load import to_toml
from megapre.data import sidecar, stage
from megapre.data.check import check_data
from megapre.data.loader import Loader
from megapre.data.stage import Stage, look
from megapre.verify.cells import parse
from tests.data.corpora import VOCAB, job, write_pair
from tests.data.test_loader import same
from tests.training import jobs


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(sidecar, "BLOCK_BYTES", 512)
    monkeypatch.setattr(stage, "PIECE", 100)


@pytest.fixture
def sources(tmp_path):
    """A pair and a manifest of two, in a folder of their own."""
    folder = tmp_path / "shared"
    folder.mkdir()
    for seed, name in enumerate(("a", "b", "c")):
        write_pair(folder / name, [37] * (40 + 20 * seed), seed=seed)
    (folder / "set.manifest.json").write_text(json.dumps({"pairs": ["b", "c"]}))
    return folder


def config(sources: Path, place: Path | str, **data):
    return job([str(sources / "a"), str(sources / "set.manifest.json")], weights=[1.0, 2.0], stage=str(place), **data)


def copy_all(of, stopped=lambda: False) -> list[str]:
    """Stage a job; what was said."""
    said: list[str] = []
    assert stage.stage(of, stopped, said.append)
    return said


def copies(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.glob("megapre-*/*") if path.suffix != ""}


def test_the_same_batches_are_read_from_the_copies(tmp_path, sources):
    staged, plain = config(sources, tmp_path / "node"), config(sources, "")
    assert check_data(staged) == VOCAB and copy_all(plain) == []
    assert "9 of 9 files" in copy_all(staged)[0] and copy_all(staged) == []
    loaders = [Loader(each, vocab_size=VOCAB, data_rank=0, data_size=1) for each in (staged, plain)]
    opened = [source.dataset._bin.path for source in loaders[0]._samples.sources]
    assert len(opened) == 3 and all(path.startswith(f"{tmp_path}/node/megapre-{os.getuid()}/") for path in opened)
    for ours, theirs in islice(zip(*loaders), 60):
        assert same(ours, theirs)
    for loader in loaders:
        loader.close()


def test_remote_pairs_too(tmp_path, sources):
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for path in sources.iterdir():
        memory.pipe_file(f"/staged/{path.name}", path.read_bytes())
    try:
        remote = config(Path("/"), tmp_path / "node", cache_dir=str(tmp_path / "cache"))
        urls = ["memory://staged/a", "memory://staged/set.manifest.json"]
        remote = job(urls, weights=[1.0, 2.0], stage=remote.data.stage, cache_dir=remote.data.cache_dir)
        copy_all(remote)
        ours, theirs = (Loader(c, vocab_size=VOCAB, data_rank=0, data_size=1) for c in (remote, config(sources, "")))
        assert all(str(tmp_path / "node") in source.dataset._bin.path for source in ours._samples.sources)
        for a, b in islice(zip(ours, theirs), 20):
            assert same(a, b)
        ours.close()
        theirs.close()
    finally:
        memory.rm("/staged", recursive=True)


@pytest.mark.parametrize("spoil", [False, True])
def test_a_stopped_copy_goes_on_and_a_spoilt_part_is_noticed(tmp_path, sources, monkeypatch, spoil):
    each, read = config(sources, tmp_path / "node"), []
    asked = count()
    assert not stage.stage(each, lambda: next(asked) > 40, [].append)
    parts = list(tmp_path.glob("node/megapre-*/*.partial"))
    assert len(parts) == 1 and parts[0].name.startswith("a-") and parts[0].stat().st_size > 512
    if spoil:
        parts[0].write_bytes(bytes(512) + parts[0].read_bytes()[512:])
    opened = stage._open

    class Counting:
        def __init__(self, path):
            self.name, self.file = os.path.basename(path), opened(path)
            self.seek = self.file.seek

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def read(self, size):
            read.append((self.name, size))
            return self.file.read(size)

    monkeypatch.setattr(stage, "_open", Counting)
    name, kept = "a" + Path(parts[0].stem).suffix, parts[0].stat().st_size // 512 * 512
    copy_all(each)
    size = (sources / name).stat().st_size
    assert sum(number for path, number in read if path == name) == size - kept + (size if spoil else 0)
    for path in sources.glob("?.*"):
        found = look(str(path))
        assert found and Stage(each.data.stage).place(found).read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob("node/megapre-*/*.partial"))


def test_a_damaged_original_is_refused_and_leaves_nothing_under_its_name(tmp_path, sources):
    path = sources / "a.bin"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.bin has digest \w{12} where its record says \w{12}"):
        copy_all(config(sources, tmp_path / "node"))
    assert not any(name.startswith("a-") and ".bin" in name for name in copies(tmp_path / "node"))


def test_a_small_disk_is_refused_before_a_byte_is_copied(tmp_path, sources, monkeypatch):
    whole = os.statvfs

    class Small:
        def __init__(self, path):
            self.f_frsize, self.f_bavail = 1, 9000

    monkeypatch.setattr(os, "statvfs", Small)
    with pytest.raises(ValueError, match=r"has 9e-06 GB free, and the 9 of 9 files .* take 1\.\d+e-05 GB: make room"):
        copy_all(config(sources, tmp_path / "node"))
    assert copies(tmp_path / "node") == {}
    monkeypatch.setattr(os, "statvfs", whole)


def test_a_disk_that_fills_meanwhile_is_one_sentence(tmp_path, sources, monkeypatch):
    real = os.replace

    def full(source, target):
        if str(target).endswith(".idx"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match=r"a\.idx .* was not copied .*No space left on device"):
        copy_all(config(sources, tmp_path / "node"))


def test_errors_that_pass_are_waited_out(tmp_path, sources, monkeypatch):
    opened, left = stage._open, [2]

    def flaky(path):
        if left[0]:
            left[0] -= 1
            raise OSError(5, "Input/output error")
        return opened(path)

    monkeypatch.setattr(stage, "_open", flaky)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert "9 of 9" in copy_all(config(sources, tmp_path / "node"))[0]
    left[0] = 99
    with pytest.raises(ValueError, match=r"was not copied .*Input/output error"):
        copy_all(config(sources, tmp_path / "other"))


def test_processes_of_a_node_copy_once(tmp_path, sources):
    each, said = config(sources, tmp_path / "node"), []
    threads = [threading.Thread(target=lambda: said.extend(copy_all(each))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(said) == 1, said


def test_who_waits_for_another_copier_can_be_stopped(tmp_path, sources):
    each = config(sources, tmp_path / "node")
    store, asked = Stage(each.data.stage), count()
    store.create()
    with store.alone(lambda: False) as held:
        assert held and not stage.stage(each, lambda: next(asked) > 2, [].append)


def test_another_version_is_another_copy_and_what_is_not_ours_stays(tmp_path, sources):
    each = config(sources, tmp_path / "node")
    copy_all(each)
    folder = Stage(each.data.stage).folder
    (folder / "notes.txt").write_text("mine")
    before = copies(tmp_path / "node")
    os.utime(sources / "a.bin", ns=(1, 1))
    assert Stage(each.data.stage)(str(sources / "a.bin")) == str(sources / "a.bin"), "not the copy of the old one"
    assert "1 of 9 files" in copy_all(each)[0]
    after = copies(tmp_path / "node")
    assert before.items() <= after.items() and len(after) == len(before) + 1


@pytest.mark.parametrize("kind", ["link", "open"])
def test_a_folder_that_others_can_write_is_refused(tmp_path, sources, kind):
    each = config(sources, tmp_path / "node")
    folder = Stage(each.data.stage).folder
    folder.parent.mkdir()
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(ValueError, match=r"where a folder that user \d+ alone writes to is needed"):
        copy_all(each)
    assert not list(tmp_path.glob("elsewhere/*"))


def test_variables_of_the_node(tmp_path, sources, monkeypatch):
    monkeypatch.setenv("SCRATCH_OF_NODE", str(tmp_path / "x"))
    copy_all(config(sources, "$SCRATCH_OF_NODE/y"))
    assert list(tmp_path.glob("x/y/megapre-*/a-*.bin"))
    with pytest.raises(ValueError, match=r"data\.stage = '\$NO_SUCH_NAME/y' names a variable that is not set"):
        copy_all(config(sources, "$NO_SUCH_NAME/y"))


def test_a_run_reads_its_copies_and_one_that_is_stopped_before_ends_with_75(tmp_path, capsys, monkeypatch):
    prefix = jobs.corpus(tmp_path / "text")
    path = tmp_path / "job.toml"
    path.write_text(to_toml(jobs.job(prefix, tmp_path / "plain", parse("1x1x1"), steps=2, interval=0)))
    assert cli.main(["train", str(path)]) == 0
    staged = ["train", str(path), f"data.stage={tmp_path}/node", f"train.run_dir={tmp_path}/staged"]
    assert cli.main(staged) == 0
    assert "data.stage: 3 of 3 files" in capsys.readouterr().out
    assert jobs.losses(tmp_path / "plain") == jobs.losses(tmp_path / "staged")
    monkeypatch.setattr(stage, "stage", lambda config, stopped, say: False)
    assert cli.main([*staged[:3], f"train.run_dir={tmp_path}/stopped"]) == 75
    assert not list((tmp_path / "stopped").iterdir())
