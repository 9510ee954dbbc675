"""The oracle as T5 and BART against their Hugging Face modules: logits and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from megapre.config.schema import Config, ModelConfig
from megapre.models import spec
from megapre.verify import oracle
from tests.models.test_against_transformers import BATCH, LENGTH, VOCAB, microbatch
from tests.models.test_encoders import PAIRS
from tests.models.test_families import drawn

WIDTH, HEADS, FFN, SOURCE = 24, 4, 40, 9
SIZES = dict(
    architecture="encoder_decoder", layers=3, encoder_layers=2, hidden=WIDTH, heads=HEADS, ffn_hidden=FFN,
    norm_eps=1e-6, sequence=LENGTH, source_sequence=SOURCE,
)  # fmt: skip
T5 = dict(
    **SIZES, norm="rmsnorm", positions="t5", bias=False, attention_scale=1.0, head_size=8, relative_buckets=8,
    relative_distance=12,
)  # fmt: skip
BART = dict(**SIZES | {"norm_eps": 1e-5}, norm_placement="post", embedding_norm=True, activation="gelu_exact")


def t5(kind: str, tied: bool) -> hf.PreTrainedModel:
    module = hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=FFN, num_layers=2, num_decoder_layers=3, num_heads=HEADS,
            relative_attention_num_buckets=8, relative_attention_max_distance=12, dropout_rate=0.0,
            feed_forward_proj=kind, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    if not tied:  # the library ties them at first, whatever it is told
        module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())
    return module


def bart() -> hf.PreTrainedModel:
    return hf.BartForConditionalGeneration(
        hf.BartConfig(
            vocab_size=VOCAB, d_model=WIDTH, encoder_layers=2, decoder_layers=3, encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS, encoder_ffn_dim=FFN, decoder_ffn_dim=FFN, max_position_embeddings=LENGTH,
            dropout=0.0, activation_function="gelu", attn_implementation="eager", pad_token_id=0,
        )
    )  # fmt: skip


def t5_name(ours: str) -> str:
    """Theirs of a tensor of ours."""
    first = ".block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    whole = {
        "embedding.tokens.weight": "shared.weight",
        "head.output.weight": "lm_head.weight",
        "head.norm.weight": "decoder.final_layer_norm.weight",
        "encoder.norm.weight": "encoder.final_layer_norm.weight",
        "embedding.relative.weight": f"decoder{first}",
        "encoder.relative.weight": f"encoder{first}",
    }
    if ours in whole:
        return whole[ours]
    stack = "encoder" if ours.startswith("encoder.") else "decoder"
    _, layer, part, *rest = ours.removeprefix("encoder.").split(".")
    at = {"attention": 0, "cross": 1, "mlp": 2 if stack == "decoder" else 1}[part.removesuffix("_norm")]
    place = f"{stack}.block.{layer}.layer.{at}"
    if part.endswith("_norm"):
        return f"{place}.layer_norm.weight"
    if part == "mlp":
        gated = {"gate": "wi_0", "up": "wi_1", "down": "wo"}
        return f"{place}.DenseReluDense.{gated[rest[0]]}.weight"
    module = "EncDecAttention" if part == "cross" else "SelfAttention"
    return f"{place}.{module}.{'o' if rest[0] == 'output' else rest[0]}.weight"


def bart_name(ours: str) -> str:
    stack = "encoder" if ours.startswith("encoder.") else "decoder"
    inner = ours.removeprefix("encoder.")
    whole = {
        "embedding.tokens.weight": "model.shared.weight",
        "embedding.positions.weight": f"model.{stack}.embed_positions.weight",
        **{f"embedding.norm.{kind}": f"model.{stack}.layernorm_embedding.{kind}" for kind in PAIRS},
    }
    if inner in whole:
        return whole[inner]
    _, layer, part, *rest, kind = inner.split(".")
    parts = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "output": "out_proj"}
    modules = {"attention": "self_attn", "cross": "encoder_attn"}
    if part in modules:
        path = f"{modules[part]}.{parts[rest[0]]}"
    elif part == "mlp":
        path = {"up": "fc1", "down": "fc2"}[rest[0]]
    else:
        path = {"attention_norm": "self_attn_layer_norm", "cross_norm": "encoder_attn_layer_norm",
                "mlp_norm": "final_layer_norm"}[part]  # fmt: skip
    return f"model.{stack}.layers.{layer}.{path}.{kind}"


CASES: dict[str, tuple[hf.PreTrainedModel, dict[str, Any], Any, float]] = {
    "t5": (t5("relu", True), dict(**T5, activation="relu"),
           lambda name: t5_name(name).replace("wi_1", "wi"), WIDTH**-0.5),  # a tied T5 scales its logits
    "t5-v1.1": (t5("gated-gelu", False), dict(**T5, activation="geglu", tied_embeddings=False), t5_name, 1.0),
    "bart": (bart(), BART, bart_name, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_model_is_theirs(name: str) -> None:
    module, settings, named, factor = CASES[name]
    module = drawn(module, seed=11).double().eval()
    config = Config(model=ModelConfig(**settings))
    parameters = dict(module.named_parameters())

    def part(ours: str, value: Tensor) -> Tensor:
        return value[2:] if name == "bart" and ours.endswith("positions.weight") else value  # BART counts from 2

    names = {tensor.name: named(tensor.name) for tensor in spec.tensors(config.model, VOCAB)}
    weights = {}
    for tensor in spec.tensors(config.model, VOCAB):
        value = part(tensor.name, parameters[names[tensor.name]].detach())
        weights[tensor.name] = value[: tensor.shape[0]].clone().requires_grad_()
    source = torch.randint(1, VOCAB, (SOURCE, BATCH), generator=torch.Generator().manual_seed(5))
    m = replace(microbatch(), source=source)
    theirs = module(input_ids=source.T, decoder_input_ids=m.tokens.T).logits
    mine = oracle.logits(config, weights, m).transpose(0, 1) * factor
    exact = 1e-6 if name.startswith("t5") else 1e-9  # theirs has its softmax in fp32
    torch.testing.assert_close(mine, theirs, rtol=exact, atol=exact)
    draw = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for logits in (theirs, mine):
        (logits * draw).sum().backward()
    for key, place in names.items():
        gradient = parameters[place].grad
        assert gradient is not None and weights[key].grad is not None, key
        found = part(key, gradient)[: len(weights[key])]
        error = float((weights[key].grad - found).norm() / found.norm().clamp_min(1e-3))  # type: ignore[operator]
        assert error <= exact, f"gradient of {key} is off by {error:.1e}"
