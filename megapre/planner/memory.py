"""Bytes of a rank by kind, at the peak of its part of the schedule.

Weights, gradients and optimizer follow from the elements that a rank holds and the ZeRO stage. Activations follow the
rank's actions in the order of the schedule that the engine runs: F keeps, B (or W) releases.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from megapre.parallel.pipeline.actions import BACKWARD, FORWARD, WEIGHT, Compute
from megapre.parallel.pipeline.schedules import SCHEDULES
from megapre.planner.job import Job, Shape
from megapre.planner.pipeline import SPLIT, owners, stage_layers, zero_bubble_h2
from megapre.planner.saved import STATISTICS, kept_bytes, local_tokens
from megapre.planner.work import linears

GIB = 2.0**30
KINDS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "allocator")
CONTEXT = 2.0 * GIB
"""A GPU's context, communicators and workspaces."""
FRAGMENTS = 0.04
"""Share of activations that a caching allocator loses."""
LOSS_ROWS, LOSS_COLUMNS = 768, 4096
"""Logits, and columns of a product, that our loss makes at a time (``kernels/linear_cross_entropy.py``)."""
ROUNDS = 4
"""Microbatches simulated per pipeline rank: the peak comes in the first rounds."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    allocator: float = 0.0

    @property
    def total(self) -> float:
        """All kinds."""
        return sum(self.kinds().values())

    def kinds(self) -> dict[str, float]:
        """Kind -> bytes."""
        return {name: getattr(self, name) for name in KINDS}


@dataclass(frozen=True)
class Elements:
    """Weights of one rank: those that replicas share, and those of experts."""

    dense: float
    experts: float
    block: float
    """Of the largest block, experts included. ZeRO-2 and 3 hold two neighbouring layers whole at a time."""
    head: float
    """Of the output layer's table; 0 where the rank has none."""
    tables: float
    """Of embedding and output layer, a shared one counted once."""

    @property
    def pair(self) -> float:
        """Of the two neighbouring layers that are largest together."""
        return self.block + max(self.block, self.head)


def block_elements(shape: Shape, tensor: int, moe: bool) -> tuple[float, float]:
    """(dense, routed experts') elements of one block on one tensor rank, experts not yet split."""
    h, t = shape.hidden, tensor
    kv = max(shape.kv_width / t, shape.head_dim)
    matrices = 2 * h * shape.q_width / t + 2 * h * kv
    vectors = shape.block_vectors(t)
    if not moe:
        return matrices + shape.matrices * h * shape.ffn / t + vectors, 0.0
    shared = shape.matrices * h * shape.shared_ffn / t + h * shape.experts
    return matrices + shared + vectors, float(shape.matrices * h * shape.expert_ffn * shape.experts)


def elements(job: Job, rank: int) -> Elements:
    """Weights of pipeline rank ``rank``."""
    shape, layout = job.shape, job.layout
    table = -(-shape.vocab // layout.tensor) * shape.hidden
    split = layout.expert * layout.expert_tensor
    counts, owned = stage_layers(shape, layout), owners(layout)
    first_moe = shape.layers - shape.moe_layers
    dense = experts = tables = done = 0.0
    largest = 0.0
    has_table = has_head = False
    for stage, (count, owner) in enumerate(zip(counts, owned)):
        plain = min(max(0, first_moe - done), count)
        done += count
        if owner != rank:
            continue
        for number, moe in ((plain, False), (count - plain, True)):
            shared, routed = block_elements(shape, layout.tensor, moe) if number else (0.0, 0.0)
            dense, experts = dense + number * shared, experts + number * routed / split
            largest = max(largest, shared + routed / split)
        if stage == 0:
            tables += table
            dense += table + (shape.sequence * shape.hidden if shape.learned_positions else 0)
            has_table = True
        if stage == len(counts) - 1:
            has_head = True
            own = 0 if shape.tied and has_table else table
            tables += own
            dense += shape.norm + own
    return Elements(dense, experts, largest, float(table) if has_head else 0.0, tables)


def memory(job: Job, rank: int = 0) -> Memory:
    """Peak bytes of pipeline rank ``rank``."""
    layout, stack = job.layout, job.stack
    held = elements(job, rank)
    groups = ((held.dense, layout.shard or layout.replicas), (held.experts, layout.expert_replicas))

    def split(stage: int) -> float:
        return sum(count / (ranks if layout.zero >= stage else 1) for count, ranks in groups)

    weights = split(3) * stack.width
    gradients = split(2) * stack.gradient_bytes
    wide, (of_blocks, of_tables) = max(1.0, stack.width / 4), stack.moment_bytes
    tables = held.tables / (groups[0][1] if layout.zero else 1)
    optimizer = split(1) * (of_blocks * wide + stack.master_bytes) + tables * (of_tables - of_blocks) * wide
    if layout.offload != "none":
        optimizer = 0.0
    if layout.offload == "parameters":
        weights = 0.0
    activations, logits, rooms = _peak(job, rank, held)
    buffers = _buffers(job, held) + rooms
    lost = 0.0
    if job.device.kind == "gpu":
        lost = CONTEXT + FRAGMENTS * (activations + logits + buffers) + stack.extra_memory
    return Memory(weights, gradients, optimizer, activations, logits, buffers, lost)


def fullest(job: Job) -> Memory:
    """The rank that needs most."""
    return max((memory(job, rank) for rank in ends(job)), key=lambda m: m.total)


def ends(job: Job) -> list[int]:
    """Pipeline ranks among which the fullest is: the first, the second and the last."""
    return sorted({0, min(1, job.layout.pipeline - 1), job.layout.pipeline - 1})


@lru_cache(maxsize=4096)
def rank_actions(schedule: str, ranks: int, chunks: int, microbatches: int, rank: int) -> tuple[Compute, ...]:
    """The compute actions of one rank, enough of them to reach its peak."""
    count = min(microbatches, ROUNDS * ranks)
    if schedule == "zb-h2":
        return tuple(zero_bubble_h2(ranks, count)[rank])
    return tuple(SCHEDULES[schedule].generate(ranks, chunks, count)[rank])


def _peak(job: Job, rank: int, held: Elements) -> tuple[float, float, float]:
    """(activations, logits, whole gradients of ZeRO-2 and 3) at the moment when their sum is largest."""
    shape, layout = job.shape, job.layout
    counts = stage_layers(shape, layout)
    first_moe = shape.layers - shape.moe_layers
    blocks = {moe: kept_bytes(job, moe) for moe in ((False, True) if shape.moe_layers else (False,))}
    keeps: list[float] = []
    done = 0
    for count in counts:
        plain = min(max(0, first_moe - done), count)
        done += count
        keeps.append(plain * blocks[False][0] + (count - plain) * blocks.get(True, (0.0, 0.0))[0])
    last = len(counts) - 1
    head_kept, logits, head_extra = head_bytes(job)
    again = max(whole for _, whole in blocks.values()) - (0 if layout.recompute != "full" else _input_bytes(job))
    working = again if layout.recompute == "full" else 0.0
    working += _transient(job)
    whole = job.stack.gradient_bytes if layout.zero >= 2 else 0.0
    live = 0.0
    peak = (0.0, 0.0, 0.0)
    split = layout.schedule in SPLIT
    products = [count * product_bytes(job) for count in counts] if split else [0.0] * len(counts)
    for action in rank_actions(layout.schedule, layout.pipeline, layout.chunks, layout.microbatches, rank):
        at_head = action.stage == last and action.kind == BACKWARD
        if action.kind == FORWARD:
            live += keeps[action.stage]
        if action.kind == FORWARD:
            peak = max(peak, (live, 0.0, 0.0), key=sum)
        elif action.kind == BACKWARD:
            grown = max(0.0, products[action.stage] - keeps[action.stage])
            peak = max(peak, (live + working + grown, 0.0, whole * held.pair), key=sum)
        if at_head:
            peak = max(peak, (live + head_kept + head_extra, logits, whole * held.head), key=sum)
        if action.kind == BACKWARD:
            live += products[action.stage] - keeps[action.stage]
        elif action.kind == WEIGHT:
            live -= products[action.stage]
    return peak


def product_bytes(job: Job) -> float:
    """What a block's W actions need after its B: input and output gradient of every linear layer."""
    moe = job.shape.moe_layers > 0
    layers = [layer for kind in linears(job, local_tokens(job), moe) for layer in kind]
    return sum(layer.groups * layer.rows * (layer.inputs + layer.outputs) for layer in layers) * job.stack.width


def _input_bytes(job: Job) -> float:
    rows = local_tokens(job) / (job.layout.tensor if job.layout.sequence else 1)
    return rows * job.shape.hidden * job.stack.width


def head_bytes(job: Job) -> tuple[float, float, float]:
    """Final norm and its input, logits, and what their backward needs beside them, for a microbatch."""
    shape, layout, w = job.shape, job.layout, job.stack.width
    tokens = local_tokens(job)
    rows = tokens / (layout.tensor if layout.sequence else 1)
    columns = -(-shape.vocab // layout.tensor)
    kept = rows * (2 * shape.hidden * w + STATISTICS)
    logits = tokens * columns * w
    if job.stack.engine == "megapre":  # the output layer and its loss run over chunks of rows
        logits = min(LOSS_ROWS, tokens) * columns * w
        extra = tokens * shape.hidden * w * (2 if layout.sequence else 1)
        extra += min(LOSS_COLUMNS, columns) * shape.hidden * w if w < 4 else 0.0
    else:  # fp32 logits beside the 16-bit ones, and their gradient
        extra = tokens * columns * 8.0 if layout.pipeline == 1 else tokens * columns * 4.0
    return kept, logits, extra


def _transient(job: Job) -> float:
    """Gradients of the block whose backward runs, beyond what it frees."""
    shape, layout, w = job.shape, job.layout, job.stack.width
    tokens = local_tokens(job)
    return tokens * (shape.ffn * shape.matrices / layout.tensor + 2 * shape.hidden) * w


def _buffers(job: Job, held: Elements) -> float:
    """Inputs of the step's microbatches, rotation tables, whole weights of ZeRO-3."""
    shape, layout, stack = job.shape, job.layout, job.stack
    tokens = local_tokens(job)
    size = 0.0
    if stack.engine == "megapre":
        each = tokens * (8 + 8 + 4 + 8) + (0 if shape.learned_positions else tokens * 4 * shape.head_dim)
        size += each * layout.microbatches
    if layout.zero == 3:
        size += stack.width * held.pair
    return size
