"""Five hundred generated bad jobs: each is refused in one sentence, before torch is loaded, and nothing hangs."""

from __future__ import annotations

import os
import random
import re
import resource
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megapre.config.check import ConfigError, check
from megapre.config.limits import CHOICES, RANGES
from megapre.config.load import from_dict, load
from megapre.kernels.registry import TABLE

ROOT = Path(__file__).resolve().parents[2]
SEED = random.SystemRandom().randrange(10**6)
NUMBERS = [name for name in RANGES if name != "parallel.data"]
Tables = dict[str, dict[str, Any]]
Bad = tuple[str, list[str], int | None]
"""A job file's text, overrides, and launched ranks."""


def good(draw: random.Random) -> Tables:
    """A job that passes."""
    heads, tensor = draw.choice([4, 8]), draw.choice([1, 2, 4])
    pipeline, data, micro = draw.choice([1, 2]), draw.choice([1, 2]), draw.choice([1, 2])
    tables: Tables = {
        "model": {"heads": heads, "hidden": heads * 16, "layers": 4},
        "parallel": {"tensor": tensor, "pipeline": pipeline, "data": data},
        "train": {"global_batch": micro * data * draw.randint(1, 4), "microbatch": micro},
    }
    check(from_dict(tables))
    return tables


def text(tables: Tables) -> str:
    def value(x: Any) -> str:
        if isinstance(x, dict):
            return "{" + ", ".join(f"{k} = {value(v)}" for k, v in x.items()) + "}"
        return str(x).lower() if isinstance(x, bool) else repr(x)

    lines = []
    for name, keys in tables.items():
        lines += [f"[{name}]", *(f"{key} = {value(x)}" for key, x in keys.items())]
    return "\n".join(lines)


def put(tables: Tables, name: str, value: Any) -> Tables:
    table, key = name.split(".")
    tables.setdefault(table, {})[key] = value
    return tables


def unknown_names(draw: random.Random) -> Bad:
    tables = good(draw)
    table, key = draw.choice(NUMBERS).split(".")
    if draw.random() < 0.3:
        tables[draw.choice(["modle", "Train", "optim", "paralel"])] = {}
        return text(tables), [], None
    wrong = key + draw.choice("xyz_")
    if draw.random() < 0.5:
        return text(tables), [f"{table}.{wrong}=1"], None
    return text(put(tables, f"{table}.{wrong}", 1)), [], None


def wrong_types(draw: random.Random) -> Bad:
    return text(put(good(draw), draw.choice(NUMBERS), draw.choice(["3", True, [1], {"a": 1}, "many"]))), [], None


def out_of_range(draw: random.Random) -> Bad:
    name = draw.choice(NUMBERS)
    value: Any = -draw.randint(1, 10**6)
    if draw.random() < 0.2:
        return text(good(draw)), [f"{name}={draw.choice(['nan', 'inf', '-inf', str(2**70)])}"], None
    return text(put(good(draw), name, value)), [], None


def unknown_choices(draw: random.Random) -> Bad:
    name = draw.choice(list(CHOICES))
    return text(put(good(draw), name, -1 if name.endswith("zero") else "".join(draw.sample("abcxyz -_", 5)))), [], None


def indivisible(draw: random.Random) -> Bad:
    tables = good(draw)
    kind = draw.randrange(6)
    if kind == 0:
        put(tables, "model.heads", tables["model"]["heads"] * 16 + draw.randint(1, 9))
    elif kind == 1:
        put(tables, "parallel.data", 2)
        put(tables, "train.microbatch", 2)
        put(tables, "train.global_batch", 4 * draw.randint(0, 9) + draw.randint(1, 3))
    elif kind == 2:
        put(tables, "parallel.pipeline", draw.randint(5, 50))
        put(tables, "train.global_batch", 64)
    elif kind == 3:
        put(tables, "parallel.tensor", 4)
        put(tables, "model.ffn_hidden", 4 * draw.randint(10, 99) + draw.randint(1, 3))
    elif kind == 4:
        put(put(tables, "parallel.context", draw.choice([2, 4])), "model.sequence", 2 * draw.randint(8, 64) + 1)
    else:
        tables["model"] |= {"positions": "rope", "heads": 4, "hidden": 4 * (2 * draw.randint(4, 40) + 1)}
    return text(tables), [], None


UNSUPPORTED: tuple[dict[str, Any], ...] = (
    {"parallel.schedule": "interleaved", "parallel.chunks": 1},
    {"parallel.schedule": "1f1b", "parallel.chunks": 2},
    {"parallel.schedule": "gpipe", "parallel.chunks": 2},
    {"parallel.schedule": "zb-h1", "parallel.chunks": 2},
    {"parallel.schedule": "zb-v", "parallel.chunks": 3},
    {"parallel.schedule": "interleaved", "parallel.chunks": 2, "parallel.pipeline": 2, "train.global_batch": 6,
     "parallel.data": 2, "train.microbatch": 1},
    {"model.architecture": "encoder"},
    {"data.objective": "masked"},
    {"model.architecture": "encoder", "data.objective": "masked", "data.eod_mask_loss": True},
    {"parallel.context": 4, "parallel.context_method": "ulysses", "parallel.tensor": 4},
    {"parallel.context": 2, "parallel.context_method": "ulysses", "model.kv_heads": 1},
    {"parallel.tensor": 4, "model.heads": 12, "model.hidden": 96, "model.kv_heads": 3},
    {"parallel.tensor": 4, "parallel.sequence": True, "model.sequence": 66},
    {"parallel.recompute_layers": 1},
    {"parallel.layers_per_stage": [1, 2, 1]},
    {"parallel.pipeline": 2, "parallel.layers_per_stage": [4, 0]},
    {"parallel.pipeline": 2, "parallel.layers_per_stage": [2, 3]},
    {"precision.dtype": "fp16", "precision.initial_loss_scale": 1000.0},
    {"model.heads": 2048, "model.hidden": 4096, "model.attention_dropout": 0.1},
    {"model.vocab_size": 3, "parallel.tensor": 4},
    {"schedule.warmup": 100, "train.steps": 100},
    {"data.split": [0.5, 0.6, 0.1]},
    {"data.split": [0.0, 1.0, 0.0]},
    {"data.paths": ["a", "b"], "data.weights": [1.0]},
    {"data.paths": ["a", ""]},
    {"train.run_dir": " "},
)  # fmt: skip


def unsupported(draw: random.Random) -> Bad:
    """Settings that are right alone and wrong together, in the file or on the command line."""
    tables, settings = good(draw), draw.choice(UNSUPPORTED)
    overrides = []
    for name, value in settings.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and draw.random() < 0.5:
            overrides.append(f"{name}={value}")
        else:
            put(tables, name, value)
    return text(tables), overrides, None


def wrong_world(draw: random.Random) -> Bad:
    tables = good(draw)
    grid = tables["parallel"]
    return text(tables), [], grid["tensor"] * grid["pipeline"] * grid["data"] + draw.choice([-1, 1, 3]) or 99


def broken_text(draw: random.Random) -> Bad:
    whole = text(good(draw))
    breaks: list[Callable[[], str]] = [
        lambda: whole + "\n[model]\n",
        lambda: whole + "\nlayers = = 3",
        lambda: whole.replace("[train]", "[train"),
        lambda: whole + "\nsteps = " + "[" * 2000,
        lambda: "train = 3",
        lambda: whole + "\n" + "\0",
    ]
    return draw.choice(breaks)(), [], None


def broken_overrides(draw: random.Random) -> Bad:
    wrong = ["steps=3", "train.steps", "=3", "train.=3", ".steps=3", "train.steps=", "train.steps=three", "a.b=1",
             "train.run_dir=\x07", "model.bias=maybe", "data.weights=1,x"]  # fmt: skip
    return text(good(draw)), [draw.choice(wrong)], None


KINDS = (unknown_names, wrong_types, out_of_range, unknown_choices, indivisible, unsupported, wrong_world, broken_text,
         broken_overrides)  # fmt: skip


def sentence(message: str) -> bool:
    return "\n" not in message and len(message) < 1200 and not re.search(r"[.!?] [A-Z]", message)


def test_five_hundred_bad_jobs_get_one_sentence_each(tmp_path: Path) -> None:
    draw = random.Random(SEED)
    path = tmp_path / "job.toml"
    start, refused = time.process_time(), Counter[str]()
    for number in range(500):
        kind = KINDS[number % len(KINDS)]
        job, overrides, world = kind(draw)
        path.write_text(job)
        told = f"{SEED=} {number=} {kind.__name__} {overrides=} {world=}\n{job}"
        try:
            check(load(path, overrides), world)
        except ConfigError as problem:
            assert sentence(str(problem)), f"{told}\n{problem}"
            refused[kind.__name__] += 1
            continue
        except Exception as problem:
            raise AssertionError(told) from problem
        raise AssertionError(f"accepted: {told}")
    assert refused.total() == 500 and len(refused) == len(KINDS)
    assert time.process_time() - start < 60  # all of them, of 5 s each


@pytest.mark.parametrize("settings", UNSUPPORTED, ids=lambda settings: "+".join(settings))
def test_every_unsupported_combination_is_refused_by_name(settings: dict[str, Any]) -> None:
    tables: Tables = {"model": {"layers": 4}}
    for name, value in settings.items():
        put(tables, name, value)
    with pytest.raises(ConfigError) as refusal:
        check(from_dict(tables))
    assert any(name in str(refusal.value) for name in settings), refusal.value


def test_kernel_names_are_those_of_the_registry() -> None:
    for name, choices in CHOICES.items():
        if name.startswith("kernels."):
            assert set(choices) == {"auto"} | {v.name for v in TABLE if v.key == name.partition(".")[2]}, name


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["train", "missing.toml"], "missing.toml cannot be read"),
        (["train", "job.toml", "parallel.tensor=3"], "parallel.tensor (3)"),
        (["train", "job.toml"], "data.paths"),
        (["train", "job.toml", "data.paths=nowhere"], "nowhere.bin does not exist"),
        (["verify", "job.toml", "--layouts", "2x2"], "'2x2' is no layout"),
        (["verify", "job.toml", "--layouts", "8x1x1"], "parallel.tensor (8)"),
        (["train", "job.toml", "data.paths=corpus", "checkpoint.load=nowhere"], "checkpoint.load names 'nowhere'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_the_command_line_says_the_sentence_and_exits_with_2(
    arguments: list[str], wanted: str, tmp_path: Path
) -> None:
    job = '[model]\nheads = 4\nvocab_size = 67\nsequence = 16\n[data]\ntokenizer_type = "NullTokenizer"\n'
    (tmp_path / "job.toml").write_text(job)
    if "data.paths=corpus" in arguments:
        write = "from tests.training.jobs import corpus; from pathlib import Path; corpus(Path('corpus'))"
        subprocess.run([sys.executable, "-c", write], cwd=tmp_path, check=True, env=paths())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "megapre", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=paths(),
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2, done
    assert wanted in done.stderr and "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 10


def paths() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_no_refusal_needs_torch(tmp_path: Path) -> None:
    code = textwrap.dedent("""
        import sys
        from megapre.config.check import ConfigError, check
        from megapre.config.load import from_dict
        for tables in ({"parallel": {"tensor": 3}}, {"kernels": {"norm": "fast"}}, {"modle": {}}):
            try:
                check(from_dict(tables))
            except ConfigError:
                continue
            sys.exit("accepted")
        sys.exit("torch" in sys.modules)
    """)
    assert subprocess.run([sys.executable, "-c", code], env=paths(), timeout=60).returncode == 0
