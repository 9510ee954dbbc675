"""Job files in and out."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from megapre.config.check import ConfigError
from megapre.config.load import digest, from_dict, from_toml, load, to_toml
from megapre.config.schema import Config, DataConfig, TrainConfig


def write(folder: Path, text: str) -> Path:
    path = folder / "job.toml"
    path.write_text(text)
    return path


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, "")) == Config()


def test_round_trip_keeps_every_field_and_awkward_text() -> None:
    odd = Config(
        data=DataConfig(paths=['a "b"\\c', "ü\x7f\n\t"], weights=[0.1, 1e-300], split=[1.0, 0.0, 0.0]),
        train=TrainConfig(run_dir="runs/ü x", seed=2**63 - 1, deterministic=True),
    )
    assert from_toml(to_toml(odd)) == odd


def test_digest_differs_for_every_single_field() -> None:
    seen = {digest(Config())}
    for table in dataclasses.fields(Config):
        values = getattr(Config(), table.name)
        for entry in dataclasses.fields(values):
            old = getattr(values, entry.name)
            new = [*old, *old, 1] if isinstance(old, list) else not old if isinstance(old, bool) else old + type(old)(1)
            changed = dataclasses.replace(values, **{entry.name: new})
            seen.add(digest(dataclasses.replace(Config(), **{table.name: changed})))
    assert len(seen) == 1 + sum(len(dataclasses.fields(getattr(Config(), t.name))) for t in dataclasses.fields(Config))


@pytest.mark.parametrize(
    ("override", "table", "key", "value"),
    [
        ("parallel.tensor=4", "parallel", "tensor", 4),
        ("train.run_dir=runs/a b", "train", "run_dir", "runs/a b"),
        ("train.run_dir=2024", "train", "run_dir", "2024"),
        ('train.run_dir="quoted"', "train", "run_dir", "quoted"),
        ("optimizer.lr=1", "optimizer", "lr", 1.0),
        ("optimizer.lr=3e-4", "optimizer", "lr", 3e-4),
        ("parallel.sequence=true", "parallel", "sequence", True),
        ("data.paths=a,b/c", "data", "paths", ["a", "b/c"]),
        ("data.paths=['a', 'b']", "data", "paths", ["a", "b"]),
        ("data.paths=", "data", "paths", []),
        ("parallel.layers_per_stage=1,3", "parallel", "layers_per_stage", [1, 3]),
        ("data.split=[1,0,0]", "data", "split", [1.0, 0.0, 0.0]),
        (" train.steps = 7 ", "train", "steps", 7),
    ],
)
def test_overrides(tmp_path: Path, override: str, table: str, key: str, value: object) -> None:
    config = load(write(tmp_path, "[train]\nsteps = 3\n"), [override])
    found = getattr(getattr(config, table), key)
    assert found == value and type(found) is type(value)


def test_the_last_override_wins(tmp_path: Path) -> None:
    assert load(write(tmp_path, ""), ["train.steps=3", "train.steps=5"]).train.steps == 5


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        ("[modle]\nlayers = 1", [], ["[modle]", "[model]"]),
        ("[model]\nlayer = 1", [], ["model.layer", "model.layers"]),
        ("[model]\nxyzzy = 1", [], ["model.xyzzy", "known are", "hidden"]),
        ("model = 3", [], ["model must be a table", "3"]),
        ("[model]\nlayers = 2.0", [], ["model.layers", "an integer", "2.0"]),
        ("[model]\nlayers = true", [], ["model.layers", "an integer", "True"]),
        ("[model]\nbias = 1", [], ["model.bias", "true or false", "1"]),
        ("[optimizer]\nlr = 'x'", [], ["optimizer.lr", "a number", "'x'"]),
        ("[data]\npaths = 'a'", [], ["data.paths", "a list of strings", "'a'"]),
        ("[data]\npaths = [1]", [], ["data.paths", "a list of strings", "[1]"]),
        ("[parallel]\nlayers_per_stage = [1.5]", [], ["parallel.layers_per_stage", "a list of integers"]),
        ("[model]\nlayers = 1\nlayers = 2", [], ["not valid TOML"]),
        ("[model", [], ["not valid TOML"]),
        ("", ["steps=3"], ["'steps=3'", "table.key=value"]),
        ("", ["train.steps"], ["'train.steps'", "table.key=value"]),
        ("", ["train.stepz=3"], ["train.stepz", "train.steps"]),
        ("", ["trian.steps=3"], ["[trian]", "[train]"]),
        ("", ["train.steps=many"], ["train.steps", "an integer", "'many'"]),
        ("", ["train.steps=1\n[model]"], ["cannot be printed"]),
    ],
)
def test_refusals_name_key_value_and_what_is_wanted(
    tmp_path: Path, text: str, overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(write(tmp_path, text), overrides)
    message = str(refusal.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: No such file"):
        load(tmp_path / "none.toml")
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "b.toml")


def test_an_integer_too_large_for_a_float_is_no_crash() -> None:
    assert from_dict({"optimizer": {"lr": 10**400}}).optimizer.lr == float("inf")


def test_config_loads_no_torch() -> None:
    code = "import megapre.config.load, megapre.cli, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
