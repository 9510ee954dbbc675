"""What the shape of a network must satisfy, whatever the layout; rules as in ``check.py``."""

from __future__ import annotations

from megapre.config.schema import Config, ModelConfig

MOST_HEADS = 1024


def heads_divide_hidden(config: Config) -> str | None:
    """Each head holds hidden / heads features, unless its size is given."""
    model = config.model
    if model.hidden % model.heads and not model.head_size:
        return f"model.hidden ({model.hidden}) must be a multiple of model.heads ({model.heads}) or model.head_size set"
    return None


def kv_heads_divide_heads(config: Config) -> str | None:
    """Each key/value head serves heads / kv_heads query heads (arXiv 2305.13245)."""
    model = config.model
    if model.n_kv_heads > model.heads:
        return f"model.kv_heads ({model.kv_heads}) must not exceed model.heads ({model.heads})"
    if model.heads % model.n_kv_heads:
        return f"model.heads ({model.heads}) must be a multiple of model.kv_heads ({model.kv_heads})"
    return None


def rope_needs_even_heads(config: Config) -> str | None:
    """RoPE turns pairs of features."""
    model = config.model
    if model.positions == "rope" and model.head_dim % 2:
        if model.head_size:
            return f"model.positions = 'rope' needs an even model.head_size, not {model.head_size}"
        return (
            f"model.positions = 'rope' needs an even number of features per head but model.hidden / model.heads = "
            f"{model.hidden} / {model.heads} = {model.head_dim}: change model.hidden or model.heads"
        )
    return None


def rope_is_described(config: Config) -> str | None:
    """Each scaling has what it needs, and nothing that only another one reads."""
    model = config.model
    scaling, default = model.rope_scaling, ModelConfig()
    if model.positions != "rope":
        names = ("rope_interleaved", "rope_scaling", "rope_factor", "rope_original", "rope_high", "rope_attention")
        for name in names:
            if getattr(model, name) != getattr(default, name):
                return f"model.{name} belongs to model.positions = 'rope' but this one is '{model.positions}'"
        return None
    if scaling == "none" and model.rope_factor != 1:
        return f"model.rope_factor ({model.rope_factor:g}) needs a model.rope_scaling other than 'none'"
    by_turns = scaling in ("yarn", "llama3")
    if by_turns and not model.rope_original:
        return f"model.rope_scaling = '{scaling}' needs model.rope_original, the length before scaling, not 0"
    if not by_turns and (model.rope_original or model.rope_high or model.rope_low != default.rope_low):
        return (
            f"model.rope_original, rope_low and rope_high belong to model.rope_scaling = 'yarn' or 'llama3' but this "
            f"one is '{scaling}'"
        )
    if by_turns and model.rope_low >= model.n_rope_high:
        return f"model.rope_low ({model.rope_low:g}) must be below model.rope_high ({model.n_rope_high:g})"
    if scaling != "yarn" and model.rope_attention:
        return f"model.rope_attention belongs to model.rope_scaling = 'yarn' but this one is '{scaling}'"
    if scaling == "ntk" and model.head_dim == 2:
        return "model.rope_scaling = 'ntk' raises the base to d / (d - 2), so it needs heads of more than 2 features"
    return None


def dropout_tells_heads_apart(config: Config) -> str | None:
    """The counter of a dropout mask holds 10 bits of the head's number."""
    model = config.model
    if model.attention_dropout and model.heads > MOST_HEADS:
        return (
            f"model.attention_dropout needs at most {MOST_HEADS} heads, not model.heads = {model.heads}: set it to 0 "
            f"or take fewer heads"
        )
    return None


MODEL_RULES = (
    heads_divide_hidden,
    kv_heads_divide_heads,
    rope_needs_even_heads,
    rope_is_described,
    dropout_tells_heads_apart,
)
