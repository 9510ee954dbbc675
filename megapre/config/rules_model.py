"""What the shape of a network must satisfy, whatever the layout; rules as in ``check.py``."""

from __future__ import annotations

from megapre.config.rules_objectives import PAIRS
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


def relative_distances_fit(config: Config) -> str | None:
    """T5's buckets: half for single distances, the rest up to the farthest; in an encoder half of each side."""
    model, default = config.model, ModelConfig()
    if model.positions != "t5":
        for name in ("relative_buckets", "relative_distance"):
            if getattr(model, name) != getattr(default, name):
                return f"model.{name} belongs to model.positions = 't5' but this one is '{model.positions}'"
        return None
    sides = 1 if model.architecture == "decoder" else 2
    if model.relative_buckets % (2 * sides):
        return f"model.relative_buckets ({model.relative_buckets}) must be a multiple of {2 * sides}"
    exact = model.relative_buckets // (2 * sides)
    if model.relative_distance <= exact:
        return f"model.relative_distance ({model.relative_distance}) must be above {exact}, the single distances"
    return None


def transformer_xl_fits(config: Config) -> str | None:
    """Sinusoids come in pairs; every rank needs the keys of all distances."""
    model, parallel = config.model, config.parallel
    if model.positions != "transformer_xl":
        if model.relative_clamp:
            return (
                f"model.relative_clamp ({model.relative_clamp}) belongs to model.positions = 'transformer_xl' but this "
                f"one is '{model.positions}'"
            )
        return None
    if model.hidden % 2:
        return f"model.positions = 'transformer_xl' needs an even model.hidden, not {model.hidden}"
    if parallel.context > 1:
        return (
            f"parallel.context ({parallel.context}) has no attention for model.positions = 'transformer_xl': set it to "
            f"1"
        )
    if model.architecture in ("encoder_decoder", "replaced_token"):
        return f"model.positions = 'transformer_xl' is not there for model.architecture = '{model.architecture}'"
    return None


def blocks_are_of_one_kind(config: Config) -> str | None:
    """Where the norms stand, and whether blocks can be one."""
    model = config.model
    if model.norm_placement == "post" and model.parallel_block:
        return "model.parallel_block reads one norm, so it needs model.norm_placement = 'pre', not 'post'"
    if model.share_layers and model.experts:
        return "model.share_layers makes all blocks one, which model.experts cannot be: set one of them to 0 or false"
    return None


def heads_have_what_they_read(config: Config) -> str | None:
    """Widths and activations of what stands around the blocks."""
    model = config.model
    if model.mlm_transform and model.gated:
        return (
            f"model.mlm_transform applies model.activation to one matrix, so it needs 'gelu', 'gelu_exact' or 'relu', "
            f"not '{model.activation}'"
        )
    name, width = "generator_hidden" if model.generator_hidden else "hidden", model.generator_hidden or model.hidden
    if model.n_embedding != width and model.tied_embeddings and not model.mlm_transform:
        key = "embedding_size" if model.embedding_size else "hidden"
        return (
            f"model.{key} ({model.n_embedding}), the width of tied embeddings, is not model.{name} ({width}): set "
            f"model.mlm_transform, which brings features to that width, or model.tied_embeddings = false"
        )
    if model.architecture == "decoder" and (model.sentence_classes or model.mlm_transform):
        name = "sentence_classes" if model.sentence_classes else "mlm_transform"
        return f"model.{name} belongs to model.architecture = 'encoder' but this one is 'decoder'"
    pairs = config.data.objective in PAIRS
    if pairs and not model.sentence_classes:
        return f"data.objective = '{config.data.objective}' needs model.sentence_classes = 2, not 0"
    if model.sentence_classes and not pairs:
        return (
            f"model.sentence_classes ({model.sentence_classes}) needs data.objective = 'next_sentence' or "
            f"'sentence_order', which label sentences, not '{config.data.objective}': set it to 0"
        )
    if pairs and model.token_types == 1:
        return f"data.objective = '{config.data.objective}' has 2 types of tokens: set model.token_types to 2 or 0"
    if model.sentence_classes == 1:
        return "model.sentence_classes must be 0 or at least 2, not 1"
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
    relative_distances_fit,
    transformer_xl_fits,
    blocks_are_of_one_kind,
    dropout_tells_heads_apart,
)
HEAD_RULES = (heads_have_what_they_read,)
"""After those of objectives, which come first where both are broken."""
