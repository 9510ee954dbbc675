"""Bytes that one block keeps for its backward pass, tensor by tensor, for each engine.

``megapre`` is read off ``models/``, ``parallel/tensor.py`` and the saved tensors of ``kernels/``; ``megatron`` is
arXiv 2205.05198 with fused attention; ``classic`` is the same with dropout masks and the scores written out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megapre.planner.job import Job

STATISTICS = 8.0
"""Bytes a token that a norm keeps: two fp32 numbers."""


@dataclass(frozen=True)
class Saved:
    """One tensor kept for backward."""

    name: str
    size: float
    """Bytes of a microbatch on one rank."""
    part: str
    """``input``, ``norm``, ``attention``, ``scores``, ``mlp`` or ``activation``: what a recompute policy drops."""


DROPPED = {
    "none": (),
    "selective": ("scores",),
    "light": ("norm", "activation"),
    "full": ("norm", "attention", "scores", "mlp", "activation", "residual"),
}
"""Parts that a policy does not keep."""


def local_tokens(job: Job) -> float:
    """Tokens of a microbatch on one rank, before sequence parallelism."""
    return job.layout.microbatch * job.shape.sequence / job.layout.context


def input_width(job: Job) -> int:
    """Bytes of an element that a linear layer keeps of its input."""
    return 1 if job.stack.dtype == "fp8" else job.stack.width


def block_saved(job: Job, moe: bool) -> list[Saved]:
    """What a block keeps without recomputation, its own input included and its output not."""
    shape, layout, stack = job.shape, job.layout, job.stack
    t, tokens = layout.tensor, local_tokens(job)
    rows = tokens / (t if layout.sequence else 1)
    hidden, narrow = rows * shape.hidden * stack.width, rows * shape.hidden * input_width(job)
    kept = [Saved("input", hidden, "input"), Saved("attention norm", narrow, "norm")]
    kept += _attention(job, tokens)
    if not shape.parallel_block:
        kept += [Saved("residual", hidden, "residual"), Saved("mlp norm", narrow, "norm")]
    if stack.engine != "classic":
        kept.append(Saved("norm statistics", rows * STATISTICS * (1 if shape.parallel_block else 2), "norm"))
    if stack.engine == "classic" or (shape.dropout and stack.engine == "megatron"):
        kept.append(Saved("dropout masks", 2 * rows * shape.hidden, "residual"))
    kept += _experts(job, rows) if moe else _mlp(job, tokens, shape.ffn / t)
    return kept


def _attention(job: Job, tokens: float) -> list[Saved]:
    shape, layout, stack = job.shape, job.layout, job.stack
    w, t = stack.width, layout.tensor
    q = tokens * shape.q_width / t * w
    kv = tokens * max(shape.kv_width / t, shape.head_dim) * w
    if stack.engine != "megapre":
        kept = [Saved("q, k, v", q + 2 * kv, "attention"), Saved("attention output", q, "attention")]
        if stack.dtype == "fp8":  # the kernel keeps its output beside the fp8 one of the output layer
            kept.append(Saved("fp8 attention output", q / w, "attention"))
        scores = tokens * shape.sequence * shape.heads / t
        if stack.attention == "unfused":
            kept.append(Saved("scores", (2 * w + 1) * scores, "scores"))
        return kept
    return [*_megapre_core(job, tokens, q, kv), Saved("attention output", q, "attention")]


def _megapre_core(job: Job, tokens: float, q: float, kv: float) -> list[Saved]:
    """What our attention keeps between projection and output layer."""
    shape, layout, stack = job.shape, job.layout, job.stack
    repeats = shape.heads // shape.kv_heads > 1 and stack.attention != "unfused"
    if layout.recompute == "selective":  # what is kept is what goes in
        repeats = False
    rope = not shape.learned_positions
    kept = []
    if repeats:  # keys and values repeated for every query head; the fused projection is then free
        kept.append(Saved("rotated q" if rope else "q, k, v", q if rope else q + 2 * kv, "attention"))
        kept.append(Saved("repeated k, v", 2 * q, "scores"))
    else:
        kept.append(Saved("q, k, v", q + 2 * kv, "attention"))
        if rope:
            kept.append(Saved("rotated q, k", q + kv, "attention"))
    if stack.attention == "unfused":
        scores = tokens * shape.sequence * shape.heads / layout.tensor
        kept.append(Saved("scores", scores * 4 * (3 if shape.dropout else 2), "scores"))
    else:
        kept.append(Saved("log-sum-exp", tokens * shape.heads / layout.tensor * 4, "scores"))
    return kept


def _mlp(job: Job, tokens: float, width: float) -> list[Saved]:
    up = tokens * width * (job.shape.matrices - 1) * job.stack.width
    return [
        Saved("mlp up", up, "mlp"),
        Saved("activation", tokens * width * input_width(job), "activation"),
    ]


def _experts(job: Job, rows: float) -> list[Saved]:
    """Tokens dealt to experts, evenly; those of shared experts stay."""
    shape, layout, w = job.shape, job.layout, job.stack.width
    tokens = local_tokens(job)
    dealt = tokens / layout.tensor * shape.experts_per_token * layout.expert_tensor
    kept = [
        Saved("dispatched", dealt * shape.hidden * w, "mlp"),
        Saved("router", rows * shape.experts * 4, "mlp"),
        *_mlp(job, dealt, shape.expert_ffn / layout.expert_tensor),
    ]
    if job.stack.engine == "megapre":  # Megatron weighs the experts' inputs of the second matrix, and keeps no output
        kept.append(Saved("combined", dealt * shape.hidden * w, "mlp"))
    return kept + (_mlp(job, tokens, shape.shared_ffn / layout.tensor) if shape.shared_ffn else [])


def kept_bytes(job: Job, moe: bool) -> tuple[float, float]:
    """(bytes a block keeps under the job's policy, all of its tensors' bytes)."""
    tensors = block_saved(job, moe)
    dropped = DROPPED[job.layout.recompute]
    whole = sum(tensor.size for tensor in tensors)
    kept = sum(tensor.size for tensor in tensors if tensor.part not in dropped)
    share = job.layout.recompute_share
    return share * kept + (1 - share) * whole, whole
