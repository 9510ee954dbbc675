"""Seeded bugs of Transformer-XL's positions and of XLNet in and out."""

from __future__ import annotations

from tests.museum.mutant import Mutant

KERNEL = "tests/kernels/test_relative_attention.py::test_value_and_every_gradient"
STREAMS = "tests/equivalence/test_two_stream.py::test_layout_agrees_with_the_oracle"
HUB = "tests/hub/test_families.py::test_logits_and_gradients_are_theirs"

RELATIVE_MUTANTS = (
    Mutant(
        "distances-shifted-one-too-far",
        "megapre/kernels/relative_attention.py",
        "along[..., s - 1 : s - 1 + s * wide]",
        "along[..., s : s + s * wide]",
        f"{KERNEL}[rows:7-torch-full]",
        "the rows by distance are read one entry too late: every key is taken for its neighbour",
    ),
    Mutant(
        "block-of-rows-with-the-first-blocks-distances",
        "megapre/kernels/relative_attention.py",
        "near = slice(s - rows.stop, s - rows.start + t - 1)",
        "near = slice(s - rows.stop + rows.start, s + t - 1)",
        f"{KERNEL}[rows:7-torch-full]",
        "later queries take the distances of the first ones",
    ),
    Mutant(
        "gradient-of-shared-distances-overwritten",
        "megapre/kernels/relative_attention.py",
        "dkeys[near] += ",
        "dkeys[near] = ",
        f"{KERNEL}[rows:7-torch-full]",
        "blocks of queries share distances: the last one's gradient is all that is left",
    ),
    Mutant(
        "same-segment-taken-for-another",
        "megapre/kernels/relative_attention.py",
        "segments[0][rows].t().unsqueeze(2) != segments[1].t().unsqueeze(1)",
        "segments[0][rows].t().unsqueeze(2) == segments[1].t().unsqueeze(1)",
        (f"{KERNEL}[rows:128-torch-full]", f"{HUB}[xlnet-1x1x1]"),
        "the two segment vectors change places",
    ),
    Mutant(
        "distance-off-by-one",
        "megapre/models/transformer_xl.py",
        "torch.arange(far, -far - 1, -1,",
        "torch.arange(far + 1, -far, -1,",
        (f"{STREAMS}[xlnet-2x1x1+sp]", f"{HUB}[xlnet-1x1x1]"),
        "a token is one place away from itself: the range of Transformer-XL's code without its shift",
    ),
    Mutant(
        "distance-of-the-wrong-sign",
        "megapre/models/transformer_xl.py",
        "torch.arange(far, -far - 1, -1,",
        "torch.arange(-far, far + 1,",
        (f"{STREAMS}[xlnet-2x1x1+sp]", f"{HUB}[xlnet-1x1x1]"),
        "key - query in place of query - key: what lies behind is taken for what lies ahead",
    ),
    Mutant(
        "distances-not-clamped",
        "megapre/models/transformer_xl.py",
        "    if model.relative_clamp:\n",
        "    if model.relative_clamp < 0:\n",
        (f"{STREAMS}[clamped-4x1x1+sp]", f"{HUB}[xlnet-bare-1x1x1]"),
        "clamp_len is read and ignored",
    ),
    Mutant(
        "positions-bias-dropped",
        "megapre/models/transformer_xl.py",
        "asking, other, types = q + sink(self.position), None, None",
        "asking, other, types = q, None, None",
        f"{STREAMS}[xlnet-2x1x1+sp]",
        "queries meet distances without r_r_bias",
    ),
    Mutant(
        "one-bias-for-content-and-position",
        "megapre/models/transformer_xl.py",
        "asking, other, types = q + sink(self.position), None, None",
        "q, asking, other, types = q + sink(self.position), q + sink(self.position), None, None",
        f"{STREAMS}[xlnet-2x1x1+sp]",
        "the position's bias is added to the query that meets contents and segments too",
    ),
    Mutant(
        "biases-of-heads-not-split",
        "megapre/models/spec.py",
        'TensorSpec(f"{name}.{part}", heads, Shard(0), owner) for part in parts',
        'TensorSpec(f"{name}.{part}", heads, Shard(1), owner) for part in parts',
        f"{STREAMS}[xlnet-2x1x1+sp]",
        "tensor ranks hold all heads' biases, cut by features",
    ),
    Mutant(
        "import-swaps-the-biases-of-relative-attention",
        "megapre/hub/xlnet.py",
        'BIASES = (("content", "w"), ("position", "r"), ("segment", "s"))',
        'BIASES = (("content", "r"), ("position", "w"), ("segment", "s"))',
        f"{HUB}[xlnet-1x1x1]",
        "r_w_bias is of the word, r_r_bias of the distance",
    ),
    Mutant(
        "import-turns-the-output-of-relative-attention",
        "megapre/hub/xlnet.py",
        'found.append(Link(f"{ours}.output.weight", f"{theirs}.o", heads=m.heads))',
        'found.append(Link(f"{ours}.output.weight", f"{theirs}.o", transposed=True, heads=m.heads))',
        f"{HUB}[xlnet-1x1x1]",
        "o has the model's width first like q, k and v, but multiplies from the other side; square, so no shape tells",
    ),
    Mutant(
        "import-cuts-heads-at-their-first-feature",
        "megapre/hub/load.py",
        "return found[:, column - first * width :][:, :columns]",
        "return found[:, :columns]",
        "tests/hub/test_families.py::test_a_box_may_begin_inside_a_head",
        "a rank whose box begins inside a head reads the head from its start",
    ),
)
