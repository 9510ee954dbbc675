"""What each architecture needs and what it cannot be combined with; rules as in ``check.py``."""

from __future__ import annotations

from megapre.config.schema import Config


def encoder_is_described(config: Config) -> str | None:
    """An encoder beside the decoder has blocks and a length; no other architecture reads them."""
    model = config.model
    keys = {"model.encoder_layers": model.encoder_layers, "model.source_sequence": model.source_sequence}
    for key, value in keys.items():
        if model.architecture == "encoder_decoder" and not value:
            return f"model.architecture = 'encoder_decoder' needs {key} of at least 1, not 0"
        if model.architecture != "encoder_decoder" and value:
            return (
                f"{key} ({value}) belongs to model.architecture = 'encoder_decoder' but this one is "
                f"'{model.architecture}': leave it out"
            )
    return None


def encoder_decoder_fits(config: Config) -> str | None:
    """What cross-attention and two sequences are not combined with."""
    model, parallel = config.model, config.parallel
    if model.architecture != "encoder_decoder":
        return None
    if parallel.context > 1:
        return (
            f"parallel.context ({parallel.context}) cannot cut the two sequences of model.architecture = "
            f"'encoder_decoder': set it to 1"
        )
    if model.experts:
        return f"model.architecture = 'encoder_decoder' has no experts: set model.experts to 0, not {model.experts}"
    for key in ("embedding_size", "token_types", "mlm_transform", "sentence_classes", "share_layers"):
        if getattr(model, key):
            shown = str(getattr(model, key)).lower()
            return f"model.{key} ({shown}) belongs to single stacks, not to model.architecture = 'encoder_decoder'"
    if model.parallel_block:
        return "model.parallel_block has no place for the cross-attention of 'encoder_decoder': set it to false"
    if parallel.sequence and model.source_sequence % parallel.tensor:
        return (
            f"parallel.sequence needs model.source_sequence ({model.source_sequence}) to be a multiple of "
            f"parallel.tensor ({parallel.tensor}): change one of them or set parallel.sequence to false"
        )
    if config.train.sequence_ramp:
        return "train.sequence_ramp cannot cut samples of a source and a target: leave it empty"
    return None


def two_stream_fits(config: Config) -> str | None:
    """What the two streams are not combined with."""
    model, parallel = config.model, config.parallel
    if model.architecture != "two_stream":
        return None
    if parallel.context > 1:
        return (
            f"parallel.context ({parallel.context}) deals out positions, not the order of model.architecture = "
            f"'two_stream': set it to 1"
        )
    for key in ("experts", "parallel_block", "token_types", "mlm_transform", "sentence_classes", "embedding_size"):
        if getattr(model, key) and not (key == "token_types" and model.positions == "transformer_xl"):
            shown = str(getattr(model, key)).lower()
            return f"model.{key} ({shown}) does not go with model.architecture = 'two_stream': leave it out"
    return None


def generator_is_described(config: Config) -> str | None:
    """A generator before the discriminator has blocks and a width that its heads divide; no other architecture one."""
    model = config.model
    for key in ("generator_layers", "generator_hidden"):
        value = getattr(model, key)
        if model.architecture == "replaced_token" and not value:
            return f"model.architecture = 'replaced_token' needs model.{key} of at least 1, not 0"
        if model.architecture != "replaced_token" and value:
            return (
                f"model.{key} ({value}) belongs to model.architecture = 'replaced_token' but this one is "
                f"'{model.architecture}': leave it out"
            )
    if model.architecture == "replaced_token" and model.generator_hidden % model.head_dim:
        return (
            f"model.generator_hidden ({model.generator_hidden}) must be a multiple of the {model.head_dim} features "
            f"of a head, which are the discriminator's"
        )
    return None


def replaced_token_fits(config: Config) -> str | None:
    """What generator and discriminator are not combined with, and how the generator fits the layout."""
    model, parallel = config.model, config.parallel
    if model.architecture != "replaced_token":
        return None
    if model.experts:
        return f"model.architecture = 'replaced_token' has no experts: set model.experts to 0, not {model.experts}"
    if model.n_kv_heads != model.heads:
        return f"model.kv_heads ({model.kv_heads}) does not go with model.architecture = 'replaced_token': leave it out"
    if model.gated:
        return (
            f"model.architecture = 'replaced_token' applies model.activation to one matrix in its head, so it needs "
            f"'gelu', 'gelu_exact' or 'relu', not '{model.activation}'"
        )
    heads, ffn = model.generator.heads, model.generator.n_ffn
    ranks = parallel.tensor * (parallel.context if parallel.context_method == "ulysses" else 1)
    if heads % ranks:
        return (
            f"the generator's {heads} heads (model.generator_hidden = {model.generator_hidden} over {model.head_dim} "
            f"features a head) must be a multiple of the {ranks} ranks that share them"
        )
    if not ffn or ffn % parallel.tensor:
        return (
            f"the generator's MLP of {ffn} features (model.ffn_hidden x model.generator_hidden / model.hidden) must be "
            f"a multiple of parallel.tensor ({parallel.tensor}), and not 0"
        )
    return None


ARCHITECTURE_RULES = (
    encoder_is_described,
    encoder_decoder_fits,
    two_stream_fits,
    generator_is_described,
    replaced_token_fits,
)
