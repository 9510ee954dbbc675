"""The oracle as encoders and older decoders against their Hugging Face modules: outputs and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from megapre.config.schema import Config, ModelConfig
from megapre.verify import oracle
from megapre.verify.oracle_block import Dropper
from tests.models.test_against_transformers import BATCH, LENGTH, VOCAB, microbatch, window
from tests.models.test_families import drawn

WIDTH, HEADS, FFN, LAYERS, SMALL = 24, 4, 40, 2, 10
SIZES = dict(layers=LAYERS, hidden=WIDTH, heads=HEADS, ffn_hidden=FFN, sequence=LENGTH, norm_eps=1e-6)
BERT = dict(
    **SIZES, architecture="encoder", norm_placement="post", activation="gelu_exact", embedding_norm=True,
    mlm_transform=True,
)  # fmt: skip
THEIRS = dict(
    vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=FFN,
    max_position_embeddings=LENGTH, layer_norm_eps=1e-6, attn_implementation="eager",
)  # fmt: skip
PAIRS = ("weight", "bias")
TYPES = torch.arange(LENGTH).unsqueeze(1).expand(LENGTH, BATCH) // 7 % 2


def dense(names: dict[str, str]) -> dict[str, str]:
    """Weights and biases of the layers of ``names``."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in names.items() for kind in PAIRS}


def bert_block(ours: str, theirs: str) -> dict[str, str]:
    """A post-norm block as BERT names it."""
    parts = {f"{ours}.attention.{p}": f"{theirs}.attention.self.{n}" for p, n in zip("qkv", ("query", "key", "value"))}
    return dense(
        parts
        | {
            f"{ours}.attention.output": f"{theirs}.attention.output.dense",
            f"{ours}.attention_norm": f"{theirs}.attention.output.LayerNorm",
            f"{ours}.mlp.up": f"{theirs}.intermediate.dense",
            f"{ours}.mlp.down": f"{theirs}.output.dense",
            f"{ours}.mlp_norm": f"{theirs}.output.LayerNorm",
        }
    )


def bert_names(model: str, transform: str, norm: str, bias: str) -> dict[str, str]:
    """Embeddings, blocks and masked-LM head."""
    embedding = f"{model}.embeddings"
    names = {
        "embedding.tokens.weight": f"{embedding}.word_embeddings.weight",
        "embedding.positions.weight": f"{embedding}.position_embeddings.weight",
        "embedding.types.weight": f"{embedding}.token_type_embeddings.weight",
        "head.output.bias": bias,
    }
    names |= dense(
        {"embedding.norm": f"{embedding}.LayerNorm", "head.transform": transform, "head.transform_norm": norm}
    )
    for layer in range(LAYERS):
        names |= bert_block(f"blocks.{layer}", f"{model}.encoder.layer.{layer}")
    return names


def albert_names() -> dict[str, str]:
    names = bert_names("albert", "predictions.dense", "predictions.LayerNorm", "predictions.bias")
    names = {ours: theirs for ours, theirs in names.items() if not ours.startswith("blocks.")}
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    parts = {"q": "query", "k": "key", "v": "value", "output": "dense"}
    return names | dense(
        {f"blocks.0.attention.{ours}": f"{layer}.attention.{theirs}" for ours, theirs in parts.items()}
        | {
            "blocks.0.attention_norm": f"{layer}.attention.LayerNorm",
            "blocks.0.mlp.up": f"{layer}.ffn",
            "blocks.0.mlp.down": f"{layer}.ffn_output",
            "blocks.0.mlp_norm": f"{layer}.full_layer_layer_norm",
            "embedding.project": "albert.encoder.embedding_hidden_mapping_in",
            "head.pooler": "albert.pooler",
            "head.sentence": "sop_classifier.classifier",
        }
    )


def t5_names(gated: bool) -> dict[str, str]:
    first = "encoder.block.0.layer.0.SelfAttention"
    names = {
        "embedding.tokens.weight": "shared.weight",
        "head.norm.weight": "encoder.final_layer_norm.weight",
        "embedding.relative.weight": f"{first}.relative_attention_bias.weight",
    }
    mlp = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    for layer in range(LAYERS):
        ours, theirs = f"blocks.{layer}", f"encoder.block.{layer}.layer"
        for part, name in (("q", "q"), ("k", "k"), ("v", "v"), ("output", "o")):
            names[f"{ours}.attention.{part}.weight"] = f"{theirs}.0.SelfAttention.{name}.weight"
        names[f"{ours}.attention_norm.weight"] = f"{theirs}.0.layer_norm.weight"
        names[f"{ours}.mlp_norm.weight"] = f"{theirs}.1.layer_norm.weight"
        for part, name in mlp.items():
            names[f"{ours}.mlp.{part}.weight"] = f"{theirs}.1.DenseReluDense.{name}.weight"
    return names


def gpt1_names() -> dict[str, str]:
    """Theirs are transposed: a ``^`` says so."""
    names = {
        "embedding.tokens.weight": "transformer.tokens_embed.weight",
        "embedding.positions.weight": "transformer.positions_embed.weight",
    }
    for layer in range(LAYERS):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        names |= dense({f"{ours}.attention_norm": f"{theirs}.ln_1", f"{ours}.mlp_norm": f"{theirs}.ln_2"})
        places = {f"attention.{p}": f"attn.c_attn[{WIDTH * i}:{WIDTH * i + WIDTH}]" for i, p in enumerate("qkv")}
        places |= {"attention.output": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
        for part, name in places.items():
            name, _, cut = name.partition("[")
            for kind, mark in (("weight", "^"), ("bias", "")):
                names[f"{ours}.{part}.{kind}"] = f"{mark}{theirs}.{name}.{kind}" + (f"[{cut}" if cut else "")
    return names


def bert() -> hf.PreTrainedModel:
    return hf.BertForPreTraining(hf.BertConfig(**THEIRS, hidden_act="gelu"))


def albert() -> hf.PreTrainedModel:
    return hf.AlbertForPreTraining(hf.AlbertConfig(**THEIRS, embedding_size=SMALL, hidden_act="gelu_new"))


def electra() -> hf.PreTrainedModel:
    return hf.ElectraForMaskedLM(hf.ElectraConfig(**THEIRS, embedding_size=SMALL, hidden_act="gelu"))


def roberta() -> hf.PreTrainedModel:
    settings = {**THEIRS, "max_position_embeddings": LENGTH + 2}
    return hf.RobertaForMaskedLM(hf.RobertaConfig(**settings, type_vocab_size=1, hidden_act="gelu"))


def t5(kind: str) -> Callable[[], hf.PreTrainedModel]:
    return lambda: hf.T5EncoderModel(
        hf.T5Config(
            vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=FFN, num_layers=LAYERS, num_heads=HEADS,
            relative_attention_num_buckets=8, relative_attention_max_distance=12, dropout_rate=0.0,
            feed_forward_proj=kind,
        )
    )  # fmt: skip


def gpt1() -> hf.PreTrainedModel:
    return hf.OpenAIGPTLMHeadModel(
        hf.OpenAIGPTConfig(
            vocab_size=VOCAB, n_positions=LENGTH, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, layer_norm_epsilon=1e-6
        )
    )


T5 = dict(
    **SIZES, architecture="encoder", norm="rmsnorm", positions="t5", bias=False, attention_scale=1.0, head_size=8,
    relative_buckets=8, relative_distance=12,
)  # fmt: skip
MLM = ("prediction_logits", "seq_relationship_logits")
HEAD = dense({"head.pooler": "bert.pooler.dense", "head.sentence": "cls.seq_relationship"})
CASES: dict[str, tuple[Callable[[], hf.PreTrainedModel], dict[str, Any], dict[str, str], tuple[str, ...]]] = {
    "bert": (bert, dict(**BERT, token_types=2, sentence_classes=2), HEAD | bert_names(
        "bert", "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"), MLM),
    "roberta": (roberta, dict(**BERT, token_types=1), bert_names(
        "roberta", "lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
        | {"embedding.positions.weight": f"roberta.embeddings.position_embeddings.weight[2:{LENGTH + 2}]"},
        ("logits",)),
    "electra-generator": (electra, dict(**BERT, token_types=2, embedding_size=SMALL), bert_names(
        "electra", "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias")
        | dense({"embedding.project": "electra.embeddings_project"}), ("logits",)),
    "albert": (albert, dict(**BERT | {"activation": "gelu"}, token_types=2, embedding_size=SMALL, share_layers=True,
        sentence_classes=2), albert_names(), ("prediction_logits", "sop_logits")),
    "t5-encoder": (t5("relu"), dict(**T5, activation="relu"), t5_names(False), ("last_hidden_state",)),
    "t5-v1.1-encoder": (t5("gated-gelu"), dict(**T5, activation="geglu"), t5_names(True), ("last_hidden_state",)),
    "gpt-1": (gpt1, dict(**SIZES, norm_placement="post"), gpt1_names(), ("logits",)),
}  # fmt: skip


def ours(config: Config, weights: dict[str, Tensor], outputs: tuple[str, ...]) -> list[Tensor]:
    """What the oracle has for ``outputs``, in their layout."""
    m = microbatch()
    m.token_types = TYPES if config.model.token_types == 2 else None
    x = oracle.features(config, weights, m, Dropper(config, m, None))
    found = x if outputs == ("last_hidden_state",) else oracle.vocabulary(config.model, weights, x)
    return [found.transpose(0, 1)] + ([oracle.classes(weights, x)] if len(outputs) > 1 else [])


@pytest.mark.parametrize("name", CASES)
def test_model_is_theirs(name: str) -> None:
    make, settings, names, outputs = CASES[name]
    module = drawn(make(), seed=7).double().eval()
    config = Config(model=ModelConfig(**settings))
    parameters = dict(module.named_parameters())

    def part(place: str, value: Tensor) -> Tensor:
        return (value.T if place.startswith("^") else value)[window(place.lstrip("^"))[1]]

    weights = {
        mine: part(place, parameters[window(place.lstrip("^"))[0]].detach()).clone().requires_grad_()
        for mine, place in names.items()
    }
    asked: dict[str, Any] = dict(input_ids=microbatch().tokens.T)
    asked |= dict(token_type_ids=TYPES.T) if config.model.token_types == 2 else {}
    asked |= dict(position_ids=torch.arange(2, LENGTH + 2).expand(BATCH, -1)) if name == "roberta" else {}
    theirs = [getattr(module(**asked), output) for output in outputs]
    mine = ours(config, weights, outputs)
    draws = [torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) for y in theirs]
    for group in (theirs, mine):
        torch.stack([(y * d).sum() for y, d in zip(group, draws, strict=True)]).sum().backward()
    exact = 1e-6 if name.startswith("t5") else 1e-9  # theirs has its softmax in fp32
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=exact, atol=exact)
    for key, place in names.items():
        gradient = parameters[window(place.lstrip("^"))[0]].grad
        assert gradient is not None and weights[key].grad is not None, key
        found = part(place, gradient)
        error = float((weights[key].grad - found).norm() / found.norm().clamp_min(1e-3))  # type: ignore[operator]
        assert error <= exact, f"gradient of {key} is off by {error:.1e}"
