"""Seconds of an optimizer step.

A block costs its operations, its tensor-, context- and expert-parallel traffic, and at least the time its kernels
take to launch. Stages of blocks, embedding and head give every action of the pipeline's schedule its cost, and the
simulator that the engine trusts (``parallel/pipeline/simulate.py``) gives the time of the schedule. Data-parallel
traffic, the optimizer and a fixed part follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from megapre.planner.constants import Constants
from megapre.planner.job import Job
from megapre.planner.pipeline import Costs, pipeline_time, stage_layers
from megapre.planner.speed import Speed
from megapre.planner.work import linears

FLOOR = 8.0
"""Exponent with which computation and launches are joined: (a^p + b^p)^(1/p), close to their maximum."""


TENSOR_HIDDEN = {"megapre": (0.0, 0.5)}
"""Parts of forward's and backward's tensor-parallel traffic that can be hidden at all. Ours waits for forward's sums
and for gradients of row-parallel layers; others cut products into pieces that travel while the next are computed."""
WHOLE_LOSS, CHUNKED_LOSS = 22.0, 10.0
"""Bytes per logit that a loss moves: with fp32 copies of all logits, or in place over chunks of rows."""


@dataclass(frozen=True)
class Block:
    """Seconds of one block and microbatch on one rank."""

    forward: float
    """Computation."""
    input_gradient: float
    weight_gradient: float
    forward_traffic: float
    """Tensor-, context- and expert-parallel traffic that computation does not hide."""
    backward_traffic: float
    recomputed: float
    """Computation and traffic of what backward runs again."""
    launch_forward: float
    """What the host needs at least."""
    launch_backward: float

    @property
    def f(self) -> float:
        """Of a forward pass."""
        return join(self.forward + self.forward_traffic, self.launch_forward)

    @property
    def b(self) -> float:
        """Of a backward pass, weight gradients included."""
        device = self.recomputed + self.input_gradient + self.weight_gradient + self.backward_traffic
        return join(device, self.launch_backward)


@dataclass(frozen=True)
class Time:
    """A predicted step, in seconds; the parts add up to ``step``."""

    step: float
    compute: float
    """Forward and backward of the fullest rank's blocks and head, without recomputation."""
    recompute: float
    tensor: float
    """Exposed tensor-, context- and expert-parallel traffic."""
    launch: float
    """Waiting for the host."""
    bubble: float
    """Waiting for other stages, messages included."""
    data: float
    """Exposed data-parallel traffic."""
    optimizer: float
    other: float
    details: dict[str, float] = field(default_factory=dict)

    def parts(self) -> dict[str, float]:
        """Name -> seconds."""
        names = ("compute", "recompute", "tensor", "launch", "bubble", "data", "optimizer", "other")
        return {name: getattr(self, name) for name in names}


def join(device: float, host: float) -> float:
    """The time of work that the host launches while the device runs it."""
    top = max(device, host)
    return top * ((device / top) ** FLOOR + (host / top) ** FLOOR) ** (1 / FLOOR) if top else 0.0


def block(job: Job, speed: Speed, moe: bool) -> Block:
    """The cost of one block."""
    constants, shape, layout, stack = speed.constants, job.shape, job.layout, job.stack
    tokens = layout.microbatch * shape.sequence / layout.context
    dense, experts = linears(job, tokens, moe)
    kinds = ((dense, 1.0), (experts, constants.moe))
    parts = [[part * scale for part in speed.linear(layer)] for layers, scale in kinds for layer in layers]
    forward, inputs, weights = (sum(column) for column in zip(*parts))
    attention_f, attention_b = speed.attention(tokens)
    bytes_f, bytes_b = speed.byte_bound(tokens, moe)
    traffic_f, traffic_b = _traffic(job, speed, tokens, moe, attention_f)
    forward += attention_f + bytes_f
    again = {
        "full": forward + traffic_f * (1.0 if not stack.overlap else 0.7),
        "selective": attention_f if stack.attention == "unfused" or stack.engine == "megapre" else 0.0,
        "light": bytes_f,
    }.get(layout.recompute, 0.0) * layout.recompute_share
    local = max(1, shape.experts // layout.expert) if moe else 0
    launch = speed.launch * (1 + constants.launch_moe * local)
    launch *= 1 + constants.launch_tensor * (layout.tensor if layout.tensor > 1 else 0)
    if stack.fusion == "compiled":
        launch *= 0.3
    return Block(
        forward, inputs + attention_b + bytes_b, weights, traffic_f, traffic_b, again, launch,
        launch * (1.5 + (layout.recompute_share if layout.recompute == "full" else 0.0)),
    )  # fmt: skip


def _traffic(job: Job, speed: Speed, tokens: float, moe: bool, attention: float) -> tuple[float, float]:
    """Exposed seconds of a block's exchanges, forward and backward."""
    constants, shape, layout = speed.constants, job.shape, job.layout
    net, width = speed.network, job.stack.width
    forward = backward = 0.0
    if layout.tensor > 1:  # two all-reduces, or two gathers and two reduce-scatters, each way
        forward = backward = 2 * net.all_reduce(tokens * shape.hidden * width, layout.tensor)
        if job.stack.overlap and job.stack.tensor_overlap:
            early, late = TENSOR_HIDDEN.get(job.stack.engine, (0.6, 1.0))
            forward *= 1 - early * constants.tensor_overlap
            backward *= 1 - late * constants.tensor_overlap
    if moe and layout.expert > 1:  # dispatch and combine
        exchange = 2 * net.exchange_of_experts(
            tokens / layout.tensor, shape.experts_per_token, shape.hidden * width, layout.expert, layout.expert_tensor
        )
        forward, backward = forward + exchange, backward + exchange
    if moe and layout.expert_tensor > 1 and layout.expert > 1:
        gathered = tokens / layout.tensor * shape.experts_per_token * shape.hidden * width * layout.expert_tensor
        folded = 2 * net.gather(gathered, layout.expert_tensor)
        forward, backward = forward + folded, backward + folded
    if layout.context > 1:  # ring attention passes keys and values on behind its computation
        sent = tokens * (layout.context - 1) * 2 * width * shape.kv_width / layout.tensor
        ring = sent / net.bandwidth(layout.context, layout.tensor)
        forward += max(0.15 * ring, ring - attention)
        backward += max(0.3 * ring, 2 * ring - 2 * attention)
    return forward, backward


@dataclass(frozen=True)
class StageCost:
    """Seconds of a microbatch on one stage."""

    forward: float
    backward: float
    weight: float
    """Part of ``backward`` that a W action can do."""


def stage_costs(job: Job, speed: Speed, dense: Block, moe: Block | None) -> list[StageCost]:
    """Every stage's cost: its blocks; the embedding is negligible; the head's product and loss on the last."""
    shape, layout = job.shape, job.layout
    counts = stage_layers(shape, layout)
    head_f, head_i, head_w = head(job, speed)
    costs, done = [], 0
    known: dict[tuple[int, int, bool], StageCost] = {}
    for index, count in enumerate(counts):
        plain = min(max(0, shape.layers - shape.moe_layers - done), count)
        done += count
        last = index == len(counts) - 1
        like = (plain, count, last)
        if like not in known:
            kinds = [(plain, dense), (count - plain, moe or dense)]
            known[like] = StageCost(
                sum(n * each.f for n, each in kinds) + (head_f if last else 0.0),
                sum(n * each.b for n, each in kinds) + (head_i + head_w if last else 0.0),
                sum(n * each.weight_gradient for n, each in kinds) + (head_w if last else 0.0),
            )
        costs.append(known[like])
    return costs


def head(job: Job, speed: Speed) -> tuple[float, float, float]:
    """Output layer and loss: forward, gradient of the input, gradient of the weight.

    Where the device's profile has a measurement of our own head, all of it is forward's, which makes the gradients too.
    """
    shape, layout = job.shape, job.layout
    tokens = layout.microbatch * shape.sequence / layout.context
    columns = shape.vocab / layout.tensor
    rate = job.device.head_rate(speed.base, shape.hidden) if job.stack.engine == "megapre" else None
    if rate:
        return 6.0 * tokens * columns * shape.hidden / rate, 0.0, 0.0
    product = speed.product(tokens, columns, shape.hidden, fp8=False)
    passes = CHUNKED_LOSS if job.stack.engine == "megapre" else WHOLE_LOSS
    loss = tokens * passes * columns / speed.memory * job.stack.width / 2
    return product + 0.5 * loss, product + 0.5 * loss, product


def predict(job: Job, constants: Constants, pipeline: Callable[[Job, Costs], float] = pipeline_time) -> Time:
    """The step of ``job``. ``pipeline`` gives the time of the schedule from every stage's costs."""
    speed = Speed(job, constants)
    constants = speed.constants
    shape, layout = job.shape, job.layout
    dense = block(job, speed, moe=False)
    moe = block(job, speed, moe=True) if shape.moe_layers else None
    stages = stage_costs(job, speed, dense, moe)
    hop = _hop(job, speed)
    elements = rank_elements(job)
    stages, gathered = _sharded(job, speed, stages, elements)
    exposed = constants.hop * (0.5 if job.stack.overlap else 1.0) * hop
    costs = Costs(
        [s.forward + exposed for s in stages], [s.backward + exposed for s in stages], [s.weight for s in stages],
        (1 - constants.hop) * hop,
    )  # fmt: skip
    piped = pipeline(job, costs)
    own = _rank_sums(job, stages)
    busy = layout.microbatches * max(own)
    reduced, optimizer = _after(job, speed, elements, max(own))
    nodes = max(1.0, layout.ranks / job.device.gpus_per_node)
    total = (piped + reduced + optimizer + constants.fixed) * (1 + constants.jitter * math.log2(nodes))
    return _told(job, dense, moe, total, piped, busy, reduced, optimizer, gathered, elements)


def rank_elements(job: Job) -> tuple[float, float]:
    """Dense and expert weights of the fullest rank."""
    shape, layout = job.shape, job.layout
    blocks = max(stage_layers(shape, layout)) * layout.chunks
    dense_share = (shape.layers - shape.moe_layers) / shape.layers
    routed = shape.matrices * shape.hidden * shape.expert_ffn * shape.experts
    moe_dense = shape.mlp_weights(True) - routed if shape.experts else 0
    mlp = dense_share * shape.mlp_weights(False) + (1 - dense_share) * moe_dense
    dense = blocks * (shape.attention_weights() + mlp) / layout.tensor + shape.vocab * shape.hidden / layout.tensor
    if layout.pipeline == 1 and not shape.tied:
        dense += shape.vocab * shape.hidden / layout.tensor
    experts = blocks * (1 - dense_share) * routed / (layout.expert * layout.expert_tensor)
    return dense, experts


def _hop(job: Job, speed: Speed) -> float:
    """Seconds of one message between neighbouring stages."""
    shape, layout = job.shape, job.layout
    if layout.pipeline == 1:
        return 0.0
    crosses = layout.ranks > job.device.gpus_per_node
    bandwidth = speed.network.adapter if crosses else 0.5 * (job.nvlink or job.device.nvlink)
    split = layout.tensor if layout.sequence or layout.chunks > 1 else 1
    size = layout.microbatch * shape.sequence / layout.context * shape.hidden * job.stack.width / split
    return speed.network.latency + size / bandwidth


def _sharded(
    job: Job, speed: Speed, stages: list[StageCost], elements: tuple[float, float]
) -> tuple[list[StageCost], float]:
    """Stages under ZeRO-3: weights are gathered for forward and for backward, gradients scattered, each microbatch."""
    layout, constants, net = job.layout, speed.constants, speed.network
    ranks = layout.replicas
    if layout.zero < 3 or ranks == 1:
        return stages, 0.0
    shard = layout.shard or ranks
    held = sum(elements) / len(stages)
    rounds = stage_layers(job.shape, layout)[0]
    late = net.started(shard, rounds) * (1 + 0.02 * ranks / job.device.gpus_per_node)
    gather = (shard - 1) / shard * job.stack.width * held / net.bandwidth(shard, layout.tensor) + late
    scatter = (shard - 1) / shard * job.stack.reduced_bytes * held / net.bandwidth(shard, layout.tensor) + late
    if shard < ranks:
        scatter += net.all_reduce(job.stack.reduced_bytes * held / shard, ranks // shard, shard * layout.tensor) / (
            layout.microbatches
        )
    hidden = constants.shard_overlap

    def both(computed: float, moved: float) -> float:
        return max(computed, moved) + (1 - hidden) * min(computed, moved)

    made = [StageCost(both(s.forward, gather), both(s.backward, gather + scatter), s.weight) for s in stages]
    return made, made[0].forward + made[0].backward - stages[0].forward - stages[0].backward


def _rank_sums(job: Job, stages: list[StageCost]) -> list[float]:
    """Seconds of a microbatch on every pipeline rank, all its stages together."""
    from megapre.planner.pipeline import owners

    sums = [0.0] * job.layout.pipeline
    for owner, stage in zip(owners(job.layout), stages):
        sums[owner] += stage.forward + stage.backward
    return sums


def _after(job: Job, speed: Speed, elements: tuple[float, float], microbatch: float) -> tuple[float, float]:
    """Exposed data-parallel traffic and the optimizer."""
    layout, stack, net, constants = job.layout, job.stack, speed.network, speed.constants
    dense, experts = elements
    ranks = layout.replicas
    moved = 0.0
    if ranks > 1 and layout.zero < 3:
        if layout.zero == 0:
            moved = net.all_reduce(stack.reduced_bytes * dense, ranks, layout.tensor)
        else:
            reduce = net.gather if stack.overlap or layout.zero == 2 else net.all_reduce
            moved = reduce(stack.reduced_bytes * dense, ranks, layout.tensor)
            moved += net.gather(stack.width * dense, ranks, layout.tensor)
        if experts and layout.expert_replicas > 1:
            size = (stack.reduced_bytes + stack.width) * experts
            moved += net.gather(size, layout.expert_replicas, layout.expert * layout.expert_tensor)
        if stack.overlap:
            moved -= min(constants.data_overlap * moved, 0.7 * microbatch)
    split = ranks if layout.zero else 1
    held = dense / split + experts / (layout.expert_replicas if layout.zero else 1)
    return moved, speed.optimizer(held, dense + experts if layout.zero else 0.0)


def _told(
    job: Job, dense: Block, moe: Block | None, total: float, piped: float, busy: float, reduced: float,
    optimizer: float, gathered: float, elements: tuple[float, float],
) -> Time:  # fmt: skip
    """Share the step out over its causes."""
    layout, shape = job.layout, job.shape
    blocks = max(stage_layers(shape, layout)) * layout.chunks
    share = shape.moe_layers / shape.layers
    kinds = [(1 - share, dense), (share, moe or dense)]
    times = layout.microbatches * blocks
    recompute = times * sum(w * k.recomputed for w, k in kinds)
    tensor = times * sum(w * (k.forward_traffic + k.backward_traffic) for w, k in kinds)
    device = [
        k.forward + k.forward_traffic + k.recomputed + k.input_gradient + k.weight_gradient + k.backward_traffic
        for _, k in kinds
    ]
    launch = max(0.0, times * sum(w * (k.f + k.b - d) for (w, k), d in zip(kinds, device)))
    waiting = layout.microbatches * layout.chunks * gathered
    compute = max(0.0, busy - recompute - tensor - launch - waiting)
    return Time(
        step=total,
        compute=compute,
        recompute=recompute,
        tensor=tensor,
        launch=launch,
        bubble=max(0.0, piped - busy),
        data=reduced + waiting,
        optimizer=optimizer,
        other=total - max(piped, busy) - reduced - optimizer,
        details={"dense_elements": elements[0], "expert_elements": elements[1]},
    )
