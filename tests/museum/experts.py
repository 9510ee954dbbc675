"""Seeded bugs of the mixture of experts."""

from __future__ import annotations

from tests.museum.mutant import Mutant

EXPERTS = "tests/equivalence/test_experts.py::test_experts_agree_with_the_oracle"

EXPERT_MUTANTS = (
    Mutant(
        "kind-of-a-block-by-its-place-in-the-stage",
        "megapre/models/build.py",
        "make = self.moe if config.has_experts(number) else self.mlp",
        "make = self.moe if config.has_experts((number - 1) % (config.layers // 2) + 1) else self.mlp",
        f"{EXPERTS}[deepseek-2x2x1+ep:2+sp+interleaved:2]",
        "which blocks have experts is counted from the beginning of a stage of layers // 2 blocks",
    ),
    Mutant(
        "router-gradient-of-one-shard-of-the-tokens",
        "megapre/parallel/placement.py",
        "if sequence_parallel or self.spread",
        "if sequence_parallel",
        f"{EXPERTS}[mixtral-2x1x1+ep:2]",
        "without sequence parallelism tensor ranks divide the tokens: the router's gradient is partial there too",
    ),
    Mutant(
        "router-gradient-counted-twice-under-tensor-parallelism",
        "megapre/parallel/expert.py",
        "return _over(x, axis, gather, _own)",
        "return _over(x, axis, gather, scatter_sum)",
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
        "return _over(x, axis, gather, scatter_sum)",
        "return _over(x, axis, gather, _own)",
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
        "    y = _with_zero_row(y)\n    dweights",
        "    y = torch.cat((y, y[-1:]))\n    dweights",
        f"{EXPERTS}[switch-1x1x2+ep:2]",
        "the capacity mask is applied forward and forgotten backward",
    ),
    Mutant(
        "combine-weights-permuted",
        "megapre/kernels/moe.py",
        "else weights[:, j : j + 1] * y[choice]",
        "else weights.flip(1)[:, j : j + 1] * y[choice]",
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
