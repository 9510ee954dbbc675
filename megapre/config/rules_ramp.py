"""What the ramps of batch and sequence must satisfy; rules as in ``check.py``."""

from __future__ import annotations

from megapre.config.ramp import Steps
from megapre.config.schema import Config


def batch_ramp_reaches_the_batch(config: Config) -> str | None:
    """START + n INCREMENT = global_batch, as in Megatron."""
    ramp, final = config.train.batch_ramp, config.train.global_batch
    if not ramp:
        return None
    if len(ramp) != 3 or min(ramp) < 1:
        return f"train.batch_ramp must be [start, increment, samples] of at least 1 each, not {ramp}"
    start, increment, _ = ramp
    if start >= final or (final - start) % increment:
        return (
            f"train.batch_ramp ({ramp}) must come from below train.global_batch ({final}) to it in whole increments, "
            f"but ({final} - {start}) / {increment} = {(final - start) / increment:g}"
        )
    return None


def ramped_batches_divide(config: Config) -> str | None:
    """Every batch of the ramp is a whole number of microbatches, in groups where the schedule wants them."""
    train, parallel = config.train, config.parallel
    if not train.batch_ramp:
        return None
    unit, name = train.microbatch * parallel.data, "train.microbatch x parallel.data"
    if parallel.schedule == "interleaved":
        unit, name = unit * parallel.pipeline, f"{name} x parallel.pipeline (interleaved)"
    for batch in Steps(config).batches():
        if batch % unit:
            return (
                f"every batch of train.batch_ramp must be a multiple of {name} = {unit}, but {batch} is none: change "
                f"the ramp's start or increment"
            )
    return None


def sequence_ramp_doubles(config: Config) -> str | None:
    """Rows are whole parts of a window, and every layout can cut the shortest."""
    ramp, length, parallel = config.train.sequence_ramp, config.model.sequence, config.parallel
    if not ramp:
        return None
    if len(ramp) != 2 or min(ramp) < 1:
        return f"train.sequence_ramp must be [start, samples] of at least 1 each, not {ramp}"
    start, rows = ramp[0], length // ramp[0]
    if start >= length or length % start or rows & (rows - 1):
        return (
            f"train.sequence_ramp starts at {start} tokens, from which no doubling leads to model.sequence ({length}): "
            f"take {length} divided by 2, 4, 8, ..."
        )
    unit = 2 * parallel.context if parallel.context > 1 and parallel.context_method == "ring" else parallel.context
    if parallel.sequence or config.model.experts:
        unit *= parallel.tensor
    if start % unit:
        return (
            f"train.sequence_ramp starts at {start} tokens, which the context and tensor ranks cannot cut: "
            f"it must be a multiple of {unit}"
        )
    return None


RAMP_RULES = (batch_ramp_reaches_the_batch, ramped_batches_divide, sequence_ramp_doubles)
