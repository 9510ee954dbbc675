"""The command line: verbs, exit codes, one sentence for a bad job, before torch and in no time."""

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from megapre import cli
from megapre.checkpoint.store import SingleProcess
from megapre.config.check import ConfigError
from megapre.config.load import to_toml
from megapre.resilience.lock import run_lock
from megapre.verify.cells import parse
from tests.training.jobs import corpus
from tests.training.jobs import job as job_of

ROOT = Path(__file__).parents[1]


def megapre(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "RANK", "WORLD_SIZE"))}
    command = [sys.executable, "-m", "megapre", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=clean | env)


@pytest.fixture
def job(tmp_path: Path) -> str:
    path = tmp_path / "job.toml"
    path.write_text("[data]\npaths = ['nowhere_text_document']\n")
    return str(path)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["model.heads=3"], "megapre: model.hidden (64) must be a multiple of model.heads (3)"),
        (["model.headz=3"], "megapre: unknown key model.headz in override 'model.headz=3'; did you mean model.heads?"),
        (["parallel.tensor=8"], "megapre: model.heads (4) must be a multiple of parallel.tensor (8)"),
        ([], "nowhere_text_document"),
        (["parallel.tensor=2"], "nowhere_text_document"),
        (["data.paths=[]"], "data.paths is empty"),
    ],
)
def test_a_bad_job_gives_one_sentence_and_code_2(job: str, settings: list[str], sentence: str) -> None:
    start = time.monotonic()
    done = megapre("train", job, *settings)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("megapre: ") and sentence in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert time.monotonic() - start < 10


def test_a_bad_job_is_refused_without_torch(job: str) -> None:
    """The check of the data included; parallel.tensor = 2 is refused before a rank is started."""
    code = (
        "import sys; from megapre.cli import main;"
        "codes = [main(['train', sys.argv[1], *o]) for o in (['model.heads=3'], [], ['parallel.tensor=2'])];"
        "sys.exit(0 if codes == [2, 2, 2] and 'torch' not in sys.modules else 1)"
    )
    done = subprocess.run([sys.executable, "-c", code, job], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["blocked", "short", "used"])
def test_a_folder_that_cannot_hold_the_run_is_one_sentence_and_left_as_it_was(kind: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "file" / "run" if kind == "blocked" else tmp_path / "run"
    (tmp_path / "file").write_text("a file, where a folder is needed")
    small = job_of(corpus(tmp_path / "text"), run_dir, parse("1x1x1"), steps=2, interval=0)
    (tmp_path / "job.toml").write_text(to_toml(small))
    command = [sys.executable, "-m", "megapre", "train", str(tmp_path / "job.toml")]
    if kind == "short":  # a file system that takes 4 KiB a file
        command = ["bash", "-c", f"ulimit -f 4; exec {' '.join(command)}"]
    holder = run_lock(run_dir, 0, SingleProcess()) if kind == "used" else nullcontext()
    with holder:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    told = {
        "blocked": "takes no 65536 bytes on", "short": "File too large): make it writable, make room",
        "used": f"is in use by process {os.getpid()} on",
    }[kind]  # fmt: skip
    assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(run_dir.glob("checkpoints/*")) and not (run_dir / "metrics.jsonl").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_rank_0_prints_what_all_ranks_share(job: str, rank: str) -> None:
    launch = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
    done = megapre("train", job, "model.heads=3", **launch, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert done.returncode == 2
    assert bool(done.stderr) is (rank == "0")


def test_a_wrong_world_size_is_refused(job: str) -> None:
    launch = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}
    done = megapre("train", job, "parallel.data=2", **launch, MASTER_ADDR="h", MASTER_PORT="1")
    assert done.returncode == 2 and "1 x 1 x 2 = 2 ranks but 3 were launched" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["verify", "JOB", "--layouts", "2x2"], "TPxPPxDP"),
        (["verify", "JOB", "--ranks", "0"], "--ranks"),
        (["verify", "JOB", "model.heads=3"], "model.heads (3)"),
        (["generate", "C", "--prompt", "x", "--top-p", "0"], "--top-p must be greater than 0 and at most 1, not 0.0"),
        (["generate", "C", "--prompt", "x", "--temperature", "nan"], "--temperature"),
        (["generate", "C", "--prompt", "x", "--tokens", "0"], "--tokens must be at least 1, not 0"),
        (["checkpoint", "list", "/nonexistent"], "/nonexistent is not a folder"),
    ],
)
def test_other_verbs_refuse_in_one_sentence(
    job: str, arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([job if a == "JOB" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1


def test_help_lists_the_verbs_that_exist() -> None:
    done = megapre("--help")
    assert done.returncode == 0
    for verb in ("train", "plan", "verify", "trace", "kernels", "generate", "checkpoint", "doctor"):
        assert f"\n    {verb}" in done.stdout
    for verb in ("evaluate", "report"):
        assert f"\n    {verb}" not in done.stdout


def test_no_verb_and_unknown_verbs_are_code_2() -> None:
    assert megapre().returncode == 2
    assert megapre("trian").returncode == 2


def test_kernels_names_every_op_and_reason() -> None:
    done = megapre("kernels", "--device", "cpu", "--dtype", "bf16", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    for word in ("layer_norm", "attention", "reference", "picked", "runs on CUDA devices"):
        assert word in done.stdout


def test_checkpoint_of_an_empty_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert cli.main(["checkpoint", "list", str(tmp_path)]) == 0
    assert "no checkpoints" in capsys.readouterr().out
    assert cli.main(["checkpoint", "check", str(tmp_path)]) == 1


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, job: str) -> None:
    def broken(path: str, overrides: list[str]) -> None:
        {}["missing"]

    monkeypatch.setattr(cli, "read_job", broken)
    with pytest.raises(KeyError):
        cli.main(["train", job])


def test_ranks_get_the_job_as_it_was_read(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started alone with a grid of four: one launch of four ranks with the resolved job."""
    from megapre.config.load import from_toml
    from megapre.data import check as data_check
    from megapre.resilience import launcher

    seen: dict[str, object] = {}

    def launch(world: int, target: object, argv: list[str], **options: object) -> int:
        seen.update(world=world, target=target, argv=argv, **options)
        return 75

    monkeypatch.setattr(launcher, "launch", launch)
    monkeypatch.setattr(data_check, "check_data", lambda config: 256)
    for name in (*cli.RANK_VARIABLES, "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["train", job, "parallel.tensor=2", "parallel.data=2", "train.threads=1"]) == 75
    assert seen["world"] == 4 and seen["target"] is cli.train_rank and seen["nnodes"] == 1 and seen["threads"] == 1
    config = from_toml(seen["argv"][0])  # type: ignore[index]
    assert config.parallel.tensor == 2 and config.data.paths == ["nowhere_text_document"]


def test_the_allocator_is_set_by_one_restart(job: str, tmp_path: Path) -> None:
    """`megapre train` alone starts itself anew under its allocator settings, with its arguments kept."""
    probe = tmp_path / "megapre_probe.py"
    probe.write_text(
        "import json, os, sys\n"
        "from megapre import cli\n"
        "from megapre.data import check\n"
        "def stop(config):\n"
        "    keys = ('GLIBC_TUNABLES', 'OMP_NUM_THREADS')\n"
        "    print(json.dumps({k: os.environ.get(k) for k in keys} | {'pid': os.getpid(), 'argv': sys.argv[1:]}))\n"
        "    raise SystemExit(0)\n"
        "check.check_data = stop\n"
        "print(os.getpid())\n"
        "cli.main()\n"
    )
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(probe), "train", job, "train.threads=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    first, second, report = done.stdout.splitlines()
    found = json.loads(report)
    assert first == second == str(found["pid"])
    assert "hugetlb=1" in found["GLIBC_TUNABLES"] and found["OMP_NUM_THREADS"] == "1"
    assert found["argv"] == ["train", job, "train.threads=1"]


def test_refusals_are_value_errors() -> None:
    assert issubclass(ConfigError, ValueError)
