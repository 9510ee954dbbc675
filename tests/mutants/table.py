"""Seeded bugs: each re-creates one that a real engine had, and names the test that must notice it.

``exhibit`` refers to the public threads quoted in the note. A mutant that no longer applies fails its test too:
a mutant that cannot be planted proves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """Replace ``old`` by ``new`` once in ``file``; ``test`` must then fail."""

    name: str
    file: str
    old: str
    new: str
    test: str
    note: str


LAYOUTS = "tests/equivalence/test_layouts.py::test_layout_agrees_with_the_oracle"
ZERO = "tests/equivalence/test_layouts.py::test_zero_and_offload_agree"
TIMING = "tests/equivalence/test_layouts.py::test_order_and_timing_of_messages_do_not_matter"
EXPERTS = "tests/equivalence/test_experts.py::test_experts_agree_with_the_oracle"

MUTANTS = (
    Mutant(
        "norm-gradient-not-summed-over-sequence-shards",
        "megapre/parallel/placement.py",
        'return "tensor" if sequence_parallel or self.token_shard else ""',
        'return ""',
        f"{LAYOUTS}[gpt-2x1x1+sp]",
        "replicated weights that see a shard of the sequence: Megatron-LM's sequence_parallel attribute was forgotten",
    ),
    Mutant(
        "kv-head-copies-not-summed",
        "megapre/parallel/placement.py",
        'return "kv" if self.placement.copies > 1 else ""',
        'return ""',
        f"{LAYOUTS}[llama-4x1x2+sp+zero1]",
        "fewer key/value heads than tensor ranks",
    ),
    Mutant(
        "norm-counts-replicas",
        "megapre/optim/clip.py",
        "if slot.primary and a < b:",
        "if a < b:",
        f"{LAYOUTS}[gpt-2x1x1]",
        "Megatron-LM PR #5916: grad-norm off by sqrt(TP)",
    ),
    Mutant(
        "tied-embedding-counted-twice",
        "megapre/parallel/layout.py",
        " and min(spec.layers) in held",
        "",
        f"{LAYOUTS}[gpt-1x2x1]",
        "Megatron-LM #7227: tied embedding counted twice in the norm",
    ),
    Mutant(
        "norm-of-this-rank-only",
        "megapre/optim/clip.py",
        "self.world.all_reduce(squares).wait()",
        "pass",
        f"{LAYOUTS}[gpt-1x2x1]",
        "torchtune #2420: clip by the local norm",
    ),
    Mutant(
        "tied-gradients-not-exchanged",
        "megapre/parallel/zero.py",
        "self._sums[index].append(self._grid.tied.all_reduce(whole))",
        "pass",
        f"{LAYOUTS}[gpt-1x2x2+zero1]",
        "Megatron-LM #844: embedding gradients of first and last stage differ",
    ),
    Mutant(
        "mean-over-data-ranks",
        "megapre/parallel/zero.py",
        "        if not self._partition.zero:\n            return axis.all_reduce(whole)",
        "        whole /= self._grid.data.size\n"
        "        if not self._partition.zero:\n            return axis.all_reduce(whole)",
        f"{LAYOUTS}[gpt-1x1x2]",
        "transformers #34242: a second average over ranks",
    ),
    Mutant(
        "denominator-of-this-rank",
        "megapre/training/step.py",
        "self.scaler.value / targets",
        "self.scaler.value / sum(float(m.weights.sum()) for m in microbatches) / self.grid.data.size",
        f"{LAYOUTS}[gpt-1x1x2]",
        "torchtitan #1842, transformers PR #34373: ranks with few tokens are over-weighted",
    ),
    Mutant(
        "gradients-of-the-last-step-stay",
        "megapre/parallel/zero.py",
        "        for room in self.rooms:\n            room.tensor.zero_()\n",
        "",
        f"{LAYOUTS}[gpt-1x1x1]",
        "DeepSpeed PR #7839: zero_grad skipped",
    ),
    Mutant(
        "bucket-reduced-before-the-last-microbatch",
        "megapre/parallel/pipeline/executor.py",
        "            else:\n                self.memory.close(number, last=not self.left[BACKWARD, stage])",
        "            else:\n                self.memory.close(number, last=self.left[BACKWARD, stage] == 1)",
        f"{LAYOUTS}[gpt-1x1x2]",
        "DeepSpeed PR #7985: the last microbatch's gradient was added after the all-reduce",
    ),
    Mutant(
        "padding-of-the-vocabulary-in-the-softmax",
        "megapre/parallel/tensor.py",
        "valid = max(0, min(width, terms.vocab_size - axis.rank * width))",
        "valid = width",
        f"{LAYOUTS}[gpt-2x1x1]",
        "Megatron-LM #1754: vocabulary that TP does not divide",
    ),
    Mutant(
        "bias-added-by-every-tensor-rank",
        "megapre/parallel/tensor.py",
        "return y, None if self.bias is None else sink(self.bias)",
        "return y, None if self.bias is None else sink(self.bias) * self.axis.size",
        f"{LAYOUTS}[gpt-2x1x1]",
        "row-parallel bias before the reduction: bias x TP",
    ),
    Mutant(
        "dropout-by-local-head",
        "megapre/models/attention.py",
        "self.first_head + head",
        "head",
        f"{LAYOUTS}[llama-2x1x1]",
        "the same mask on every tensor rank's heads",
    ),
    Mutant(
        "weights-not-gathered",
        "megapre/parallel/zero.py",
        "        if not self._partition.zero:\n            return\n",
        "        return\n",
        f"{LAYOUTS}[gpt-1x1x2+zero1]",
        "Megatron-LM #663: stale parameters after a sharded step",
    ),
    Mutant(
        "sum-of-input-gradients-not-awaited",
        "megapre/parallel/tensor.py",
        "        summing.wait()\n        return out, None",
        "        return out, None",
        f"{TIMING}[2x2x2+sp+zero1-fifo]",
        "DeepSpeed PR #5606: missing wait; gloo alone forgives it",
    ),
    Mutant(
        "activation-freed-before-it-is-sent",
        "megapre/parallel/pipeline/executor.py",
        "        for work in works:\n            work.wait()\n"
        "        for tensor in tensors:\n            tensor.untyped",
        "        for tensor in tensors:\n            tensor.untyped",
        f"{TIMING}[2x2x2+sp+zero1-delay]",
        "Megatron-LM PR #5222: a buffer reused while it is still being sent",
    ),
    Mutant(
        "ring-gradients-do-not-come-home",
        "megapre/parallel/context.py",
        "gradients = _pass_on(gradients, axis)()  # after the last turn they are at home",
        "gradients = gradients if arriving is None else _pass_on(gradients, axis)()",
        "tests/equivalence/test_layouts.py::test_context_parallel_agrees[gpt-1x1x1+ring:2]",
        "Megatron-LM #1464: dK and dV wrong under context parallelism",
    ),
    Mutant(
        "ring-rows-not-rescaled",
        "megapre/parallel/context.py",
        "rows.mul_(torch.exp(before - seen).unsqueeze(-1)).add_(",
        "rows.add_(",
        "tests/equivalence/test_layouts.py::test_context_parallel_agrees[gpt-1x1x1+ring:2]",
        "missing rescale by the running maximum",
    ),
    Mutant(
        "ulysses-parts-in-the-wrong-order",
        "megapre/parallel/context.py",
        "return received.permute(1, 2, 0, 3, 4).reshape(",
        "return received.permute(1, 2, 3, 0, 4).reshape(",
        "tests/equivalence/test_layouts.py::test_context_parallel_agrees[gpt-1x1x1+ulysses:2]",
        "DeepSpeed PR #5664: the second all-to-all mixed heads",
    ),
    Mutant(
        "document-mask-ignored-by-the-ring",
        "megapre/parallel/context.py",
        "        if self.segments is not None:\n            asking",
        "        if False:\n            asking",
        "tests/equivalence/test_layouts.py::test_context_parallel_agrees[llama-1x1x1+ring:2]",
        "Megatron-LM #415: the fused path knew causal only",
    ),
    Mutant(
        "zero1-layer-does-not-wait-for-its-weights",
        "megapre/parallel/zero.py",
        "self._under_way.pop(index).wait()",
        "self._under_way.pop(index)",
        f"{TIMING}[2x2x2+sp+zero1-fifo]",
        "Megatron-LM #663: forward reads stale parameters under an overlapped gather",
    ),
    Mutant(
        "zero1-checkpoint-does-not-wait-for-the-weights",
        "megapre/optim/adamw.py",
        "        self.buffers.weights.settle()\n",
        "",
        "tests/parallel/test_zero.py::test_checkpoints_and_validation_wait_for_the_gathers",
        "a checkpoint of weights that are still arriving",
    ),
    Mutant(
        "zero3-layer-does-not-wait-for-its-weights",
        "megapre/parallel/zero.py",
        "self._gathering.pop(index).wait()",
        "self._gathering.pop(index)",
        f"{ZERO}[bert-2x1x2+sp+zero3-fifo]",
        "a prefetched bucket read before it has arrived",
    ),
    Mutant(
        "zero3-weights-freed-before-their-last-use",
        "megapre/parallel/zero.py",
        "            if index not in kept:\n                self.rooms[index].free()",
        "            self.rooms[index].free()",
        f"{ZERO}[gpt-1x2x2+zero3-delay]",
        "a bucket released although the next visit of the plan needs it",
    ),
    Mutant(
        "zero2-microbatch-added-twice",
        "megapre/parallel/zero.py",
        "shard.add_(self.rooms[index].tensor[part])",
        "shard.add_(self.rooms[index].tensor[part], alpha=2 if complete else 1)",
        f"{ZERO}[gpt-1x1x2+zero2+offload-fifo]",
        "DeepSpeed PR #6550, in kind: a microbatch does not count once in a sharded sum",
    ),
    Mutant(
        "zero2-buffer-reused-while-it-is-reduced",
        "megapre/parallel/zero.py",
        "if any(index in mine for index, *_ in self._under_way):",
        "if False:",
        f"{ZERO}[gpt-1x1x2+zero2+offload-fifo]",
        "Megatron-LM PR #4609, in kind: the buffer of a tied weight refilled before its reduction had ended",
    ),
    Mutant(
        "zero2-shard-summed-at-the-offset-of-the-bucket",
        "megapre/parallel/zero.py",
        "_partial_sums(self._grid, bucket, shard, first=part.start)",
        "_partial_sums(self._grid, bucket, shard)",
        f"{ZERO}[bert-2x1x2+sp+zero3-fifo]",
        "an index into the bucket taken for one into the shard",
    ),
    Mutant(
        "zero3-tied-gradients-not-exchanged",
        "megapre/parallel/zero.py",
        "self._sums += [self._grid.tied.all_reduce(shard)] if bucket.tied else []",
        "pass",
        f"{ZERO}[gpt-1x2x2+zero3-delay]",
        "embedding gradients of first and last stage differ, sharded",
    ),
    Mutant(
        "bias-gradient-written-outside-of-w",
        "megapre/parallel/tensor.py",
        "parameter.queue.add(lambda: main.add_(gradient))",
        "main.add_(gradient)",
        f"{ZERO}[gpt-1x2x2+zero3+zb-h1-fifo]",
        "a main gradient written where no room is open for it",
    ),
    Mutant(
        "offload-overwrites-the-bucket-at-work",
        "megapre/parallel/offload.py",
        "buffer, event = self._held.pop(0)",
        "buffer, event = self._held.pop()",
        "tests/parallel/test_zero.py::test_stages_and_offload_change_no_bit",
        "the next bucket's gradients staged over those being read",
    ),
    Mutant(
        "optimizer-step-count-lost-on-resume",
        "megapre/training/trainer.py",
        '    step.optimizer.steps.fill_(state["optimizer_steps"])\n',
        "",
        "tests/training/test_resume.py::test_resume_is_bitwise_at_every_step[1x1x1-fp32]",
        "Automodel #763: optimizer state not loaded, no error",
    ),
    Mutant(
        "samples-by-rank-order",
        "megapre/data/loader.py",
        "first = step * self._batch + (m * self._size + self._rank) * self._micro",
        "first = (step * self._size + self._rank) * self._micro + m",
        "tests/training/test_resume.py::test_another_data_size_changes_no_global_batch",
        "the global batch depends on the data-parallel size",
    ),
    Mutant(
        "router-gradient-of-one-shard-of-the-tokens",
        "megapre/parallel/placement.py",
        "if sequence_parallel or self.token_shard",
        "if sequence_parallel",
        f"{EXPERTS}[mixtral-2x1x1+ep:2]",
        "without sequence parallelism tensor ranks divide the tokens: the router's gradient is partial there too",
    ),
    Mutant(
        "router-gradient-counted-twice-under-tensor-parallelism",
        "megapre/parallel/expert.py",
        "return dy.chunk(ctx.axis.size)[ctx.axis.rank].contiguous(), None",
        "return scatter_sum(dy, ctx.axis), None",
        f"{EXPERTS}[mixtral-2x1x1+ep:2]",
        "the gradient that all tensor ranks hold alike is summed over them",
    ),
    Mutant(
        "expert-gradients-over-the-dense-replicas",
        "megapre/parallel/zero.py",
        "axis: Axis = getattr(self.grid, bucket.replicas)",
        "axis: Axis = self.grid.replicas",
        f"{EXPERTS}[mixtral-1x1x2+ep:2]",
        "gradients of different experts are summed over data-parallel ranks",
    ),
    Mutant(
        "norm-counts-experts-on-every-replica",
        "megapre/optim/clip.py",
        "(start, end), origin = buffers.share(bucket), buffers.shard(bucket)[0]",
        "(start, end), origin = (buffers.share if bucket.replicas == 'replicas' else buffers.shard)(bucket), "
        "buffers.shard(bucket)[0]",
        f"{EXPERTS}[mixtral-2x1x1+sp]",
        "grad norm with experts: replicated ones counted once for each replica",
    ),
    Mutant(
        "shared-expert-parts-not-summed",
        "megapre/parallel/expert.py",
        "return scatter_sum(dy, ctx.axis), None",
        "return dy.chunk(ctx.axis.size)[ctx.axis.rank].contiguous(), None",
        f"{EXPERTS}[mixtral-2x1x2+ep:2+etp:2+sp+zero1]",
        "each neighbour that holds a part of an expert gives a part of its input's gradient",
    ),
    Mutant(
        "auxiliary-loss-by-local-sequences",
        "megapre/training/step.py",
        "return sum(m.tokens.shape[1] for m in microbatches) * self.grid.data.size",
        "return sum(m.tokens.shape[1] for m in microbatches)",
        f"{EXPERTS}[mixtral-1x1x2+ep:2]",
        "auxiliary losses scaled by local numbers grow with the data-parallel size",
    ),
    Mutant(
        "auxiliary-loss-of-every-microbatch-in-full",
        "megapre/training/step.py",
        "Auxiliary(self.scaler.value / self._sequences(microbatches))",
        "Auxiliary(self.scaler.value / self.grid.data.size)",
        f"{EXPERTS}[mixtral-1x1x1]",
        "auxiliary losses not divided by the number of microbatches",
    ),
    Mutant(
        "load-of-local-tokens-alone",
        "megapre/models/moe.py",
        "(loads(whole, experts) * shares",
        "(loads(ids, experts) * shares",
        f"{EXPERTS}[mixtral-2x1x1+sp]",
        "the load-balance loss of a part of a sequence is not a part of the sequence's",
    ),
    Mutant(
        "dropped-choices-have-a-gradient",
        "megapre/kernels/moe.py",
        "        y = _with_zero_row(y)\n        dweights",
        "        y = torch.cat((y, y[-1:]))\n        dweights",
        f"{EXPERTS}[switch-1x1x2+ep:2]",
        "the capacity mask is applied forward and forgotten backward",
    ),
    Mutant(
        "combine-weights-permuted",
        "megapre/kernels/moe.py",
        "for choice, weight in zip(rows.T, weights.T):",
        "for choice, weight in zip(rows.T, weights.T.flip(0)):",
        f"{EXPERTS}[mixtral-1x1x1]",
        "results of a token's experts meet each other's weights",
    ),
    Mutant(
        "ties-go-to-the-higher-number",
        "megapre/kernels/moe.py",
        "return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]",
        "ids = torch.sort(scores.flip(-1), dim=-1, descending=True, stable=True).indices[..., :k]\n"
        "    return scores.shape[-1] - 1 - ids",
        "tests/models/test_moe.py::test_equal_scores_go_to_the_lower_number_here_and_in_the_oracle",
        "a router of zeros picks other experts than the definition",
    ),
    Mutant(
        "bias-enters-the-weights",
        "megapre/models/moe.py",
        "weights = scores.gather(-1, ids)",
        "weights = (scores if self.bias is None else scores + self.bias).gather(-1, ids)",
        f"{EXPERTS}[deepseek-1x1x4+ep:2+zero1]",
        "arXiv 2408.15664: the bias moves choices, never the weights of a token's experts",
    ),
    Mutant(
        "biases-lost-on-resume",
        "megapre/training/step.py",
        "        yield from self.routing.pieces(share=share)\n",
        "",
        "tests/training/test_experts.py::test_resume_with_experts_is_bitwise[1x2x2+ep:2-fp32]",
        "a buffer that no checkpoint holds",
    ),
)
"""Those marked in ``QUICK`` run in `make test`, all of them in the nightly lane."""

QUICK = (
    "kv-head-copies-not-summed", "sum-of-input-gradients-not-awaited", "denominator-of-this-rank",
    "zero3-layer-does-not-wait-for-its-weights", "expert-gradients-over-the-dense-replicas",
)  # fmt: skip
