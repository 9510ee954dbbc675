"""Encoder-decoders compute the oracle's run in any layout and cut; the oracle computes what torch's module does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megapre.config.schema import Config, DataConfig, ModelConfig, OptimizerConfig, PrecisionConfig
from megapre.models import spec
from megapre.verify import oracle
from megapre.verify.cells import Cell, batches, parse, scaled_down
from megapre.verify.run import Prover

SIZES = dict(architecture="encoder_decoder", encoder_layers=3, source_sequence=20)
JOBS = {
    "bart": Config(
        model=ModelConfig(**SIZES, activation="gelu_exact", norm_placement="post", embedding_norm=True),
        data=DataConfig(objective="denoising"),
        optimizer=OptimizerConfig(lr=3e-3),
    ),
    "t5": Config(
        model=ModelConfig(
            **SIZES, norm="rmsnorm", activation="geglu", positions="t5", bias=False, heads=4, kv_heads=2,
            dropout=0.1, attention_dropout=0.1, tied_embeddings=False, relative_buckets=8, relative_distance=12,
        ),
        data=DataConfig(objective="span_corruption"),
        optimizer=OptimizerConfig(lr=3e-3),
        precision=PrecisionConfig("bf16"),
    ),
}  # fmt: skip
# Both cuts inside a stack and on its border; every schedule; a stage of encoder blocks alone and one of decoder blocks.
CASES = [
    ("bart", "2x1x1+sp"), ("bart", "1x2x2+zero1"), ("bart", "1x4x1+zb-h1+recompute:selective"), ("bart", "1x1x2+zero3"),
    ("t5", "2x2x1+sp+interleaved:2"), ("t5", "1x2x2+zero3"), ("t5", "1x2x1+zb-v:2+recompute:full"), ("t5", "4x1x1"),
]  # fmt: skip
BOTH = ("2x1x1+sp", "1x2x2+zero1", "1x2x2+zero3")
"""Layouts that also run in the job's own number format and kernels."""


@pytest.mark.parametrize(("job", "layout"), CASES, ids=[f"{job}-{layout}" for job, layout in CASES])
def test_layout_agrees_with_the_oracle(job: str, layout: str, agree: Callable[[str, Cell, bool], None]) -> None:
    agree(job, parse(layout), layout in BOTH)


@pytest.mark.parametrize("split", [[3, 4], [2, 5], [6, 1]])
def test_stages_are_cut_at_before_and_behind_the_encoders_end(
    split: list[int], provers: Callable[[str], Prover]
) -> None:
    config = provers("bart").config
    cut = replace(config, parallel=replace(config.parallel, layers_per_stage=split))
    _, (name, error, limit) = provers("bart").layout(parse("1x2x1"), config=cut)
    assert error <= limit, f"{split}: {name} is off by {error:.2e}, limit {limit:.2e}"


def test_the_oracle_is_torchs_transformer() -> None:
    """The hidden states of ``torch.nn.Transformer`` with the same weights, norms in front of the sub-layers."""
    config, vocab_size = scaled_down(JOBS["bart"])
    config = replace(config, model=replace(config.model, norm_placement="pre", embedding_norm=False))
    m, width = config.model, config.model.hidden
    weights = oracle.initial_weights(config, vocab_size)
    generator = torch.Generator().manual_seed(1)
    for name, value in weights.items():  # biases and norms that are not 0 and 1
        weights[name] = value + 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    plain = nn.Transformer(
        width, m.heads, m.encoder_layers, m.layers, m.ffn_hidden, 0.0, "gelu", norm_first=True, dtype=torch.float64
    ).eval()
    for stack, name, norms in (
        (plain.encoder, "encoder.", ("attention", "mlp")), (plain.decoder, "", ("attention", "cross", "mlp")),
    ):  # fmt: skip
        for index, layer in enumerate(stack.layers):
            _fill(layer, {key.removeprefix(f"{name}blocks.{index}."): value for key, value in weights.items()
                          if key.startswith(f"{name}blocks.{index}.")}, norms)  # fmt: skip
        last = "encoder.norm" if name else "head.norm"
        _copy(stack.norm, weights[f"{last}.weight"], weights[f"{last}.bias"])
    (batch,) = batches(config, vocab_size, 1)
    for sample in batch:
        table = weights["embedding.tokens.weight"]
        assert sample.source is not None
        x = table[sample.source] + weights["encoder.embedding.positions.weight"].unsqueeze(1)
        y = table[sample.tokens] + weights["embedding.positions.weight"].unsqueeze(1)
        causal = nn.Transformer.generate_square_subsequent_mask(len(y), dtype=torch.float64)
        with torch.no_grad():
            expected = plain(x, y, tgt_mask=causal) @ table.T
        torch.testing.assert_close(oracle.logits(config, weights, sample), expected, rtol=1e-9, atol=1e-9)


def _fill(layer: nn.Module, w: dict[str, Tensor], norms: tuple[str, ...]) -> None:
    for number, name in enumerate(norms, 1):
        _copy(getattr(layer, f"norm{number}"), w[f"{name}_norm.weight"], w[f"{name}_norm.bias"])
    for theirs, ours in (("self_attn", "attention"), ("multihead_attn", "cross")):
        if hasattr(layer, theirs):
            module = getattr(layer, theirs)
            fused = [torch.cat([w[f"{ours}.{part}.{kind}"] for part in "qkv"]) for kind in ("weight", "bias")]
            with torch.no_grad():
                module.in_proj_weight.copy_(fused[0])
                module.in_proj_bias.copy_(fused[1])
            _copy(module.out_proj, w[f"{ours}.output.weight"], w[f"{ours}.output.bias"])
    _copy(layer.linear1, w["mlp.up.weight"], w["mlp.up.bias"])  # type: ignore[arg-type]
    _copy(layer.linear2, w["mlp.down.weight"], w["mlp.down.bias"])  # type: ignore[arg-type]


def _copy(module: nn.Module, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        module.weight.copy_(weight)  # type: ignore[operator]
        module.bias.copy_(bias)  # type: ignore[operator]


def test_stages_share_out_the_blocks_of_both_stacks() -> None:
    model = ModelConfig(**SIZES, layers=4)
    assert [len(stage) for stage in spec.stages(model, 4, [])] == [3, 2, 2, 2]
    assert spec.stages(model, 2, [2, 5]) == [range(3), range(3, 9)]
    for stage in spec.stages(model, 3, [])[1:]:
        assert [c.stream for c in spec.carried(model, stage[0])] == ["source", "tokens"]
