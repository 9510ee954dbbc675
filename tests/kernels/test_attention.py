import math

import pytest
import torch

from megapre.kernels import attention
from megapre.random import philox
from tests.kernels.tolerances import TOLERANCE, compare, load, versions

# s, t, b, hq, hkv, d
SHAPES = [(7, 7, 2, 4, 2, 8), (1, 1, 1, 1, 1, 4), (33, 33, 1, 6, 1, 16), (17, 17, 3, 2, 2, 5)]


def formula(q, k, v, causal, segments=None, kept=None, probability=0.0, offset=0):
    """One (sample, head) at a time."""
    out = torch.zeros_like(q)
    for b in range(q.shape[1]):
        for h in range(q.shape[2]):
            g = h // (q.shape[2] // k.shape[2])
            scores = q[:, b, h] @ k[:, b, g].T / math.sqrt(q.shape[3])
            for i in range(q.shape[0]):
                ok = torch.arange(k.shape[0]) <= i + offset if causal else torch.ones(k.shape[0], dtype=torch.bool)
                if segments is not None:
                    ok = ok & (segments[:, b] == segments[i, b])
                e = torch.exp(scores[i] - scores[i][ok].max()) * ok
                w = e / e.sum()
                if kept is not None:
                    w = w * kept[h, i, b] / (1 - probability)
                out[i, b, h] = w @ v[:, b, g]
    return out


def inputs(shape, dtype):
    s, t, b, hq, hkv, d = shape
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(n, b, h, d, generator=generator).to(dtype) for n, h in ((s, hq), (t, hkv), (t, hkv))]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("version", versions("attention"), ids=lambda v: v.name)
def test_value_and_gradients(version, packed, causal, dtype):
    function = load(version, dtype)
    tolerance = TOLERANCE[dtype] * (2 if version.name == "sdpa" and dtype == torch.bfloat16 else 1)
    for shape in SHAPES:
        generator = torch.Generator().manual_seed(3)
        starts = torch.rand(shape[0], shape[2], generator=generator) < 0.3
        segments = starts.long().cumsum(0) if packed else None
        compare(
            lambda q, k, v: function(q, k, v, causal=causal, segments=segments),  # noqa: B023
            lambda q, k, v: formula(q, k, v, causal, segments),  # noqa: B023
            inputs(shape, dtype),
            tolerance,
        )


@pytest.mark.parametrize("version", versions("attention"), ids=lambda v: v.name)
def test_dropout_is_the_counter_based_mask_in_every_version(version):
    q, k, v = inputs((9, 9, 2, 4, 2, 8), torch.float32)
    dropout = attention.AttentionDropout(5, 3, [40, 41, 42, 43], torch.arange(9), torch.tensor([8, 9]), 0.4)
    kept = philox.keep_mask(5, 3, [40, 41, 42, 43], torch.arange(9), torch.tensor([8, 9]), 0, 9, 0.4)
    function = load(version, torch.float32)
    compare(
        lambda q, k, v: function(q, k, v, causal=True, dropout=dropout),
        lambda q, k, v: formula(q, k, v, True, kept=kept, probability=0.4),
        [q, k, v],
        TOLERANCE[torch.float32],
    )
    part = attention.AttentionDropout(5, 3, [42, 43], torch.arange(9), torch.tensor([9]), 0.4)
    one = function(q[:, 1:, 2:], k[:, 1:, 1:], v[:, 1:, 1:], causal=True, dropout=part)
    whole = function(q, k, v, causal=True, dropout=dropout)
    torch.testing.assert_close(one, whole[:, 1:, 2:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("version", versions("attention"), ids=lambda v: v.name)
def test_decoding_with_a_cache_equals_the_whole(version):
    q, k, v = inputs((12, 12, 2, 4, 2, 8), torch.float32)
    function = load(version, torch.float32)
    whole = function(q, k, v, causal=True)
    for start, stop in ((0, 5), (5, 11), (11, 12)):
        piece = function(q[start:stop], k[:stop], v[:stop], causal=True, offset=start)
        torch.testing.assert_close(piece, whole[start:stop], rtol=1e-5, atol=1e-6)


def test_extreme_scores_stay_finite():
    q, k, v = inputs((5, 5, 1, 2, 2, 4), torch.float32)
    for version in versions("attention"):
        assert load(version, torch.float32)(q * 1e4, k, v, causal=True).isfinite().all()


def test_reasons_and_refusals():
    q, k, v = inputs((4, 4, 1, 3, 2, 4), torch.float32)
    with pytest.raises(ValueError, match="3 query heads are no multiple of 2 key heads"):
        attention.attention_reference(q, k, v, causal=True)
    dropout = attention.AttentionDropout(1, 1, [0], torch.arange(4), torch.arange(1), 0.1)
    none = dict(segments=None, dropout=None, offset=0)
    assert attention.sdpa_supports(q[:, :, :2], k, **none) == ""
    assert "layout" in attention.sdpa_supports(q[:, :, :2], k, **{**none, "dropout": dropout})
    with pytest.raises(ValueError, match="1 dropout sites for 2 query heads"):
        attention.attention_sdpa(q[:, :, :2], k, v, causal=True, dropout=dropout)
    with pytest.raises(ValueError, match="segments need as many keys"):
        attention.attention_sdpa(q[:2, :, :2], k, v, causal=True, segments=torch.zeros(2, 1, dtype=torch.int64))


def test_gradcheck_of_the_reference():
    q, k, v = (x.requires_grad_() for x in inputs((4, 4, 1, 2, 1, 3), torch.float64))
    segments = torch.tensor([[0], [0], [1], [1]])
    dropout = attention.AttentionDropout(1, 1, [0, 1], torch.arange(4), torch.arange(1), 0.3)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention.attention_reference(q, k, v, causal=True, segments=segments, dropout=dropout),
        (q, k, v),
    )
