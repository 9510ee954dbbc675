"""The families by their ``model_type``, and what each says: settings both ways and where tensors lie. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from types import MappingProxyType
from typing import Any

from megapre.config.model import ModelConfig
from megapre.hub.link import Link
from megapre.hub.settings import PART, Settings

FAMILIES = MappingProxyType(
    {
        "llama": ("megapre.hub.llama", "LlamaForCausalLM", "model."),
        "mistral": ("megapre.hub.llama", "MistralForCausalLM", "model."),
        "qwen2": ("megapre.hub.llama", "Qwen2ForCausalLM", "model."),
        "qwen3": ("megapre.hub.llama", "Qwen3ForCausalLM", "model."),
        "gpt2": ("megapre.hub.gpt2", "GPT2LMHeadModel", "transformer."),
        "mixtral": ("megapre.hub.mixtral", "MixtralForCausalLM", "model."),
        "qwen3_moe": ("megapre.hub.mixtral", "Qwen3MoeForCausalLM", "model."),
        "bert": ("megapre.hub.bert", "BertForMaskedLM", "bert."),
        "roberta": ("megapre.hub.bert", "RobertaForMaskedLM", "roberta."),
        "albert": ("megapre.hub.bert", "AlbertForMaskedLM", "albert."),
        "electra": ("megapre.hub.bert", "ElectraForMaskedLM", "electra."),
        "t5": ("megapre.hub.t5", "T5ForConditionalGeneration", ""),
        "bart": ("megapre.hub.bart", "BartForConditionalGeneration", "model."),
        "xlnet": ("megapre.hub.xlnet", "XLNetLMHeadModel", "transformer."),
    }
)
"""``model_type`` -> the module that knows it, the class of ``transformers``, and the prefix of the names of its
body, which files of the bare model lack."""

FREE = frozenset(
    {
        "sequence", "source_sequence", "dropout", "attention_dropout", "init", "init_std", "capacity_factor",
        "router_aux_loss", "router_z_loss", "vocab_size", "detection_loss",
    }
)  # fmt: skip
"""Settings that a job may choose for imported weights: how it trains, not what the weights mean."""


@dataclass(frozen=True)
class Family:
    """One ``model_type``."""

    kind: str
    architecture: str
    ignored: tuple[str, ...]
    """Patterns of tensors that follow from the settings."""
    zeros: tuple[str, ...]
    """Tensors that must hold nothing but zeros."""
    copies: Mapping[str, str]
    """Tensors that some files hold twice, and what they must equal."""
    prefix: str
    model: Callable[[Settings], dict[str, Any]]
    with_tensors: Callable[[ModelConfig, set[str]], dict[str, Any]]
    """What only the names of the tensors tell."""
    config: Callable[[ModelConfig, str], dict[str, Any]]
    links: Callable[[ModelConfig, str], list[Link]]

    def read(self, settings: Settings, names: set[str]) -> ModelConfig:
        """[model] of a ``config.json`` beside tensors of these ``names``; ValueError for what is not understood."""
        found = ModelConfig(**self.model(settings))
        settings.finish()
        return replace(found, **self.with_tensors(found, names))

    def write(self, model: ModelConfig, vocab_size: int) -> dict[str, Any]:
        """``config.json`` of a model; ValueError naming what this family cannot say."""
        values = {"architectures": [self.architecture]} | self.config(model, self.kind)
        for told in (values, values.get(PART, {})):
            told |= {"vocab_size": vocab_size, "model_type": self.kind}
        names = {link.theirs for link in self.links(model, self.kind)}
        lost = differences(model, self.read(Settings(values, "the export"), names))
        if lost:
            told = "; ".join(f"model.{name} = {ours!r}, where it has {theirs!r}" for name, ours, theirs in lost)
            raise ValueError(f"the family {self.kind!r} of Hugging Face cannot be this model: {told}.")
        return values


def family(kind: str) -> Family:
    """The family of a ``model_type``; ValueError for an unknown one."""
    if kind not in FAMILIES:
        raise ValueError(f"model_type = {kind!r} is unknown to megapre, which reads and writes {', '.join(FAMILIES)}.")
    name, architecture, prefix = FAMILIES[kind]
    m = import_module(name)
    with_tensors = getattr(m, "with_tensors", _nothing)
    zeros = getattr(m, "ZEROS", ())
    return Family(kind, architecture, m.IGNORED, zeros, m.COPIES, prefix, m.model, with_tensors, m.config, m.links)


def _nothing(model: ModelConfig, names: set[str]) -> dict[str, Any]:
    return {}


def family_of(model: ModelConfig, vocab_size: int) -> Family:
    """The first family that can be ``model``; ValueError with what stops each of them."""
    problems = []
    for kind in FAMILIES:
        try:
            family(kind).write(model, vocab_size)
        except (ValueError, KeyError) as problem:
            problems.append(str(problem))
            continue
        return family(kind)
    raise ValueError("no family of Hugging Face can be this model: " + " ".join(problems))


def differences(ours: ModelConfig, theirs: ModelConfig) -> list[tuple[str, Any, Any]]:
    """Settings in which two models compute differently: name, one value, the other."""
    a, b = resolved(ours), resolved(theirs)
    names = [field.name for field in fields(ModelConfig) if field.name not in FREE]
    found = [(name, getattr(a, name), getattr(b, name)) for name in names if getattr(a, name) != getattr(b, name)]
    for name in ("sequence", "source_sequence") if "learned" in (a.positions, b.positions) else ():
        if getattr(a, name) != getattr(b, name):
            found.append((name, getattr(a, name), getattr(b, name)))
    return found


def resolved(model: ModelConfig) -> ModelConfig:
    """``model`` with its defaults written out, and what it does not use set aside."""
    unused: dict[str, Any] = {}
    if model.positions != "rope":
        unused |= {"rope_theta": 0.0, "rope_interleaved": False, "rope_scaling": "none"}
    if model.positions != "rope" or model.rope_scaling == "none":
        unused |= {"rope_factor": 1.0}
    if model.positions != "rope" or model.rope_scaling not in ("yarn", "llama3"):
        unused |= {"rope_original": 0, "rope_low": 0.0, "rope_high": 0.0, "rope_attention": 0.0}
    if not model.experts:
        unused |= {
            "experts_per_token": 0, "shared_experts": 0, "moe_every": 1, "moe_dense_first": 0, "router_scores": "",
            "router_normalize": False, "router_scale": 1.0, "router_bias": False, "expert_hidden": 0,
        }  # fmt: skip
    else:
        unused |= {"expert_hidden": model.n_expert_hidden}
    dense = not model.experts or any(not model.has_experts(n) for n in range(1, model.layers + 1))
    made = replace(
        model, kv_heads=model.n_kv_heads, head_size=model.head_dim, ffn_hidden=model.n_ffn if dense else 0,
        rope_high=model.n_rope_high, qkv_bias=model.has_qkv_bias,
        mlp_bias=model.has_mlp_bias, output_bias=model.has_output_bias,
        attention_scale=model.attention_scale or model.head_dim**-0.5,
    )  # fmt: skip
    return replace(made, **unused)
