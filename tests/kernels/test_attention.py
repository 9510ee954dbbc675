"""Attention: every version that runs on this CPU against the definition, value and every gradient."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from megapre.config.schema import KernelsConfig
from megapre.kernels import attention, mask, registry
from megapre.kernels.mask import CAUSAL, FULL, Mask
from megapre.random import native
from tests.kernels.attention_cases import (
    MASKS,
    causal,
    check_documents,
    check_same_masks,
    check_two_steps,
    document,
    draw,
    dropout_of,
    formula,
)  # fmt: skip
from tests.kernels.tolerances import TOLERANCE, compare, error

VERSIONS = (attention.attention_cpp, attention.attention_reference, attention.attention_sdpa)
# bf16: the weights and the gradients of the scores are rounded once more before a product (torch's own too).
SLACK = {torch.float64: 1, torch.float32: 1, torch.bfloat16: 2.2}
FLOOR = 0.1
"""A query with one key has no gradient: that of its scores is do . v - do . o."""
# s, t, b, query heads, key heads, d
SHAPES = [(1, 1, 1, 1, 1, 32), (63, 63, 2, 4, 2, 64), (65, 65, 2, 2, 2, 40)]


def able(version, q, k, m, bias=None, dropout=None):
    """Skips nothing silently: a version that cannot do a case must say so."""
    problem = attention.Problem(m, bias, dropout, 1.0)
    return not version.lacks(q, k, problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("version", VERSIONS, ids=lambda v: v.name)
def test_value_and_gradients(version, name, dtype):
    for shape in SHAPES:
        s, t, b = shape[:3]
        asked, (q, k, v) = MASKS[name](s, t, b), draw(*shape, dtype)
        if not able(version, q, k, asked.mask):
            with pytest.raises(ValueError, match=f"{version.name} attention"):
                version(q, k, v, mask=asked.mask)
            continue
        compare(
            lambda q, k, v: version(q, k, v, mask=asked.mask),  # noqa: B023
            lambda q, k, v: formula(q, k, v, asked)[0],  # noqa: B023
            [q, k, v],
            TOLERANCE[dtype] * SLACK[dtype],
            FLOOR,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "window", "packed", "query_stream", "prefix", "nothing"])
@pytest.mark.parametrize("version", VERSIONS[:2], ids=lambda v: v.name)
def test_bias_and_dropout(version, name, dtype):
    shape = (65, 65, 2, 4, 2, 32)
    s, t, b, heads = shape[:4]
    asked, inputs = MASKS[name](s, t, b), draw(*shape, dtype)
    bias, dropout = torch.randn(heads, s + t - 1, generator=torch.Generator().manual_seed(1)), dropout_of(heads, b)

    def ours(q, k, v):
        return version(q, k, v, mask=asked.mask, bias=bias, dropout=dropout)

    compare(
        ours, lambda q, k, v: formula(q, k, v, asked, bias.double(), dropout)[0], inputs,
        TOLERANCE[dtype] * SLACK[dtype],
        FLOOR,
    )
    learned, exact = bias.clone().requires_grad_(), bias.double().requires_grad_()
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    version(*inputs, mask=asked.mask, bias=learned, dropout=dropout).backward(grad)
    formula(*(x.double() for x in inputs), asked, exact, dropout)[0].backward(grad.double())
    assert error(learned.grad, exact.grad) <= TOLERANCE[dtype] * 4  # a sum of both signs over batch and diagonal


@pytest.mark.parametrize("version", VERSIONS, ids=lambda v: v.name)
@pytest.mark.parametrize("shape", [(5, 70, 2, 4, 2, 32), (70, 5, 1, 2, 1, 64), (1, 33, 2, 4, 1, 64)], ids=str)
def test_cross_attention_of_different_lengths(version, shape):
    for name in ("full", "packed"):
        asked, inputs = MASKS[name](*shape[:3]), draw(*shape, torch.float32)
        if able(version, *inputs[:2], asked.mask):
            compare(
                lambda q, k, v: version(q, k, v, mask=asked.mask),  # noqa: B023
                lambda q, k, v: formula(q, k, v, asked)[0],  # noqa: B023
                inputs,
                TOLERANCE[torch.float32],
                FLOOR,
            )


@pytest.mark.parametrize("d", [32, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_sizes(d, dtype):
    asked, inputs = causal(70, 70, 1), draw(70, 70, 1, 2, 1, d, dtype)
    compare(
        lambda q, k, v: attention.attention_cpp(q, k, v, mask=asked.mask),
        lambda q, k, v: formula(q, k, v, asked)[0],
        inputs,
        TOLERANCE[dtype] * SLACK[dtype],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_positions(dtype):
    q, k, v = draw(1003, 1003, 1, 2, 1, 64, dtype)
    mine = Mask(causal=True, documents=(torch.arange(1003).unsqueeze(1) // 400,) * 2)
    for m in (CAUSAL, mine):
        compare(
            lambda q, k, v: attention.attention_cpp(q, k, v, mask=m),  # noqa: B023
            lambda q, k, v: attention.attention_reference(q, k, v, mask=m),  # noqa: B023
            [q, k, v],
            TOLERANCE[dtype] * SLACK[dtype],
            FLOOR,
        )


@pytest.mark.parametrize("version", VERSIONS[:2], ids=lambda v: v.name)
def test_halves_give_log_sum_exp_and_take_any_delta(version):
    """Two parts of the keys, put together by their log-sum-exps, are the whole: value and gradients."""
    s, b, heads, groups, d = 48, 2, 4, 2, 32
    q, k, v = draw(s, s, b, heads, groups, d, torch.float32)
    asked, grad = causal(s, s, b), torch.randn(s, b, heads, d, generator=torch.Generator().manual_seed(4))
    out, lse = formula(q.double(), k.double(), v.double(), asked)
    cuts = (slice(0, 21), slice(21, 48))
    masks = [CAUSAL.part(slice(0, s), cut) for cut in cuts]
    parts = [version.forward(q, k[cut], v[cut], mask=m) for cut, m in zip(cuts, masks)]
    assert all(part[0].dtype == torch.float32 for part in parts)
    together = torch.logsumexp(torch.stack([part[1] for part in parts]).double(), 0)
    assert error(together, lse) < 1e-6
    shares = [torch.exp(part[1] - together).permute(2, 0, 1).unsqueeze(-1) * part[0] for part in parts]
    assert error(shares[0] + shares[1], out) < 1e-6
    assert (parts[1][1][:, :, :21] == -torch.inf).all() and (parts[1][0][:21] == 0).all()
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    formula(*leaves, asked)[0].backward(grad.double())
    delta = attention.delta_of(grad, out.float())
    found = [
        version.backward(grad, q, k[cut], v[cut], lse=lse.float(), delta=delta, mask=m) for cut, m in zip(cuts, masks)
    ]
    assert error(found[0][0] + found[1][0], leaves[0].grad) < 2e-6
    for which in (1, 2):
        assert error(torch.cat([part[which] for part in found]), leaves[which].grad) < 2e-6


# --- relations that must hold bit for bit ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", VERSIONS, ids=lambda v: v.name)
def test_a_document_does_not_depend_on_another(version, dtype):
    check_documents(version, dtype)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda v: v.name)
def test_masks_that_mean_the_same_are_the_same(version):
    check_same_masks(version, torch.float32, "cpu", TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", VERSIONS[:2], ids=lambda v: v.name)
def test_two_steps_of_a_ring_are_one(version, dtype):
    check_two_steps(version, dtype, "cpu", TOLERANCE[dtype] * SLACK[dtype])


@pytest.mark.parametrize("version", VERSIONS, ids=lambda v: v.name)
def test_packed_sequences_are_as_alone(version):
    s, b = 100, 2
    q, k, v = draw(s, s, b, 2, 1, 32, torch.float32)
    lengths = torch.tensor([0, 30, 31, 100])
    numbers = mask.documents_of(lengths, b)
    packed = version(q, k, v, mask=Mask(causal=True, documents=(numbers, numbers)))
    for start, stop in itertools.pairwise(lengths.tolist()):
        alone = version(q[start:stop], k[start:stop], v[start:stop], mask=CAUSAL)
        torch.testing.assert_close(packed[start:stop], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("version", VERSIONS, ids=lambda v: v.name)
def test_decoding_with_a_cache_equals_the_whole(version):
    q, k, v = draw(140, 140, 2, 4, 2, 64, torch.float32)
    whole = version(q, k, v, mask=CAUSAL)
    for start, stop in ((0, 75), (75, 139), (139, 140)):
        piece = version(q[start:stop], k[:stop], v[:stop], mask=Mask(causal=True, q_offset=start))
        torch.testing.assert_close(piece, whole[start:stop], rtol=1e-5, atol=1e-6)


def test_dropout_is_the_same_mask_for_any_part_of_batch_heads_and_positions():
    q, k, v = draw(70, 70, 2, 4, 2, 32, torch.float32)
    d = dropout_of(4, 2)
    whole = attention.attention_cpp(q, k, v, mask=CAUSAL, dropout=d)
    part = attention.AttentionDropout(d.seed, d.step, d.sites[2:], d.samples[1:], d.probability)
    late = Mask(True, q_offset=33)
    one = attention.attention_cpp(q[33:, 1:, 2:], k[:, 1:, 1:], v[:, 1:, 1:], mask=late, dropout=part)
    torch.testing.assert_close(one, whole[33:, 1:, 2:], rtol=1e-6, atol=1e-6)


def test_extreme_scores_stay_finite():
    q, k, v = draw(70, 70, 1, 2, 2, 32, torch.float32)
    for version in VERSIONS:
        x = [(q * 1e4).requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_()]
        out = version(*x, mask=CAUSAL)
        out.sum().backward()
        assert out.isfinite().all() and all(y.grad.isfinite().all() for y in x)


def test_results_do_not_depend_on_the_number_of_threads():
    q, k, v = draw(300, 300, 2, 4, 2, 64, torch.bfloat16)
    bias, found = torch.randn(4, 599), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x = [y.clone().requires_grad_() for y in (q, k, v, bias)]
            out = attention.attention_cpp(*x[:3], mask=CAUSAL, bias=x[3])
            found.append([out, *torch.autograd.grad(out, x, torch.ones_like(out))])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other))


@pytest.mark.parametrize("variant", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(variant):
    """In a process of its own: the set is chosen when the library loads. One that is not here falls back."""
    names = "a_thousand or value_and_gradients and cpp and (document or causal or stream) or bias_and and cpp-prefix"
    command = [sys.executable, "-m", "pytest", __file__, "-k", f"({names}) and not other_instruction", "-x"]
    environment = {**os.environ, "MEGAPRE_CPU": variant}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]


# --- the formula, the biases and the table --------------------------------------------------------------------------


def test_gradcheck_of_the_reference():
    q, k, v = (x.requires_grad_() for x in draw(4, 4, 1, 2, 1, 3, torch.float64))
    bias = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    m = Mask(causal=True, documents=(torch.tensor([[0], [0], [1], [1]]),) * 2)
    d = dropout_of(2, 1)
    reference = attention.attention_reference
    whole = lambda q, k, v, bias: reference(q, k, v, mask=m, bias=bias, dropout=d)  # noqa: E731
    assert torch.autograd.gradcheck(whole, (q, k, v, bias))
    halves = attention.Version("halves", mask.ALL, None, reference.forward_, reference.backward_)
    assert torch.autograd.gradcheck(lambda *x: halves(*x[:3], mask=m, bias=x[3], dropout=d), (q, k, v, bias))


def test_alibi_and_relative_biases():
    slopes = mask.alibi_slopes(12)
    assert torch.allclose(slopes[:8], 2.0 ** -torch.arange(1, 9))
    assert torch.allclose(slopes[8:], 2.0 ** (-torch.arange(1, 9, 2) / 2))
    m = Mask(causal=True, q_offset=3)
    bias = mask.alibi(slopes, m, 4, 7)
    for i in range(4):
        for j in range(7):
            assert bias[2, 3 - i + j] == -slopes[2] * abs(i + 3 - j)
    table = torch.randn(32, 2, requires_grad=True)
    for two_sided in (True, False):
        bias = mask.relative(table, FULL, 300, 300, two_sided=two_sided)
        near = mask.bucket(torch.arange(-200, 201), 32, two_sided, 128)
        assert near.min() >= 0 and near.max() == 31 and torch.equal(bias[:, 299 - 200 : 299 + 201], table[near].t())
        # As in the paper's code: single distances up to a half, the last bucket from 128 on.
        assert near[200] == 0 and near[199] == 1 and near[200 - 128] == (15 if two_sided else 31)
    bias.sum().backward()
    assert table.grad.sum() == 2 * 599


def test_a_version_that_cannot_is_not_picked():
    q, k, v = draw(8, 8, 1, 2, 1, 32, torch.bfloat16)
    chain = attention.Chain((attention.attention_flash, attention.attention_sdpa, attention.attention_reference))

    def picked(m, halves=False, **options):
        problem = attention.Problem(m, options.get("bias"), options.get("dropout"), 1.0)
        return chain.pick(q, k, problem, halves).name

    assert picked(CAUSAL) == picked(FULL) == picked(Mask(True, window=3)) == "flash"
    assert picked(document(8, 8, 1).mask) == picked(Mask(True, prefix=torch.tensor([2]))) == "sdpa"
    assert picked(CAUSAL, dropout=dropout_of(2, 1)) == picked(CAUSAL, bias=torch.zeros(2, 15)) == "reference"
    assert picked(CAUSAL, halves=True) == picked(Mask(True, strict=True)) == "reference"
    assert picked(Mask(True, k_offset=4)) == "reference"
    with pytest.raises(ValueError, match=r"no version can do this attention .sdpa attention has no dropout"):
        attention.attention_sdpa(q, k, v, mask=CAUSAL, dropout=dropout_of(2, 1))
    chosen = registry.choose(KernelsConfig(attention="sdpa"), torch.device("cpu"), torch.bfloat16).attention
    assert [version.name for version in chosen.versions] == ["sdpa", "cpp", "reference"]


def test_refusals():
    q, k, v = draw(4, 4, 1, 3, 2, 32, torch.float32)
    run = attention.attention_reference
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 key heads"):
        run(q, k, v, mask=CAUSAL)
    q = q[:, :, :2]
    with pytest.raises(ValueError, match="1 dropout sites for 2 query heads"):
        run(q, k, v, mask=CAUSAL, dropout=dropout_of(1, 1))
    with pytest.raises(ValueError, match=r"a bias by distance is \[2, 7\], not \[2, 8\]"):
        run(q, k, v, mask=CAUSAL, bias=torch.zeros(2, 8))
    with pytest.raises(ValueError, match=r"give \[4, 1\] for the queries and \[4, 1\] for the keys"):
        run(q, k, v, mask=Mask(documents=(torch.zeros(4, 1), torch.zeros(3, 1))))
    with pytest.raises(ValueError, match="a prefix needs a causal mask"):
        run(q, k, v, mask=Mask(prefix=torch.tensor([1])))
    with pytest.raises(ValueError, match="the scale must be positive"):
        run(q, k, v, mask=CAUSAL, scale=0.0)


@pytest.mark.skipif(bool(native.load()), reason=native.load() or "-")
def test_opcheck():
    q, k, v = draw(5, 5, 1, 2, 1, 32, torch.float32)
    problem = attention.Problem(CAUSAL, torch.randn(2, 9), dropout_of(2, 1), 0.2)
    rest = attention.arguments(q, k, problem)
    kinds = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.megapre.attention_forward, (q, k, v, *rest), test_utils=kinds)
    out, lse = torch.ops.megapre.attention_forward(q, k, v, *rest)
    torch.library.opcheck(
        torch.ops.megapre.attention_backward, (out, q, k, v, lse, torch.zeros_like(lse), *rest), test_utils=kinds
    )


def test_memory_is_linear():
    """No tensor of a call grows with the square of the length."""
    q = torch.randn(4096, 1, 1, 32, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        attention.attention_cpp(q, q, q, mask=CAUSAL).sum().backward()
    largest = max(abs(event.cpu_memory_usage) for event in profile.events())
    assert largest < 64 * 4096 * 32 * 4  # the matrix of scores would be 128 times one of q, k, v
