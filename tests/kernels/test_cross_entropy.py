import pytest
import torch

from tests.kernels.tolerances import TOLERANCE, error, load, versions

# rows, columns, valid
SHAPES = [(5, 64, 64), (1, 1, 1), (3, 17, 13), (0, 33, 33), (7, 1003, 1000), (2, 40, 0), (130, 65, 64)]
NAMES = [version.name for version in versions("ce_statistics")]


def pair(name, dtype):
    found = [v for op in ("ce_statistics", "ce_gradient_") for v in versions(op) if v.name == name]
    return tuple(load(version, dtype) for version in found)


def inputs(shape, dtype):
    rows, columns, valid = shape
    g = torch.Generator().manual_seed(rows)
    logits = (torch.randn(rows, columns, generator=g) * 4).to(dtype)
    logits[:, valid:] = float("nan")  # a pad column must not be read
    # A third of the targets belong to other ranks: below 0 or from `valid` on.
    targets = torch.randint(-(valid // 4) - 1, valid + valid // 4 + 1, (rows,), generator=g)
    return logits, targets


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_statistics_and_gradient(name, shape, dtype):
    statistics, gradient_ = pair(name, dtype)
    if statistics is None:
        assert name == "cpp" and dtype == torch.float64
        return
    (rows, _, valid), (logits, targets) = shape, inputs(shape, dtype)
    exact = logits[:, :valid].double()
    ours = (targets >= 0) & (targets < valid)
    maximum, total, picked, level = statistics(logits, targets, valid)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert maximum.dtype == total.dtype == picked.dtype == kept
    if valid:
        assert torch.equal(maximum.double(), exact.amax(1))
        # The inputs are exact in fp32, so bf16 logits get fp32 statistics.
        assert error(total, torch.exp(exact - exact.amax(1, keepdim=True)).sum(1)) < TOLERANCE[kept]
        chosen = exact.gather(1, targets.clamp(0, valid - 1).unsqueeze(1)).squeeze(1)
        assert torch.equal(picked.double(), torch.where(ours, chosen, 0.0))
        assert ((level - exact.sum(1)).abs() <= TOLERANCE[kept] * exact.abs().sum(1)).all()
    else:
        assert (maximum == -torch.inf).all() and (total == 0).all() and (picked == 0).all()
    lse, scale = (torch.logsumexp(exact, 1) + 1.5).to(kept), torch.linspace(0, 2, rows).to(kept)
    if not valid:
        lse.zero_()
    onehot = torch.zeros(rows, valid, dtype=torch.float64)
    onehot[ours, targets[ours]] = 1
    expected = (torch.exp(exact - lse.double().unsqueeze(1)) - onehot) * scale.double().unsqueeze(1)
    result = gradient_(logits, targets, lse, scale, valid)
    assert result is logits and (result[:, valid:] == 0).all()
    # fp32 lse near 10 is itself rounded, but the formula gets the same lse.
    assert error(result[:, :valid], expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_composition_is_torch_cross_entropy_over_two_ranks(name, dtype):
    statistics, gradient_ = pair(name, dtype)
    rows, valid = 9, 101
    whole = (torch.randn(rows, valid, generator=torch.Generator().manual_seed(4)) * 3).to(dtype)
    targets = torch.randint(0, valid, (rows,), generator=torch.Generator().manual_seed(5))
    weights = torch.rand(rows)
    local = []
    for first, n, columns in ((0, 60, 60), (60, 41, 60)):
        logits = torch.full((rows, columns), 7.0, dtype=dtype)
        logits[:, :n] = whole[:, first : first + n]
        local.append((logits, targets - first, n, statistics(logits, targets - first, n)))
    top = torch.maximum(local[0][3][0], local[1][3][0])
    total = sum(s * torch.exp(m - top) for _, _, _, (m, s, _, _) in local)
    lse = top + total.log()
    loss = lse - sum(picked for _, _, _, (_, _, picked, _) in local)
    exact = whole.double().requires_grad_()
    exact_loss = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (exact_loss * weights).sum().backward()
    assert error(loss, exact_loss.detach()) < TOLERANCE[torch.float32]
    grads = [gradient_(logits, t, lse, weights, n)[:, :n] for logits, t, n, _ in local]
    assert error(torch.cat(grads, 1), exact.grad) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits(name, dtype):
    statistics, gradient_ = pair(name, dtype)
    inf = float("inf")
    logits = torch.zeros(6, 40, dtype=dtype)
    logits[0, 3], logits[0, 4] = 1e4, -1e4
    logits[1, 20:] = -inf
    logits[2] = -inf
    logits[3, 5] = float("nan")
    logits[4, 5] = inf
    logits[5] = -1e4
    maximum, total, _, _ = statistics(logits, torch.zeros(6, dtype=torch.int64), 40)
    assert total[0] == 1 and total[1] == 20 and total[5] == 40
    assert maximum[2] == -inf and total[2] == 0
    assert total[3].isnan() and total[4].isnan()
    before = logits.clone()
    lse = maximum + total.log()
    gradient_(logits, torch.tensor([3, 25, -1, 0, 0, 0]), lse, torch.ones(6), 40)
    assert (logits[0] == 0).all()  # the target has probability 1
    assert logits[1, 25] == -1 and (logits[1, 26:] == 0).all()
    assert error(logits[1, 0], torch.tensor(1 / 20)) < TOLERANCE[dtype]
    assert logits[3, 5].isnan() and before[3, 4] == 0
    assert error(logits[5, 1], torch.tensor(1 / 40)) < 1e-3 + TOLERANCE[dtype]  # an fp32 lse of -1e4 is known to 5e-4


@pytest.mark.parametrize("name", NAMES)
def test_rows_at_a_distance_and_columns_in_pieces(name):
    statistics, gradient_ = pair(name, torch.float32)
    logits, targets = torch.randn(6, 50), torch.tensor([0, 3, 49, -1, 50, 7])
    plain = statistics(logits, targets, 47)
    wide = torch.cat([logits, torch.full((6, 9), 3.0)], 1)
    for other in (wide[:, :50], logits.t().contiguous().t()):
        assert not other.is_contiguous()
        for a, b in zip(plain, statistics(other, targets, 47)):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-5)
        gradient_(other, targets, torch.full((6,), 5.0), torch.ones(6), 47)
    expected = gradient_(logits, targets, torch.full((6,), 5.0), torch.ones(6), 47)
    torch.testing.assert_close(wide[:, :50], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(other, expected, rtol=1e-6, atol=1e-9)
    assert (wide[:, 50:] == 3).all()


def test_the_reference_widens_a_piece_at_a_time(monkeypatch):
    from megapre.kernels import cross_entropy

    logits, targets = torch.randn(64, 100), torch.randint(0, 100, (64,))
    whole = cross_entropy.statistics_reference(logits, targets, 100)
    monkeypatch.setattr(cross_entropy, "CHUNK", 700)
    assert all(torch.equal(a, b) for a, b in zip(whole, cross_entropy.statistics_reference(logits, targets, 100)))


OPTIONS = [{"smoothing": 0.1}, {"z_loss": 1e-2}, {"smoothing": 0.3, "z_loss": 1e-3}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_smoothing_and_z_loss(name, shape, dtype, options):
    from megapre.kernels import cross_entropy

    statistics, gradient_ = pair(name, dtype)
    (rows, _, valid), (logits, _) = shape, inputs(shape, dtype)
    if statistics is None or valid < 2:  # of one column, everything but the z-loss cancels
        return
    options = {**options, "vocab": valid} if "smoothing" in options else options
    targets = torch.randint(0, valid, (rows,), generator=torch.Generator().manual_seed(8))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.linspace(0.5, 2, rows).to(kept)
    exact = logits[:, :valid].double().requires_grad_()
    lse = torch.logsumexp(exact, 1)
    s, z = options.get("smoothing", 0.0), options.get("z_loss", 0.0)
    loss = torch.nn.functional.cross_entropy(exact, targets, reduction="none", label_smoothing=s) + z * lse**2
    (loss * scale.double()).sum().backward()
    maximum, total, picked, level = statistics(logits, targets, valid)
    ours = maximum + total.log()
    assert error(cross_entropy.losses(ours, picked, level, **options), loss) <= 2 * TOLERANCE[kept]
    result = gradient_(logits, targets, ours, scale, valid, **options)
    assert error(result[:, :valid], exact.grad) <= 2 * TOLERANCE[dtype]
    assert (result[:, valid:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_ignored_rows_are_exact_zeros_whatever_they_hold(name, tokens, dtype):
    statistics, gradient_ = pair(name, dtype)
    logits = torch.randn(5, 77, generator=torch.Generator().manual_seed(9)).to(dtype)
    logits[0, 3], logits[1], logits[2, 5] = float("inf"), -float("inf"), float("nan")
    targets = torch.tensor([0, -100, 5, 76, 2])
    scale = torch.zeros(5)
    scale[4] = tokens
    maximum, total, _, _ = statistics(logits, targets, 70)
    gradient_(logits, targets, maximum + total.log(), scale, 70, smoothing=0.1, vocab=70, z_loss=1e-3)
    assert (logits[:4] == 0).all() and logits[4].isfinite().all() and bool(logits[4].any()) == bool(tokens)


@pytest.mark.parametrize("name", NAMES)
def test_maxima_that_come_late_in_a_long_row(name):
    statistics, _ = pair(name, torch.float32)
    x = torch.randn(4, 10_007, generator=torch.Generator().manual_seed(10))
    x[0] = torch.linspace(-100, 100, 10_007)
    x[1] = torch.linspace(100, -100, 10_007)
    x[2, :5000] = -float("inf")
    x[3, -1] = 80.0
    maximum, total, _, _ = statistics(x, torch.zeros(4, dtype=torch.int64), 10_007)
    assert error(maximum + total.log(), torch.logsumexp(x.double(), 1)) < TOLERANCE[torch.float32]


def test_bad_smoothing_in_one_sentence():
    for name in NAMES:
        _, gradient_ = pair(name, torch.float32)
        arguments = (torch.randn(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.ones(2), 3)
        for options, words in (({"smoothing": 0.1}, "needs the number of real"), ({"smoothing": 1.0}, r"in \[0, 1\)")):
            with pytest.raises(ValueError, match=words):
                gradient_(*arguments, **options)
