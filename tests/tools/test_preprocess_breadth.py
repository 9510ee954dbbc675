"""Every input format gives the same pair; kills, workers, machines and full disks change no byte."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import orjson
import pytest
import zstandard

from megapre.data.indexed import IndexedDataset
from megapre.tokenizers import pieces, preprocess, team
from megapre.tokenizers.documents import batches, lines_before
from megapre.tokenizers.inputs import Span, cut, expand_inputs, frames_complete, share_out
from megapre.tokenizers.preprocess import Job
from megapre.tokenizers.sentences import split_sentences
from tests.tokenizers.test_tokenizers import hostile

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress, ".xz": lzma.compress}


def texts_of(prefix: Path | str, end: int = 0) -> list[str]:
    data = IndexedDataset(f"{prefix}_text_document", verify=True)
    return [bytes(data.document(i)[: -1 if end else None].astype("u1")).decode() for i in range(len(data))]


def job(inputs: list[str], prefix: Path, **changes: object) -> Job:
    return Job(
        **{"inputs": inputs, "prefix": str(prefix), "keys": ["text"], "tokenizer_type": "ByteTokenizer", **changes}
    )


def quiet(message: str) -> None:
    pass


def write(folder: Path, name: str, documents: list[str]) -> str:
    """A file of any format, by its name."""
    path = folder / name
    suffix = path.suffix if path.suffix in PACK and path.suffix else ""
    kind = name.removesuffix(suffix).rsplit(".", 1)[1]
    rows = [{"id": i, "text": text} for i, text in enumerate(documents)]
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "plain.parquet", row_group_size=7)
        content = (folder / "plain.parquet").read_bytes()
    elif kind == "json":
        content = json.dumps(rows, indent=1).encode()
    else:
        content = b"".join(orjson.dumps(row) + b"\n" for row in rows)
    path.write_bytes(PACK[suffix](content))
    return str(path)


@pytest.mark.parametrize("pack", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_every_format_gives_the_same_documents(tmp_path, kind, pack):
    documents = [text for text in hostile(11, 60) if text]
    path = write(tmp_path, f"x.{kind}{pack}", documents)
    report = preprocess.preprocess(job([path], tmp_path / "out", piece_bytes=4000), quiet)
    assert report.documents == len(documents) and report.bad_count == 0
    assert texts_of(tmp_path / "out") == documents


def test_folders_patterns_and_a_byte_order_mark(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfwhole\nfile"))
    (tmp_path / "in" / "deep" / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n')
    (tmp_path / "in" / "notes.bin").write_bytes(b"no input")
    paths = expand_inputs([str(tmp_path / "in"), str(tmp_path / "in" / "*.gz")])
    assert [Path(path).name for path in paths] == ["b.txt.gz", "a.jsonl"]
    preprocess.preprocess(job(paths, tmp_path / "out"), quiet)
    assert texts_of(tmp_path / "out") == ["whole\nfile", "one"]


def test_ranges_of_a_file_share_no_line_and_lose_none(tmp_path):
    """Whatever the cut: against the lines of the whole file."""
    rng = random.Random(5)
    for case in range(300):
        lines = [b"x" * rng.choice([0, 1, 2, 5, 40]) for _ in range(rng.randrange(1, 12))]
        content = b"\n".join(lines) + b"\n" * rng.randrange(2)
        path = tmp_path / "x.jsonl"
        path.write_bytes(
            b"\n".join(b'{"text": "%b"}' % line for line in content.split(b"\n") if line) + b"\n" * rng.randrange(2)
        )
        size = path.stat().st_size
        bounds = sorted({0, size, *(rng.randrange(size + 1) for _ in range(4))})
        found, numbers = [], []
        for start, stop in itertools.pairwise(bounds):
            before = lines_before(str(path), start) if start else 0
            for batch in batches(Span(str(path), start, stop, False), ["text"]):
                found += [texts[0] for texts in batch.texts]
                numbers += [line + before for line in batch.lines]
                assert not batch.bad
        assert found == [line.decode() for line in content.split(b"\n") if line], f"case {case} {bounds}"
        assert numbers == list(range(1, len(found) + 1)), f"case {case} {bounds}"


def test_a_line_above_the_limit_is_reported_and_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr("megapre.tokenizers.documents.BLOCK", 1000)
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "' + b"y" * 50_000 + b'"}\n{"text": "b"}\n')
    for piece in (0, 700, 20_000):
        report = preprocess.preprocess(
            job([str(path)], tmp_path / "o", largest_document=5000, piece_bytes=piece), quiet
        )
        assert texts_of(tmp_path / "o") == ["a", "b"] and report.bad_count == 1
        assert str(report.bad[0]).startswith(f"{path}:2: longer than 5000 bytes")


@pytest.mark.parametrize("pack", [".gz", ".zst", ".xz"])
def test_a_cut_file_keeps_what_came_before_and_says_where_it_broke(tmp_path, pack):
    rng = random.Random(2)
    documents = ["".join(rng.choices("abcdefgh ", k=3000)) for _ in range(400)]
    path = write(tmp_path, f"x.jsonl{pack}", documents)
    os.truncate(path, os.path.getsize(path) // 2)
    report = preprocess.preprocess(job([path], tmp_path / "o"), quiet)
    found = texts_of(tmp_path / "o")
    assert 10 < len(found) < 400 and found == documents[: len(found)]
    assert (
        report.bad_count == 1
        and report.bad[0].line > len(found)
        and "the rest of the file is lost" in str(report.bad[0])
    )


def test_zstandard_frames_are_checked_to_their_end(tmp_path):
    path = tmp_path / "x.zst"
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(os.urandom(300_000) + bytes(400_000))
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    whole = frame + skipped + zstandard.compress(b"") + frame
    for size in [0, len(frame), len(frame) + len(skipped), len(whole)]:
        path.write_bytes(whole[:size])
        assert frames_complete(str(path))
    for size in (1, 5, 17, 1000, len(frame) - 1, len(frame) + 4, len(whole) - 2):
        path.write_bytes(whole[:size])
        assert not frames_complete(str(path)), size


@pytest.mark.parametrize(
    ("content", "kept", "reason"),
    [
        ('[{"text": "a"}, 7, {"text": "b"}]', ["a", "b"], ":2: a JSON int"),
        ('[{"text": "a"}, {"text": "b"', ["a"], ":2: malformed JSON array"),
        ('[{"text": "a"} {"text": "b"}]', ["a"], "no comma"),
        ('[{"text": "a"}] x', ["a"], "something follows"),
        ('[{"text": "a"}, {"text": "\\ud800"}]', ["a"], ":2: "),
        ('[{"text": "a"}, ' + "[" * 200_000, ["a"], "the rest of the file is lost"),
    ],
)
def test_malformed_arrays(tmp_path, content, kept, reason):
    (tmp_path / "x.json").write_text(content)
    report = preprocess.preprocess(job([str(tmp_path / "x.json")], tmp_path / "o"), quiet)
    assert texts_of(tmp_path / "o") == kept
    assert report.bad_count == 1 and reason in str(report.bad[0])


def test_a_key_that_is_there_twice_is_a_bad_line(tmp_path):
    lines = ['{"text": "a", "text": "b"}', '{"text": "say \\"text\\"", "meta": {"text": 1}}', '{"text": "c"}']
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    report = preprocess.preprocess(job([str(tmp_path / "x.jsonl")], tmp_path / "o"), quiet)
    assert texts_of(tmp_path / "o") == ['say "text"', "c"]
    assert [str(bad).split(": ", 1)[1] for bad in report.bad] == ["the key 'text' is there twice"]


def test_sentences_and_end_of_document(tmp_path):
    text = "Dr. Smith went to no. 5. He said “Go!” and left.\n\nIt was 3.14 p.m. 今日は。 終わり！"
    assert split_sentences(text) == [
        "Dr. Smith went to no. 5.", "He said “Go!” and left.", "It was 3.14 p.m.", "今日は。", "終わり！",
    ]  # fmt: skip
    for hard in hostile(3, 300):
        joined = "".join("".join(split_sentences(hard)).split())
        assert joined == "".join(hard.split())
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "One. Two!"}) + "\n" + json.dumps({"text": "Three"}))
    report = preprocess.preprocess(
        job([str(tmp_path / "x.jsonl")], tmp_path / "o", split_sentences=True, append_eod=True), quiet
    )
    assert report.prefixes == [str(tmp_path / "o_text_sentence")]
    data = IndexedDataset(report.prefixes[0], verify=True)
    assert data.sequence_lengths.tolist() == [4, 5, 6] and data.document_bounds.tolist() == [0, 2, 3]
    assert data.document(0).tolist() == [*b"One.Two!", 256]


def corpus(folder: Path, files: int = 3, documents: int = 300) -> list[str]:
    rng = random.Random(9)
    made = []
    for number in range(files):
        texts = ["".join(rng.choices("abc \n", k=rng.randrange(1, 900))) for _ in range(documents)]
        made.append(write(folder, f"f{number}.jsonl", texts))
    return made


def files_of(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")]


def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(tmp_path):
    """kill -9 of the process group after each of several delays, on runs of two workers, until one finishes."""
    inputs = corpus(tmp_path)
    code = (
        "import sys; from megapre.tokenizers.preprocess import Job, preprocess\n"
        f"job = Job({inputs!r}, sys.argv[1], ['text'], 'ByteTokenizer', append_eod=True, workers=2, piece_bytes=9000)\n"
        "preprocess(job)"
    )

    def start(prefix: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, str(prefix)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)

    straight = start(tmp_path / "a")
    assert straight.wait() == 0, straight.stderr.read()
    kills, resumed = 0, ""
    parts = tmp_path / "b.parts"
    while kills < 3:
        victim = start(tmp_path / "b")
        wanted = len(list(parts.glob("0*.json"))) + 4
        while victim.poll() is None and len(list(parts.glob("0*.json"))) < wanted:
            time.sleep(0.002)
        if victim.poll() is not None:
            break
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        kills += 1
        assert not (tmp_path / "b_text_document.idx").exists()
    last = start(tmp_path / "b")
    resumed = last.communicate()[1]
    assert last.returncode == 0, resumed
    assert kills and "were finished by an earlier run" in resumed
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert not parts.exists() and not list(tmp_path.glob("*.lock"))


def test_other_input_or_options_drop_what_was_left(tmp_path):
    inputs = corpus(tmp_path, files=2, documents=40)
    base = job(inputs, tmp_path / "o", piece_bytes=3000)

    def stop(message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess.preprocess(job(inputs, tmp_path / "o", piece_bytes=3000, log_interval=30), stop_after(2))
    left = len(list((tmp_path / "o.parts").glob("0*.json")))
    assert left > 0
    said: list[str] = []
    report = preprocess.preprocess(base, said.append)
    assert report.resumed == left
    with pytest.raises(KeyboardInterrupt):
        preprocess.preprocess(job(inputs, tmp_path / "o", piece_bytes=3000, log_interval=30), stop_after(2))
    os.utime(inputs[0], ns=(1, 1))
    report = preprocess.preprocess(base, said.append)
    assert report.resumed == 0 and any("its shards are dropped" in line for line in said)


def stop_after(lines: int):
    seen: list[str] = []

    def log(message: str) -> None:
        seen.append(message)
        if len(seen) > lines:
            raise KeyboardInterrupt

    return log


def test_two_runs_of_one_output_are_refused(tmp_path):
    inputs = corpus(tmp_path, files=1, documents=5)
    lock = preprocess._lock(str(tmp_path / "o.lock"))
    with pytest.raises(ValueError, match="another run is writing"):
        preprocess.preprocess(job(inputs, tmp_path / "o"), quiet)
    os.close(lock)


@pytest.mark.parametrize("where", ["shard", "merge"])
def test_a_full_disk_keeps_finished_pieces(tmp_path, monkeypatch, where):
    inputs = corpus(tmp_path, files=2, documents=100)
    preprocess.preprocess(job(inputs, tmp_path / "a", piece_bytes=9000), quiet)
    whole, count = pieces.Shard.finish, 0

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def finish(self: pieces.Shard) -> list[int]:
        nonlocal count
        count += 1
        return whole(self) if count < 4 else full()

    with monkeypatch.context() as patch:
        if where == "shard":
            patch.setattr(pieces.Shard, "finish", finish)
        else:
            patch.setattr("megapre.data.merge._reserve", full)
        with pytest.raises(OSError, match="No space left"):
            preprocess.preprocess(job(inputs, tmp_path / "b", piece_bytes=9000), quiet)
    assert not list(tmp_path.glob("b_text_document*")) and not list((tmp_path / "b.parts").glob("*.tmp-*"))
    report = preprocess.preprocess(job(inputs, tmp_path / "b", piece_bytes=9000), quiet)
    assert report.resumed >= 3 and files_of(tmp_path / "a") == files_of(tmp_path / "b")


FULL = """
set -e
mount -t tmpfs -o size=3m tmpfs "$1"
shift
folder=$1 out=$2
shift 2
"$@" --output-prefix "$folder/o" && exit 9 || test $? = 2
ls "$folder"/o_text_document* 2>/dev/null && exit 8
ls "$folder"/o.parts/0*.json > /dev/null || exit 7
mount -o remount,size=64m "$folder"
"$@" --output-prefix "$folder/o"
cp "$folder"/o_text_document.* "$out"
"""


@pytest.mark.nightly
def test_a_disk_that_is_really_full_and_then_is_not(tmp_path):
    """A file system of 3 MB in a mount namespace of its own, later one of 64 MB; other input is 10 MB."""
    probe = ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this user may not mount in a namespace of its own")
    rng = random.Random(1)
    texts = ["".join(rng.choices("abc \n", k=2000)) for _ in range(5000)]
    path = write(tmp_path, "x.jsonl", texts)
    for name in ("small", "a", "out"):
        (tmp_path / name).mkdir()
    code = (
        "import sys; import megapre.tokenizers.inputs as inputs; inputs.SMALLEST_PIECE = 500_000\n"
        f"sys.path.insert(0, {str(TOOL.parents[1])!r})\nimport tools.preprocess_data as tool\nsys.exit(tool.main())"
    )
    command = [sys.executable, "-c", code, "--tokenizer-type", "ByteTokenizer", "--input", path, "--workers", "2"]
    alone = subprocess.run([*command, "--output-prefix", str(tmp_path / "a" / "o")], capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    places = [str(tmp_path / name) for name in ("small", "small", "out")]
    done = subprocess.run(["unshare", "--mount", "--map-root-user", "sh", "-c", FULL, "sh", *places, *command],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr and "were finished by an earlier run" in done.stderr
    assert files_of(tmp_path / "a" / "o") == files_of(tmp_path / "out" / "o")


@pytest.mark.nightly
def test_a_line_of_a_gigabyte_is_reported_in_bounded_memory(tmp_path):
    """As plain lines (sparse), an array and packed: found at its line, with far less memory than it has bytes."""
    path, size = tmp_path / "x.jsonl", 1 << 30
    with open(path, "wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        file.seek(size, os.SEEK_CUR)
        file.write(b'"}\n{"text": "b"}\n')
    with gzip.open(tmp_path / "y.jsonl.gz", "wb", compresslevel=1) as packed, open(path, "rb") as file:
        while block := file.read(1 << 24):
            packed.write(block)
    with open(tmp_path / "z.json", "wb") as file:
        file.write(b'[{"text": "a"}, {"text": "')
        for _ in range(size >> 20):
            file.write(b"y" * (1 << 20))
        file.write(b'"}]')
    code = (
        "import resource, sys; from megapre.tokenizers.preprocess import Job, preprocess\n"
        "r = preprocess(Job([sys.argv[1]], sys.argv[2], ['text'], 'ByteTokenizer', workers=2, piece_bytes=1 << 28))\n"
        "kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)\n"
        "print(r.documents, r.bad_count, max(resource.getrusage(kind).ru_maxrss for kind in kinds) // 1024)"
    )
    for name, documents, said in (("x.jsonl", 2, "x.jsonl:2: longer"), ("y.jsonl.gz", 2, "y.jsonl.gz:2: longer"),
                                  ("z.json", 1, "a value longer than")):  # fmt: skip
        command = [sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / "o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and said in done.stderr, done.stderr
        found, bad, resident = map(int, done.stdout.split())
        assert (found, bad) == (documents, 1) and resident < 600, f"{name}: {resident} MB"


@pytest.mark.parametrize("ranks", [2, 3])
def test_processes_of_a_launch_share_the_input_and_write_the_same_bytes(tmp_path, ranks):
    """As srun does: the same command with Slurm's variables, meeting through files."""
    inputs = corpus(tmp_path)
    alone = [sys.executable, str(TOOL), "--tokenizer-type", "ByteTokenizer", "--append-eod", "--input", *inputs]
    environment = {**os.environ, "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NTASKS": str(ranks)}
    code = (
        "import runpy, sys\nimport megapre.tokenizers.inputs as inputs\ninputs.SMALLEST_PIECE = 20000\n"
        f"sys.argv = sys.argv[1:]\nsys.path.insert(0, {str(TOOL.parents[1])!r})\n"
        "import tools.preprocess_data as tool\nsys.exit(tool.main())"
    )
    command = [sys.executable, "-c", code, *alone[1:]]
    done = subprocess.run([*command, "--output-prefix", str(tmp_path / "a")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    started = [
        subprocess.Popen(
            [*command, "--output-prefix", str(tmp_path / "b")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**environment, "SLURM_PROCID": str(rank)},
        )
        for rank in range(ranks)
    ]  # fmt: skip
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0] * ranks, said
    assert [bool(out) for out, _ in said] == [True] + [False] * (ranks - 1)
    assert said[0][0].split(":")[0] == done.stdout.split(":")[0]
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("b")) == [
        "b_text_document.bin", "b_text_document.idx", "b_text_document.json",
    ]  # fmt: skip


def test_a_launch_without_a_name_or_half_of_one_is_refused(tmp_path, monkeypatch):
    """Ranks of two launches must never meet in one folder; MPICH's launcher gives no name without MPI."""
    for launch in team.LAUNCHES:
        for name in (*launch[:2], *launch[2], team.NAMED):
            monkeypatch.delenv(name, raising=False)
    assert team.find_team(str(tmp_path / "t"), quiet).size == 1
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setattr(team, "_mpi", lambda: None)
    with pytest.raises(ValueError, match=r"PMI_RANK = 1 .* install mpi4py, or set MEGAPRE_LAUNCH"):
        team.find_team(str(tmp_path / "t"), quiet)
    monkeypatch.setenv("MEGAPRE_LAUNCH", "a/b")
    assert team.find_team(str(tmp_path / "t"), quiet).folder == tmp_path / "t-a_b"
    monkeypatch.setenv("PMI_RANK", "2")
    with pytest.raises(ValueError, match="PMI_RANK = 2 is not below PMI_SIZE = 2"):
        team.find_team(str(tmp_path / "t"), quiet)


def test_a_process_that_fails_stops_the_others(tmp_path):
    path = write(tmp_path, "x.jsonl", ["a"])
    command = [sys.executable, str(TOOL), "--input", path, "--output-prefix", str(tmp_path / "o")]
    command += ["--tokenizer-model", "/nowhere"]
    environment = {**os.environ, "SLURM_JOB_ID": "78", "SLURM_NTASKS": "2"}
    started = [
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**environment, "SLURM_PROCID": str(rank)})
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [2, 1] and "'/nowhere' does not exist" in said[0]


def test_shares_of_pieces_are_even_and_whole(tmp_path):
    pieces = cut(corpus(tmp_path), 5000)
    for ranks in (1, 2, 3, 7, 500):
        shares = share_out(pieces, ranks)
        assert len(shares) == ranks and shares[0][0] == 0 and shares[-1][1] == len(pieces)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(shares))
        sizes = [sum(piece.size for piece in pieces[a:b]) for a, b in shares]
        assert max(sizes) <= sum(sizes) / ranks + 2 * max(piece.size for piece in pieces)


def test_a_numbered_set_holds_the_same_documents(tmp_path):
    inputs = corpus(tmp_path)
    preprocess.preprocess(job(inputs, tmp_path / "a", piece_bytes=9000), quiet)
    report = preprocess.preprocess(job(inputs, tmp_path / "b", piece_bytes=9000, shard_tokens=60_000), quiet)
    manifest = json.loads((tmp_path / "b_text_document.manifest.json").read_text())
    assert manifest["pairs"] == [Path(prefix).name for prefix in report.prefixes] and len(report.prefixes) > 3
    whole = IndexedDataset(str(tmp_path / "a_text_document"))
    sets = [IndexedDataset(prefix, verify=True) for prefix in report.prefixes]
    assert [t for data in sets for t in data.tokens.tolist()] == whole.tokens.tolist()
    assert sum(len(data) for data in sets) == len(whole) and max(data.total_tokens for data in sets) <= 60_000


def test_a_worker_that_is_killed_is_an_error_that_says_so(tmp_path, monkeypatch):
    from megapre.tokenizers import workers

    with pytest.raises(workers.WorkerError, match="killed by SIGKILL"):
        list(workers.run(_make_suicide, None, [1, 2, 3], 2, quiet))


def _make_suicide(setup: object):
    return lambda item, progress: os.kill(os.getpid(), signal.SIGKILL)
