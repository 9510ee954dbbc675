"""A grown model computes what the smaller one does: by the oracle in fp64, at weights far from their first values."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megapre.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from megapre.models.grow import growths
from megapre.models.spec import tensors
from megapre.verify import oracle
from megapre.verify.cells import batches
from megapre.verify.oracle_block import Dropper

SEED = random.SystemRandom().randrange(10**6)
VOCAB = 23
EXACT = dict(rtol=1e-11, atol=1e-11)
BASE = ModelConfig(layers=2, hidden=8, heads=2, sequence=10)
LLAMA = replace(
    BASE, heads=4, kv_heads=2, ffn_hidden=12, norm="rmsnorm", activation="swiglu", positions="rope", bias=False,
    tied_embeddings=False,
)  # fmt: skip
BERT = replace(
    BASE, architecture="encoder", norm_placement="post", activation="gelu_exact", embedding_norm=True, token_types=2,
    mlm_transform=True, sentence_classes=2,
)  # fmt: skip
T5 = replace(
    BASE, architecture="encoder_decoder", encoder_layers=2, source_sequence=12, norm="rmsnorm", positions="t5",
    bias=False, head_size=6, relative_buckets=8, relative_distance=12, attention_scale=1.0, output_scale=8**-0.5,
)  # fmt: skip
WIDE = dict(hidden=16, heads=4)
CASES: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "gpt2 width": (BASE, WIDE),
    "gpt2 three times": (BASE, dict(hidden=24, heads=6)),
    "gpt2 depth": (BASE, dict(layers=5)),
    "gpt2 both": (BASE, dict(**WIDE, layers=3, ffn_hidden=70)),
    "gpt2 scaled output": (BASE, dict(**WIDE, output_scale=0.5)),
    "llama width": (LLAMA, dict(hidden=16, heads=8, kv_heads=4, ffn_hidden=24)),
    "llama tied": (replace(LLAMA, tied_embeddings=True), dict(hidden=16, heads=8, kv_heads=2, ffn_hidden=24)),
    "llama more queries": (LLAMA, dict(heads=6, kv_heads=2, head_size=2)),
    "llama more keys": (LLAMA, dict(heads=4, kv_heads=4, head_size=2)),
    "llama odd": (LLAMA, dict(heads=9, kv_heads=3, head_size=2, ffn_hidden=19, layers=3)),
    "qwen3 both": (replace(LLAMA, qk_norm=True, qkv_bias=True, head_size=4), dict(**WIDE | {"heads": 8}, layers=4)),
    "bert width": (BERT, WIDE),
    "bare bert width": (replace(BERT, mlm_transform=False), dict(**WIDE, output_scale=0.5)),
    "pre-norm sentences": (replace(BERT, mlm_transform=False, norm_placement="pre"), dict(**WIDE, layers=3)),
    "electra": (replace(BERT, embedding_size=4), dict(embedding_size=8, hidden=24, heads=6)),
    "electra, wider embedding": (replace(BERT, embedding_size=4), dict(embedding_size=12, hidden=16, heads=4)),
    "albert": (replace(BERT, embedding_size=4, share_layers=True), WIDE),
    "t5": (T5, dict(hidden=16, heads=3, layers=3, encoder_layers=4)),
    "bart": (
        replace(T5, norm="layernorm", norm_placement="post", positions="learned", bias=True, embedding_norm=True,
                relative_buckets=32, relative_distance=128),
        dict(**WIDE, ffn_hidden=64, output_scale=8**-0.5 / 2),
    ),
    "two streams": (replace(BASE, architecture="two_stream", norm_placement="post"), dict(**WIDE, output_scale=0.5)),
    "xlnet": (
        replace(BASE, architecture="two_stream", norm_placement="post", positions="transformer_xl", output_bias=True,
                token_types=2),
        dict(heads=3, head_size=4, ffn_hidden=50),
    ),
    "palm": (replace(LLAMA, parallel_block=True, norm="layernorm"), dict(hidden=16, heads=8, kv_heads=4, layers=3)),
    "experts": (
        replace(BASE, experts=4, shared_experts=1, expert_hidden=6, bias=False),
        dict(**WIDE, expert_hidden=10, layers=4),
    ),
    "alibi": (replace(BASE, positions="alibi"), dict(hidden=16, heads=2, head_size=4, layers=3)),
    "sinusoids": (replace(BASE, positions="sinusoidal"), dict(heads=3, head_size=4, layers=3)),
}  # fmt: skip


def drawn(model: ModelConfig) -> dict[str, Tensor]:
    """Weights of which no bias is 0 and no norm 1."""
    generator = torch.Generator().manual_seed(SEED)
    return {
        spec.name: torch.randn(spec.shape, generator=generator, dtype=torch.float64) * 0.4 + (len(spec.shape) == 1)
        for spec in tensors(model, VOCAB)
    }


def outputs(model: ModelConfig, weights: dict[str, Tensor]) -> list[Tensor]:
    """Scores of tokens, and of sentences where the model has such a head."""
    objective = {"two_stream": "permuted", "encoder": "next_sentence", "encoder_decoder": "denoising"}
    data = DataConfig(objective=objective.get(model.architecture, "causal"))
    config = Config(model=model, data=data, train=TrainConfig(global_batch=2))
    found = []
    for m in batches(config, VOCAB, 1)[0]:
        x = oracle.features(config, weights, m, Dropper(config, m, None))
        found.append(oracle.vocabulary(model, weights, x))
        if model.sentence_classes:
            found.append(oracle.classes(weights, x))
    return found


def grown(small: ModelConfig, large: ModelConfig, noise: float = 0.0, depth: str = "identity") -> dict[str, Tensor]:
    weights = drawn(small)
    return {g.name: g.of(weights[g.source], noise, SEED) for g in growths(small, large, VOCAB, depth)}


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_outputs_stay(name: str, noise: float) -> None:
    small, changes = CASES[name]
    large = replace(small, **changes)
    expected, found = outputs(small, drawn(small)), outputs(large, grown(small, large, noise))
    assert float(expected[0].std()) > 0.1, f"outputs that say nothing {SEED=}"
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, **EXACT, msg=lambda text: f"{text} {SEED=}")


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_of_both_models_has_its_part(name: str) -> None:
    small, changes = CASES[name]
    large = replace(small, **changes)
    plan = growths(small, large, VOCAB)
    assert [(g.name, g.shape) for g in plan] == [(spec.name, spec.shape) for spec in tensors(large, VOCAB)]
    assert {g.source for g in plan} == {spec.name for spec in tensors(small, VOCAB)}
    shapes = {spec.name: spec.shape for spec in tensors(small, VOCAB)}
    for g in plan:
        assert g.shape == tuple(map(len, g.index))
        # every row of the smaller tensor is there, no value is read from elsewhere
        assert shapes[g.source] == tuple(len(set(index)) for index in g.index) == tuple(max(i) + 1 for i in g.index)


def test_a_stack_is_the_blocks_once_more() -> None:
    small, large = BERT, replace(BERT, layers=5)
    found, old = grown(small, large, depth="stack"), drawn(small)
    for block in range(5):
        for name in ("attention.output.weight", "mlp.down.bias", "mlp_norm.weight"):
            assert torch.equal(found[f"blocks.{block}.{name}"], old[f"blocks.{block % 2}.{name}"])


def test_noise_tells_copies_apart_and_is_a_function_of_its_seed() -> None:
    """Without it twins get equal gradients for ever."""
    large = replace(BASE, **WIDE)

    def gradients(noise: float) -> Tensor:
        weights = {name: value.requires_grad_() for name, value in grown(BASE, large, noise).items()}
        outputs(large, weights)[0].square().sum().backward()
        gradient = weights["blocks.0.mlp.up.weight"].grad
        assert gradient is not None
        return gradient

    alike, apart = gradients(0.0), gradients(0.1)
    torch.testing.assert_close(alike[:32], alike[32:])
    assert float((apart[:32] - apart[32:]).norm() / apart.norm()) > 0.01
    once, again = grown(BASE, large, 0.1), grown(BASE, large, 0.1)
    assert all(torch.equal(once[name], again[name]) for name in once)
    relative = (once["blocks.1.mlp.up.weight"] - grown(BASE, large)["blocks.1.mlp.up.weight"]).norm()
    # of two copies' noise, what is left when their sum is taken out has sqrt(1 / 2) of its size
    assert relative / once["blocks.1.mlp.up.weight"].norm() == pytest.approx(0.1 * 0.5**0.5, rel=0.2)


@pytest.mark.parametrize(
    ("small", "changes", "told"),
    [
        (BASE, dict(hidden=12, heads=3), r"model\.hidden = 12 is no multiple of the smaller model's 8"),
        (BASE, dict(hidden=16), r"model\.head_size = 4, here 8"),
        (BASE, dict(layers=1), r"model\.layers = 1 is less than the smaller model's 2"),
        (BASE, dict(**WIDE, sequence=12, window=5), r"model\.sequence = 10, here 12; model\.window = 0, here 5"),
        (BASE, dict(activation="relu"), r"model\.activation = 'gelu', here 'relu'"),
        (BERT, dict(layers=3), r"model\.norm_placement = 'post'"),
        (replace(BERT, mlm_transform=False), WIDE, r"set model\.output_scale = 0\.5"),
        (replace(BERT, share_layers=True), dict(layers=3), r"model\.share_layers"),
        (replace(BASE, positions="alibi"), WIDE, r"model\.positions = 'alibi'.*model\.heads"),
        (replace(BASE, positions="sinusoidal"), WIDE, r"model\.positions = 'sinusoidal'"),
        (replace(BERT, embedding_size=4, positions="transformer_xl"), WIDE, r"'transformer_xl'.* of 16 than of 8"),
        (
            replace(LLAMA, heads=8, head_size=2), dict(heads=9, kv_heads=3),
            r"model\.heads = 9 over model\.kv_heads = 3 has no place for each of the 8 heads over 2",
        ),
        (replace(BASE, experts=4, router_bias=True, bias=False), WIDE, r"model\.router_bias"),
        (replace(BASE, experts=4, moe_dense_first=1, bias=False), dict(layers=4), r"model\.moe_dense_first"),
        (BASE, dict(embedding_size=16, tied_embeddings=False), r"model\.embedding_size = 0, here 16"),
    ],
    ids=range(15),
)  # fmt: skip
def test_what_cannot_grow_is_refused_by_name(small: ModelConfig, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        growths(small, replace(small, **changes), VOCAB)
