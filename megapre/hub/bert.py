"""BERT, RoBERTa, ALBERT and ELECTRA: encoders with norms behind the sums. Torch-free.

ELECTRA's discriminator has its generator beside it, in a folder of its own (`PART`): they were trained
together and share embeddings, which both files hold. A generator alone is an encoder.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megapre.config.model import ModelConfig
from megapre.hub.link import Link, matrices
from megapre.hub.settings import PART, Settings
from megapre.models.spec import GENERATOR, both_read

ACTIVATIONS = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}
IGNORED = (
    r"(generator/)?(\w+\.)?embeddings\.(position_ids|token_type_ids)",
    r"((bert|roberta|electra|albert)\.)?pooler\.(dense\.)?(weight|bias)",
    r"cls\.seq_relationship\.(weight|bias)",
)
"""Counters, and the sentence's heads where the architecture that is named does not have them."""
COPIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
    "generator_lm_head.weight": "electra.embeddings.word_embeddings.weight",
    "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
    "predictions.decoder.bias": "predictions.bias",
    f"{PART}/generator_lm_head.weight": "electra.embeddings.word_embeddings.weight",
} | {
    f"{PART}/electra.embeddings.{name}": f"electra.embeddings.{name}"
    for name in (
        "word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.weight",
        "LayerNorm.bias",
    )
}  # fmt: skip
"""Tensors that some files hold twice."""
HEADS = {
    "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    "electra": ("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias"),
    "albert": ("predictions.dense", "predictions.LayerNorm", "predictions.bias"),
}
"""Dense layer, norm and bias of the masked-language head."""
SENTENCES = {"bert": ("pooler.dense", "cls.seq_relationship"), "albert": ("pooler", "sop_classifier.classifier")}
"""Pooler and classifier of the sentence's head."""
BARE = {"bert": "BertModel", "roberta": "RobertaModel", "electra": "ElectraModel", "albert": "AlbertModel"}
BOTH = {"bert": "BertForPreTraining", "albert": "AlbertForPreTraining"}
FIRST_POSITION = {"roberta": 2}
"""Row of the position embeddings that the first token reads: RoBERTa counts from the padding's id on."""
PARTS = {
    "attention.q": "attention.self.query", "attention.k": "attention.self.key", "attention.v": "attention.self.value",
    "attention.output": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense", "mlp.down": "output.dense", "mlp_norm": "output.LayerNorm",
}  # fmt: skip
ALBERTS_PARTS = {
    "attention.q": "attention.query", "attention.k": "attention.key", "attention.v": "attention.value",
    "attention.output": "attention.dense", "attention_norm": "attention.LayerNorm", "mlp.up": "ffn",
    "mlp.down": "ffn_output", "mlp_norm": "full_layer_layer_norm",
}  # fmt: skip


PAIR, MASKED = "ElectraForPreTraining", "ElectraForMaskedLM"
AGREED = (
    "heads", "head_dim", "n_ffn", "n_embedding", "vocab_size", "sequence", "token_types", "activation", "norm_eps",
    "mlm_transform", "tied_embeddings",
)  # fmt: skip
"""What follows of a generator from its layers, its width and its discriminator."""


def model(s: Settings) -> dict[str, Any]:
    """[model] of a config."""
    generator, kind = s.take(PART), s.take("model_type")
    if kind != "electra" or (s.take("architectures") or [""])[0] != PAIR:
        if generator is not None:
            raise ValueError(f"{s.where} has a folder {PART!r} beside it but is no {PAIR}: take it away.")
        return _encoder(s)
    if generator is None:
        raise ValueError(
            f"{s.where} is a discriminator ({PAIR}) alone: put the folder of its generator, an ElectraForMaskedLM, "
            f"beside it under the name {PART!r}."
        )
    beside = Settings(generator, f"{s.where}, folder {PART!r},")
    small = ModelConfig(**_encoder(beside))
    beside.finish()
    found = _encoder(s) | {
        "architecture": "replaced_token", "generator_layers": small.layers, "generator_hidden": small.hidden,
    }  # fmt: skip
    told = ModelConfig(**found)
    for name in AGREED:
        ours, theirs = getattr(told.generator, name), getattr(small, name)
        if ours != theirs:
            raise ValueError(
                f"{beside.where} has {name} = {theirs!r} where megapre's generator of width {small.hidden} beside this "
                f"discriminator has {ours!r}."
            )
    return found


def _encoder(s: Settings) -> dict[str, Any]:
    """[model] of a single stack."""
    kind, hidden = s.take("model_type"), s.number("hidden_size")
    s.fixed(is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    s.unused("summary_type", "summary_use_proj", "summary_activation", "summary_last_dropout", "net_structure_type")
    s.unused("down_scale_factor", "gap_size", "num_memory_blocks", "pooler_fc_size", "pooler_num_attention_heads")
    s.unused("pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "directionality")
    s.fixed(num_hidden_groups=1, inner_group_num=1)
    activation = s.one_of("hidden_act", ACTIVATIONS, "gelu_new" if kind == "albert" else "gelu")
    if kind in ("roberta", "electra") and activation != "gelu_exact":
        raise ValueError(f"{s.where} has a hidden_act that is not its head's, 'gelu', which megapre cannot compute.")
    architecture = (s.take("architectures") or [""])[0]
    width = s.number("embedding_size", 128) if kind in ("albert", "electra") else hidden
    return {
        "architecture": "encoder",
        "layers": s.number("num_hidden_layers"),
        "hidden": hidden,
        "heads": s.number("num_attention_heads"),
        "ffn_hidden": s.number("intermediate_size"),
        "vocab_size": s.number("vocab_size"),
        "sequence": s.number("max_position_embeddings", 512) - FIRST_POSITION.get(kind, 0),
        "norm": "layernorm",
        "norm_placement": "post",
        "norm_eps": s.number("layer_norm_eps", 1e-12),
        "activation": activation,
        "positions": "learned",
        "embedding_norm": True,
        "embedding_size": 0 if width == hidden and kind != "albert" else width,
        "token_types": s.number("type_vocab_size", 2),
        "mlm_transform": architecture != BARE[kind],
        "sentence_classes": 2 if architecture == BOTH.get(kind) else 0,
        "share_layers": kind == "albert",
        "tied_embeddings": bool(s.one_of("tie_word_embeddings", {True: True}, True)),
        "dropout": s.number("hidden_dropout_prob", 0.0 if kind == "albert" else 0.1),
        "attention_dropout": s.number("attention_probs_dropout_prob", 0.0 if kind == "albert" else 0.1),
        "init": "normal",
        "init_std": s.number("initializer_range", 0.02),
    }


def config(m: ModelConfig, kind: str) -> dict[str, Any]:
    """``config.json`` of a model."""
    if m.architecture == "replaced_token" and kind == "electra":
        both = {"architectures": [PAIR], PART: {"architectures": [MASKED]} | config(m.generator, kind)}
        return config(m.discriminator, kind) | both
    found = {
        "hidden_size": m.hidden,
        "num_hidden_layers": m.layers,
        "num_attention_heads": m.heads,
        "intermediate_size": m.n_ffn,
        "max_position_embeddings": m.sequence + FIRST_POSITION.get(kind, 0),
        "layer_norm_eps": m.norm_eps,
        "hidden_act": {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}[m.activation],
        "type_vocab_size": m.token_types,
        "hidden_dropout_prob": m.dropout,
        "attention_probs_dropout_prob": m.attention_dropout,
        "initializer_range": m.init_std,
    }
    if kind in ("albert", "electra"):
        found["embedding_size"] = m.n_embedding
    if m.sentence_classes and kind in BOTH:
        found["architectures"] = [BOTH[kind]]
    elif not m.mlm_transform:
        found["architectures"] = [BARE[kind]]
    return found


def links(m: ModelConfig, kind: str) -> list[Link]:
    """Where every tensor lies. What a generator and its discriminator share lies in the files of both."""
    if m.architecture == "replaced_token":
        beside = [replace(link, theirs=f"{PART}/{link.theirs}") for link in links(m.generator, kind)]
        own = [link if both_read(link.ours) else replace(link, ours=GENERATOR + link.ours) for link in beside]
        return own + links(m.discriminator, kind)
    base = f"{kind}."
    found = [
        Link("embedding.tokens.weight", f"{base}embeddings.word_embeddings.weight"),
        Link(
            "embedding.positions.weight",
            f"{base}embeddings.position_embeddings.weight",
            (FIRST_POSITION.get(kind, 0), 0),
        ),
        Link("embedding.types.weight", f"{base}embeddings.token_type_embeddings.weight"),
        *matrices("embedding.norm", f"{base}embeddings.LayerNorm", bias=True),
    ]
    if m.embedding_size and (kind == "albert" or m.n_embedding != m.hidden):
        project = "encoder.embedding_hidden_mapping_in" if kind == "albert" else "embeddings_project"
        found += matrices("embedding.project", f"{base}{project}", bias=True)
    if m.share_layers:
        blocks = {"blocks.0": f"{base}encoder.albert_layer_groups.0.albert_layers.0"}
    else:
        blocks = {f"blocks.{layer}": f"{base}encoder.layer.{layer}" for layer in range(m.layers)}
    for ours, theirs in blocks.items():
        for part, name in (ALBERTS_PARTS if kind == "albert" else PARTS).items():
            found += matrices(f"{ours}.{part}", f"{theirs}.{name}", bias=True)
    if m.mlm_transform:
        dense, norm, bias = HEADS[kind]
        found += matrices("head.transform", dense, bias=True) + matrices("head.transform_norm", norm, bias=True)
        found.append(Link("head.output.bias", bias))
    if m.architecture == "discriminator":
        for ours, theirs in (("head.dense", "dense"), ("head.detect", "dense_prediction")):
            found += matrices(ours, f"discriminator_predictions.{theirs}", bias=True)
    if m.sentence_classes:
        pooler, classes = SENTENCES[kind]
        found += matrices("head.pooler", f"{base}{pooler}", bias=True) + matrices("head.sentence", classes, bias=True)
    return found
