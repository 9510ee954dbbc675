"""Rules of a job, and hundreds of bad jobs that each get one sentence."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from megapre.config.check import ConfigError, check, world_size
from megapre.config.limits import CHOICES, RANGES
from megapre.config.load import from_dict, load
from megapre.config.schema import Config

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.toml"))

PAIR = {
    "model__architecture": "encoder_decoder", "model__encoder_layers": 2, "model__source_sequence": 18,
    "data__objective": "span_corruption",
}  # fmt: skip
ELECTRA = {
    "model__architecture": "replaced_token", "model__generator_layers": 1, "model__generator_hidden": 32,
    "data__objective": "replaced", "model__mlm_transform": True,
}  # fmt: skip
STREAMS = {"model__architecture": "two_stream", "data__objective": "permuted"}


def job(**settings: Any) -> Config:
    """``job(model__heads=3)``: the defaults with some keys changed."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        table, key = name.split("__")
        tables.setdefault(table, {})[key] = value
    return from_dict(tables)


def refused(config: Config, world: int | None = None) -> str:
    with pytest.raises(ConfigError) as refusal:
        check(config, world)
    message = str(refusal.value)
    assert "\n" not in message and not re.search(r"[.!?] [A-Z]", message), message
    return message


def test_defaults_pass_and_data_resolves() -> None:
    assert check(Config()).parallel.data == 1
    assert check(job(parallel__tensor=2), 8).parallel.data == 4
    grid = check(job(parallel__tensor=2, parallel__pipeline=2, parallel__data=2))
    assert world_size(grid) == 8


@pytest.mark.parametrize(
    ("settings", "world", "parts"),
    [
        ({"model__heads": 3}, None, ["model.hidden (64)", "model.heads (3)"]),
        ({"data__skip_batches": [3, 3]}, None, ["data.skip_batches", "[3, 3]"]),
        ({"checkpoint__allow_changes": ["train.sed"]}, None, ["checkpoint.allow_changes", "train.sed"]),
        ({"model__kv_heads": 3}, None, ["model.heads (4)", "model.kv_heads (3)"]),
        ({"model__kv_heads": 8}, None, ["model.kv_heads (8)", "model.heads (4)"]),
        ({"model__positions": "rope", "model__hidden": 12}, None, ["12 / 4 = 3"]),
        ({"parallel__tensor": 8}, None, ["model.heads (4)", "parallel.tensor (8)"]),
        ({"parallel__tensor": 3, "model__hidden": 72, "model__heads": 12, "model__kv_heads": 4}, None,
         ["model.kv_heads (4)", "parallel.tensor (3)"]),
        ({"parallel__tensor": 4, "model__ffn_hidden": 102}, None, ["model.ffn_hidden (102)", "parallel.tensor (4)"]),
        ({"parallel__tensor": 4, "parallel__sequence": True, "model__sequence": 126}, None,
         ["model.sequence (126)", "parallel.tensor (4)"]),
        ({"parallel__pipeline": 3}, None, ["model.layers (2)", "parallel.pipeline (3)"]),
        ({"parallel__layers_per_stage": [1, 1]}, None, ["2 entries", "parallel.pipeline = 1"]),
        ({"parallel__pipeline": 2, "parallel__layers_per_stage": [1, 2]}, None, ["sums to 3", "model.layers is 2"]),
        ({"model__encoder_layers": 2}, None, ["model.encoder_layers (2) belongs to", "'encoder_decoder'"]),
        ({**PAIR, "model__source_sequence": 0}, None, ["needs model.source_sequence of at least 1"]),
        ({**PAIR, "parallel__context": 2}, None, ["parallel.context (2)", "two sequences"]),
        ({**PAIR, "model__experts": 4}, None, ["no experts", "not 4"]),
        ({**PAIR, "model__parallel_block": True}, None, ["no place for the cross-attention"]),
        ({**PAIR, "parallel__tensor": 4, "parallel__sequence": True}, None, ["model.source_sequence (18)", "(4)"]),
        ({**PAIR, "parallel__pipeline": 2, "parallel__layers_per_stage": [1, 2]}, None,
         ["sums to 3", "model.layers + model.encoder_layers is 4"]),
        ({**STREAMS, "parallel__context": 2}, None, ["parallel.context (2)", "'two_stream'"]),
        ({"model__generator_layers": 2}, None, ["model.generator_layers (2) belongs to", "'replaced_token'"]),
        ({**ELECTRA, "model__generator_hidden": 0}, None, ["needs model.generator_hidden of at least 1"]),
        ({**ELECTRA, "model__generator_hidden": 40}, None, ["model.generator_hidden (40)", "16 features"]),
        ({**ELECTRA, "model__mlm_transform": False}, None, ["model.hidden (64)", "model.generator_hidden (32)"]),
        ({**ELECTRA, "parallel__tensor": 4}, None, ["the generator's 2 heads", "4 ranks"]),
        ({**ELECTRA, "model__ffn_hidden": 66, "parallel__tensor": 2}, None, ["generator's MLP of 33 features"]),
        ({**ELECTRA, "model__experts": 4}, None, ["'replaced_token' has no experts"]),
        ({**ELECTRA, "model__kv_heads": 2}, None, ["model.kv_heads (2)", "'replaced_token'"]),
        ({**ELECTRA, "model__activation": "swiglu", "model__mlm_transform": False, "model__embedding_size": 32}, None,
         ["'replaced_token' applies model.activation to one matrix"]),
        ({**ELECTRA, "data__objective": "masked"}, None, ["needs data.objective = 'replaced'"]),
        ({**STREAMS, "model__token_types": 2}, None, ["model.token_types (2)", "'two_stream'"]),
        ({**PAIR, "model__share_layers": True}, None, ["model.share_layers (true)", "single stacks"]),
        ({**PAIR, "data__objective": "causal"}, None, ["'span_corruption'", "not 'causal'"]),
        ({"parallel__pipeline": 2, "parallel__layers_per_stage": [0, 2]}, None, ["holds 0"]),
        ({"train__microbatch": 3}, None, ["train.global_batch (8)", "3 x 1"]),
        ({"parallel__data": 3}, None, ["train.global_batch (8)", "1 x 3"]),
        ({"parallel__data": 2}, 4, ["1 x 1 x 2 = 2", "4 were launched"]),
        ({"parallel__tensor": 2}, 3, ["3 launched ranks", "2 x 1 = 2"]),
        ({"model__architecture": "encoder"}, None, ["data.objective = 'masked'"]),
        ({"data__objective": "masked"}, None, ["data.objective = 'causal'"]),
        ({"model__architecture": "encoder", "data__objective": "masked", "data__mask_probability": 0.0}, None,
         ["data.mask_probability"]),
        ({"data__mask_unit": "word"}, None, ["data.mask_unit", "'masked'", "'causal'"]),
        ({"data__fim_rate": 0.9}, None, ["data.fim_rate", "'infill'"]),
        ({"data__objective": "prefix", "data__packing": "best-fit"}, None, ["best-fit", "'prefix'"]),
        ({"data__objective": "infill", "data__fim_tokens": [1, 2]}, None, ["data.fim_tokens", "[1, 2]"]),
        ({"data__objective": "infill", "model__vocab_size": 9, "data__fim_tokens": [1, 2, 9]}, None,
         ["data.fim_tokens", "model.vocab_size (9)"]),
        ({"data__objective": "infill", "data__sentinel_tokens": [1, 2, 9]}, None, ["data.sentinel_tokens"]),
        ({"data__objective": "infill", "train__sequence_ramp": [16, 8]}, None, ["train.sequence_ramp", "'infill'"]),
        ({"model__architecture": "encoder", "data__objective": "sentence_order", "model__sequence": 4}, None,
         ["model.sequence (4)"]),
        ({"model__architecture": "encoder", "data__objective": "masked", "data__cls_token": -2}, None,
         ["data.cls_token", "-2"]),
        ({"model__architecture": "encoder", "data__objective": "masked", "data__mask_unit": "span",
          "data__mask_span": 0.5}, None, ["data.mask_span", "0.5"]),
        ({"model__architecture": "encoder", "data__objective": "masked", "model__vocab_size": 10,
          "data__mask_token": 10}, None, ["data.mask_token (10)", "model.vocab_size (10)"]),
        ({"data__split": [0.5, 0.5]}, None, ["data.split", "[0.5, 0.5]"]),
        ({"data__fraction": 0.0}, None, ["data.fraction 0"]),
        ({"data__fraction": 0.5, "data__packing": "best-fit"}, None, ["data.fraction (0.5)", "data.packing"]),
        ({"data__split": [0.5, 0.5, 0.5]}, None, ["sums to 1.5"]),
        ({"data__split": [0.0, 0.5, 0.5]}, None, ["nothing for training"]),
        ({"data__paths": ["a"], "data__weights": [0.5, 0.5]}, None, ["2 entries", "1 data.paths"]),
        ({"data__paths": ["a"], "data__weights": [0.0]}, None, ["data.weights holds 0"]),
        ({"schedule__warmup": 100}, None, ["schedule.warmup (100)", "train.steps (100)"]),
        ({"precision__dtype": "fp16", "precision__initial_loss_scale": 1000.0}, None, ["power of two", "1000"]),
        ({"optimizer__lr": float("nan")}, None, ["optimizer.lr", "finite"]),
        ({"optimizer__beta2": 1.0}, None, ["optimizer.beta2", "below 1"]),
        ({"parallel__zero": 4}, None, ["parallel.zero", "0, 1, 2 or 3", "4"]),
        ({"parallel__expert": 2}, None, ["parallel.expert (2)", "model.experts is 0"]),
        ({"model__capacity_factor": 1.0}, None, ["model.capacity_factor", "model.experts is 0"]),
        ({"model__experts": 6, "model__bias": False, "parallel__expert": 4, "parallel__data": 4}, None,
         ["model.experts (6)", "parallel.expert (4)"]),
        ({"model__experts": 8, "model__bias": False, "parallel__expert": 4, "parallel__data": 2}, None,
         ["4 x 1 = 4 must divide", "2 x 1 x 1 = 2"]),
        ({"model__experts": 8, "model__bias": False, "parallel__tensor": 2, "parallel__expert_tensor": 4}, None,
         ["parallel.tensor (2)", "parallel.expert_tensor (4)"]),
        ({"model__experts": 8, "model__bias": False, "parallel__tensor": 4, "parallel__expert_tensor": 4,
          "model__expert_hidden": 30}, None, ["model.expert_hidden (30)", "parallel.expert_tensor (4)"]),
        ({"model__experts": 8, "model__bias": False, "parallel__tensor": 4, "model__expert_hidden": 30,
          "model__shared_experts": 1}, None, ["(1 x 30)", "parallel.tensor (4)"]),
        ({"model__experts": 8, "model__bias": False, "parallel__tensor": 4, "model__sequence": 126}, None,
         ["model.sequence (126)", "(4 x 1)"]),
        ({"model__experts": 2, "model__bias": False, "model__experts_per_token": 3}, None,
         ["model.experts_per_token (3)", "model.experts (2)"]),
        ({"model__experts": 2}, None, ["model.bias"]),
        ({"model__experts": 2, "model__bias": False, "model__moe_dense_first": 2}, None,
         ["no block has experts", "model.layers (2)"]),
        ({"kernels__norm": "fast"}, None, ["kernels.norm", "'auto'", "'fast'"]),
        ({"parallel__recompute_layers": 2}, None, ["parallel.recompute_layers (2)", "'none'"]),
        ({"model__heads": 2048, "model__hidden": 4096, "model__attention_dropout": 0.1}, None, ["1024", "2048"]),
        ({"train__run_dir": " "}, None, ["train.run_dir"]),
        ({"model__positions": "rope", "model__head_size": 7}, None, ["even model.head_size", "7"]),
        ({"model__rope_scaling": "yarn"}, None, ["model.rope_scaling", "'rope'", "'learned'"]),
        ({"model__positions": "rope", "model__rope_factor": 2.0}, None, ["model.rope_factor (2)", "'none'"]),
        ({"model__positions": "rope", "model__rope_scaling": "llama3"}, None, ["model.rope_original", "'llama3'"]),
        ({"model__positions": "rope", "model__rope_scaling": "yarn", "model__rope_original": 64,
          "model__rope_low": 40.0}, None, ["model.rope_low (40)", "model.rope_high (32)"]),
        ({"model__positions": "rope", "model__rope_low": 2.0}, None, ["rope_low", "'none'"]),
        ({"model__relative_buckets": 16}, None, ["model.relative_buckets", "'t5'", "'learned'"]),
        ({"model__relative_clamp": 9}, None, ["model.relative_clamp (9)", "'transformer_xl'", "'learned'"]),
        ({"model__positions": "transformer_xl", "model__hidden": 63, "model__heads": 3}, None, ["even", "63"]),
        ({"model__positions": "transformer_xl", "parallel__context": 2}, None, ["parallel.context (2)", "'transf"]),
        ({"model__positions": "t5", "model__relative_buckets": 7}, None, ["model.relative_buckets (7)", "2"]),
        ({"model__positions": "t5", "model__relative_distance": 16}, None, ["model.relative_distance (16)", "16"]),
        ({"model__norm_placement": "post", "model__parallel_block": True}, None, ["model.norm_placement", "'post'"]),
        ({"model__share_layers": True, "model__experts": 8, "model__bias": False}, None, ["model.share_layers"]),
        ({"model__mlm_transform": True}, None, ["model.mlm_transform", "'encoder'", "'decoder'"]),
        ({"model__mlm_transform": True, "model__activation": "swiglu"}, None, ["model.mlm_transform", "'swiglu'"]),
        ({"model__embedding_size": 8}, None, ["model.embedding_size (8)", "model.mlm_transform"]),
        ({"model__architecture": "encoder", "data__objective": "masked", "model__sentence_classes": 2}, None,
         ["model.sentence_classes (2)", "'next_sentence'", "'masked'"]),
        ({"model__architecture": "encoder", "data__objective": "next_sentence"}, None,
         ["model.sentence_classes = 2", "'next_sentence'"]),
        ({"model__layers": 2**70}, None, ["model.layers", "2^63"]),
    ],
)
def test_each_rule_gives_the_numbers_and_the_key(settings: dict[str, Any], world: int | None, parts: list[str]) -> None:
    message = refused(job(**settings), world)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    "settings",
    [
        {"parallel__tensor": 4, "model__heads": 8, "model__kv_heads": 2},  # key/value heads held by neighbours
        {"schedule__kind": "constant", "schedule__warmup": 100},
        {"schedule__decay": 1000, "schedule__warmup": 500},
        {"precision__dtype": "fp16"},
        {"model__architecture": "encoder", "data__objective": "masked"},
        {"optimizer__clip": 0.0},
        {"model__experts": 8, "model__bias": False, "parallel__tensor": 2, "parallel__data": 2, "parallel__expert": 4},
        {"parallel__pipeline": 2, "parallel__layers_per_stage": [1, 1]},
    ],
)
def test_good_jobs_pass(settings: dict[str, Any]) -> None:
    check(job(**settings))


def test_every_number_and_choice_has_a_rule() -> None:
    """A new field must be given a range or choices here, or be named as one that needs none."""
    free = {
        "monitor.wandb", "optimizer.freeze",
        "data.mask_token", "data.cls_token", "data.sep_token", "data.pad_token", "data.start_token",
        "data.sentinel_tokens", "data.fim_tokens",
        "data.paths", "data.weights", "data.split", "data.tokenizer_model", "train.run_dir",
        "parallel.layers_per_stage", "precision.initial_loss_scale", "checkpoint.load",
        "schedule.milestones", "schedule.factors", "train.batch_ramp", "train.sequence_ramp",
        "data.stages", "data.stage", "data.cache_dir", "checkpoint.allow_changes", "data.skip_batches",
    }  # fmt: skip
    for table in dataclasses.fields(Config):
        for entry in dataclasses.fields(getattr(Config(), table.name)):
            name = f"{table.name}.{entry.name}"
            if entry.type == "bool" or name in free:
                continue
            assert name in CHOICES or name in RANGES, name
    tables = dataclasses.fields(Config)
    known = {f"{t.name}.{e.name}" for t in tables for e in dataclasses.fields(getattr(Config(), t.name))}
    assert set(CHOICES) | set(RANGES) <= known


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_fit_their_own_grid(path: Path) -> None:
    config = check(load(path))
    assert check(load(path), world_size(config)) == config


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"tiny_gpt2", "tiny_llama", "tiny_bert", "gpt2_124m", "llama_8b"}


@pytest.mark.parametrize(("name", "billions"), [("gpt2_124m", 0.1244), ("llama_1b", 1.236), ("llama_8b", 8.03)])
def test_published_shapes_have_their_published_size(name: str, billions: float) -> None:
    model = load(next(path for path in EXAMPLES if path.stem == name)).model
    vocab = model.vocab_size or {"gpt2_124m": 50257, "llama_1b": 128256}[name]
    attention = model.hidden * model.head_dim * (2 * model.heads + 2 * model.n_kv_heads)
    mlp = (3 if model.activation == "swiglu" else 2) * model.hidden * model.n_ffn
    positions = model.sequence * model.hidden if model.positions == "learned" else 0
    embeddings = vocab * model.hidden * (1 if model.tied_embeddings else 2) + positions
    assert (model.layers * (attention + mlp) + embeddings) / 1e9 == pytest.approx(billions, rel=2e-3)
