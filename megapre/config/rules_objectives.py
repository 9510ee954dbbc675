"""What an objective asks of the model and of the data; rules as in ``check.py``."""

from __future__ import annotations

from megapre.config.lengths import corruption_of_source, noise
from megapre.config.schema import Config, DataConfig

ARCHITECTURES = {
    "decoder": ("causal", "infill", "prefix"),
    "encoder": ("masked", "next_sentence", "sentence_order"),
    "encoder_decoder": ("span_corruption", "denoising"),
    "two_stream": ("permuted",),
    "replaced_token": ("replaced",),
}
"""Objectives of each architecture."""
FROM_LEFT_TO_RIGHT = ("causal", "infill", "prefix")
PAIRS = ("next_sentence", "sentence_order")
HIDING = ("masked", "replaced", "permuted", "span_corruption", "denoising", *PAIRS)
UNITS = ("masked", "replaced", "permuted", *PAIRS)
"""Objectives that ``data.mask_unit`` says what to hide for."""
SHORTEST_PAIR = 5
"""[CLS] A [SEP] B [SEP] with one token in each text."""


def objective_fits_architecture(config: Config) -> str | None:
    """Causal attention learns the next token, full attention learns hidden ones, and so on."""
    architecture, objective = config.model.architecture, config.data.objective
    fitting = ARCHITECTURES.get(architecture, ())
    if objective not in fitting:
        shown = " or ".join(f"'{name}'" for name in fitting)
        return (
            f"model.architecture = '{architecture}' needs data.objective = {shown}, not '{objective}': change one of "
            f"them"
        )
    return None


def special_ids_are_ids(config: Config) -> str | None:
    """Ids that the job gives, of the vocabulary where that is given too."""
    data, vocab = config.data, config.model.vocab_size
    for name in ("mask_token", "cls_token", "sep_token", "pad_token", "start_token"):
        token = getattr(data, name)
        if token < -1:
            return f"data.{name} must be a token id or -1 for the tokenizer's own, not {token}"
        if vocab and token >= vocab:
            return f"data.{name} ({token}) must be below model.vocab_size ({vocab})"
    if len(data.sentinel_tokens) not in (0, 2):
        return f"data.sentinel_tokens must be the first and the last id, or empty, not {data.sentinel_tokens}"
    if len(data.fim_tokens) not in (0, 3) or len(set(data.fim_tokens)) != len(data.fim_tokens):
        return f"data.fim_tokens must be three ids (prefix, suffix, middle), or empty, not {data.fim_tokens}"
    for name in ("sentinel_tokens", "fim_tokens"):
        ids = getattr(data, name)
        if ids and (min(ids) < 0 or (vocab and max(ids) >= vocab)):
            return f"data.{name} ({ids}) must be ids from 0 to below model.vocab_size ({vocab or 'of the data'})"
    return None


def objective_hides(config: Config) -> str | None:
    """Something to find again, in spans of at least a token."""
    data = config.data
    if data.objective not in HIDING:
        return None
    nothing_else = not (data.delete_probability or data.permute_sentences or data.rotate_documents)
    if data.mask_probability == 0 and (data.objective != "denoising" or nothing_else):
        return f"data.mask_probability is 0, which leaves data.objective = '{data.objective}' nothing to predict"
    if data.mask_span < 1:
        return f"data.mask_span must be at least 1 token, not {data.mask_span:g}"
    return None


def keys_belong_to_the_objective(config: Config) -> str | None:
    """A key that another objective reads would be ignored."""
    data, default = config.data, DataConfig()
    owners = {
        "mask_unit": UNITS,
        "delete_probability": ("denoising",),
        "permute_sentences": ("denoising",),
        "rotate_documents": ("denoising",),
        "eod_mask_loss": FROM_LEFT_TO_RIGHT,
        "fim_rate": ("infill",),
        "fim_spm_rate": ("infill",),
        "reset_positions": (*FROM_LEFT_TO_RIGHT, "masked", "replaced", "permuted"),
        "reset_attention": (*FROM_LEFT_TO_RIGHT, "masked", "replaced", "permuted"),
    }
    for name, objectives in owners.items():
        value = getattr(data, name)
        if value != getattr(default, name) and data.objective not in objectives:
            shown = str(value).lower() if isinstance(value, bool) else repr(value)
            return (
                f"data.{name} belongs to data.objective = {' or '.join(map(repr, objectives))} but this one is "
                f"'{data.objective}': leave out data.{name} = {shown}"
            )
    if data.packing == "best-fit" and data.objective not in ("causal", "masked"):
        return f"data.packing = 'best-fit' packs rows for 'causal' and 'masked', not for '{data.objective}'"
    if config.train.sequence_ramp and data.objective not in ("causal", "masked", "replaced"):
        return f"train.sequence_ramp cannot cut the samples of data.objective = '{data.objective}': leave it empty"
    return None


def lengths_follow_from_the_objective(config: Config) -> str | None:
    """Encoder and decoder lengths without a wasted place; room for a pair."""
    model, data = config.model, config.data
    if data.objective in PAIRS and model.sequence < SHORTEST_PAIR:
        return (
            f"model.sequence ({model.sequence}) must be at least {SHORTEST_PAIR} for data.objective = a pair of texts"
        )
    if data.objective not in ARCHITECTURES["encoder_decoder"]:
        return None
    if data.objective == "denoising":
        source = noise(model.sequence, data).source
        if model.source_sequence != source:
            return (
                f"model.source_sequence ({model.source_sequence}) must be {source}, which is what "
                f"data.mask_probability, data.mask_span and data.delete_probability leave of model.sequence = "
                f"{model.sequence} tokens"
            )
        return None
    if model.source_sequence < 4:
        return (
            f"model.source_sequence ({model.source_sequence}) must be at least 4 for data.objective = 'span_corruption'"
        )
    plan = corruption_of_source(model.source_sequence, data)
    if model.sequence != plan.target:
        return (
            f"model.sequence ({model.sequence}) must be {plan.target}: with data.mask_probability = "
            f"{data.mask_probability:g} and data.mask_span = {data.mask_span:g}, {plan.tokens} tokens make a source of "
            f"model.source_sequence = {model.source_sequence} and a target of {plan.target}"
        )
    return None


OBJECTIVE_RULES = (
    objective_fits_architecture,
    special_ids_are_ids,
    objective_hides,
    keys_belong_to_the_objective,
    lengths_follow_from_the_objective,
)
