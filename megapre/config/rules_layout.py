"""How model, batch and schedule fit the grid; rules as in ``check.py``."""

from __future__ import annotations

from megapre.config.schema import Config


def _counted(config: Config) -> str:
    """The keys whose sum is the number of blocks."""
    others = [name for name in ("encoder_layers", "generator_layers") if getattr(config.model, name)]
    return " + ".join(f"model.{name}" for name in ("layers", *others))


def heads_divide_over_tensor(config: Config) -> str | None:
    """Query heads are cut over the tensor axis; key/value heads are cut or held by neighbours."""
    model, tensor = config.model, config.parallel.tensor
    if model.heads % tensor:
        return f"model.heads ({model.heads}) must be a multiple of parallel.tensor ({tensor})"
    kv = model.n_kv_heads
    if kv % tensor and tensor % kv:
        return f"model.kv_heads ({kv}) must be a multiple or a divisor of parallel.tensor ({tensor})"
    return None


def ffn_divides_over_tensor(config: Config) -> str | None:
    """MLP features are cut over the tensor axis."""
    width, tensor = config.model.n_ffn, config.parallel.tensor
    if width % tensor:
        return f"model.ffn_hidden ({width}) must be a multiple of parallel.tensor ({tensor})"
    return None


def sequence_divides_over_tensor(config: Config) -> str | None:
    """Sequence parallelism gives each tensor rank an equal part of the sequence."""
    sequence, tensor, context = config.model.sequence, config.parallel.tensor, config.parallel.context
    if config.parallel.sequence and sequence % (tensor * context):
        of = f"parallel.tensor ({tensor})"
        if context > 1:
            of = f"parallel.tensor x parallel.context ({tensor} x {context})"
        return (
            f"parallel.sequence needs model.sequence ({sequence}) to be a multiple of {of}: change one of them or set "
            f"parallel.sequence to false"
        )
    return None


def context_divides(config: Config) -> str | None:
    """A ring rank holds two chunks of the sequence; Ulysses deals heads out."""
    parallel, model = config.parallel, config.model
    context = parallel.context
    if context == 1:
        return None
    if parallel.context_method == "ring":
        if model.sequence % (2 * context):
            return (
                f"ring attention needs model.sequence ({model.sequence}) to be a multiple of 2 x parallel.context "
                f"({2 * context})"
            )
        return None
    if model.sequence % context:
        return f"model.sequence ({model.sequence}) must be a multiple of parallel.context ({context})"
    kv = max(1, model.n_kv_heads // parallel.tensor)
    if kv % context:
        return (
            f"parallel.context_method = ulysses needs the {kv} key/value heads of a tensor rank to be a multiple of "
            f"parallel.context ({context}): change one of them or use ring"
        )
    return None


def vocabulary_covers_tensor(config: Config) -> str | None:
    """Every tensor rank holds a row of the embedding; 0 is resolved and checked with the data."""
    vocab, tensor = config.model.vocab_size, config.parallel.tensor
    if vocab and vocab < tensor:
        return f"model.vocab_size ({vocab}) must be at least parallel.tensor ({tensor}), or 0 to take the data's"
    return None


def stages_have_blocks(config: Config) -> str | None:
    """Every pipeline stage holds a block; embedding and head share the first and last."""
    layers, ranks, chunks = config.model.blocks, config.parallel.pipeline, config.parallel.chunks
    if layers < ranks * chunks:
        stages = f"parallel.pipeline ({ranks})"
        if chunks > 1:
            stages = f"parallel.pipeline x parallel.chunks ({ranks} x {chunks})"
        held = f"{_counted(config)} ({layers})"
        return f"every pipeline stage needs a block but {held} is below {stages}: change one of them"
    return None


def schedule_fits(config: Config) -> str | None:
    """Every schedule has its number of stages a rank; interleaving takes microbatches in groups."""
    parallel, train = config.parallel, config.train
    name, chunks = parallel.schedule, parallel.chunks
    if name == "interleaved" and chunks < 2:
        return f"parallel.schedule = interleaved needs parallel.chunks of at least 2, not {chunks}"
    if name == "zb-v" and chunks != 2:
        return f"parallel.schedule = zb-v needs parallel.chunks = 2, not {chunks}"
    if name in ("1f1b", "gpipe", "zb-h1") and chunks != 1:
        return f"parallel.schedule = {name} has one stage per rank: set parallel.chunks to 1, not {chunks}"
    microbatches = train.global_batch // (train.microbatch * parallel.data)
    if name == "interleaved" and microbatches % parallel.pipeline:
        return (
            f"parallel.schedule = interleaved needs microbatches in multiples of parallel.pipeline "
            f"({parallel.pipeline}), not train.global_batch / (train.microbatch x parallel.data) = {microbatches}"
        )
    return None


def offload_fits(config: Config) -> str | None:
    """Only what is gathered before each use can live elsewhere."""
    parallel = config.parallel
    if parallel.offload == "parameters" and parallel.zero != 3:
        return (
            f"parallel.offload = 'parameters' needs parallel.zero = 3, not {parallel.zero}: change one of them, or set "
            f"parallel.offload to 'optimizer'"
        )
    kind = config.optimizer.kind
    if parallel.offload != "none" and kind in ("muon", "adafactor"):
        return (
            f"parallel.offload = '{parallel.offload}' updates on the host, where optimizer.kind = '{kind}' cannot sum "
            f"over ranks: set parallel.offload to 'none', or optimizer.kind to 'adamw' or 'lion'"
        )
    return None


def recompute_has_layers(config: Config) -> str | None:
    """A number of layers belongs to a policy."""
    parallel = config.parallel
    if parallel.recompute == "none" and parallel.recompute_layers:
        return (
            f"parallel.recompute_layers ({parallel.recompute_layers}) needs parallel.recompute = 'selective' or "
            f"'full', not 'none': set it to 0 or change one of them"
        )
    return None


def layers_per_stage_fit(config: Config) -> str | None:
    """An explicit split names every stage once and every block once."""
    split, layers = config.parallel.layers_per_stage, config.model.blocks
    stages = config.parallel.pipeline * config.parallel.chunks
    if not split:
        return None
    if len(split) != stages:
        made = f"parallel.pipeline = {config.parallel.pipeline} and parallel.chunks = {config.parallel.chunks}"
        return f"parallel.layers_per_stage has {len(split)} entries, but {made} make {stages} stages"
    if min(split) < 1:
        return f"parallel.layers_per_stage holds {min(split)} but every stage needs at least 1 block"
    if sum(split) != layers:
        return f"parallel.layers_per_stage sums to {sum(split)} but {_counted(config)} is {layers}"
    return None


def batch_divides(config: Config) -> str | None:
    """A step is a whole number of microbatches on every data-parallel rank."""
    batch, micro, data = config.train.global_batch, config.train.microbatch, config.parallel.data
    if batch % (micro * data):
        return (
            f"train.global_batch ({batch}) must be a multiple of train.microbatch x parallel.data = {micro} x {data} "
            f"= {micro * data}"
        )
    return None


LAYOUT_RULES = (
    heads_divide_over_tensor,
    ffn_divides_over_tensor,
    sequence_divides_over_tensor,
    context_divides,
    vocabulary_covers_tensor,
    stages_have_blocks,
    schedule_fits,
    offload_fits,
    recompute_has_layers,
    layers_per_stage_fit,
    batch_divides,
)
