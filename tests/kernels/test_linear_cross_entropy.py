import pytest
import torch

from megapre.kernels import linear_cross_entropy as lce
from tests.kernels.tolerances import TOLERANCE, error, load, versions

OP = "linear_cross_entropy"
# rows, width, vocabulary, valid; the last two divide by 32, as the tiles of AMX need, and have two blocks of rows
SHAPES = [(5, 8, 33, 30), (1, 1, 2, 2), (0, 4, 7, 7), (67, 33, 101, 97), (70, 64, 96, 65), (33, 32, 1088, 1050)]
OPTIONS = [{}, {"smoothing": 0.1, "vocab": 97}, {"z_loss": 1e-2}, {"smoothing": 0.2, "vocab": 97, "z_loss": 1e-3}]


def inputs(rows, width, vocab, valid, dtype):
    g = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, width, generator=g).to(dtype), torch.randn(vocab, width, generator=g).to(dtype)
    targets = torch.randint(0, valid, (rows,), generator=g)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.rand(rows, generator=g).to(wide)
    scale[1::4] = 0  # ignored
    return x, weight, targets, scale, torch.ones(vocab, width, dtype=wide)


def formula(x, weight, targets, valid, smoothing=0.0, vocab=0, z_loss=0.0):
    logits = x @ weight[:valid].t()
    lse = torch.logsumexp(logits, 1)
    loss = lse - (1 - smoothing) * logits.gather(1, targets.unsqueeze(1)).squeeze(1) + z_loss * lse**2
    return loss - smoothing / vocab * logits.sum(1) if smoothing else loss


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("version", versions(OP), ids=lambda v: v.name)
def test_losses_and_gradients(version, shape, dtype, options, monkeypatch):
    function = load(version, dtype)
    if function is None:
        assert version.name == "cpp" and dtype == torch.float64
        return
    valid = shape[3]
    options = {**options, "vocab": valid} if "vocab" in options else options
    x, weight, targets, scale, main = inputs(*shape, dtype)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    wanted = formula(*exact, targets, valid, **options)
    (wanted * scale.double()).sum().backward()
    monkeypatch.setattr(lce, "COLUMNS", 40)
    losses, dx = function(x, weight, targets, scale, valid, main_grad=main, **options)
    assert losses.dtype == scale.dtype and dx.dtype == dtype and dx.shape == x.shape
    # bf16 rounds logits near 10, their gradient, and the products: a few roundings more than the other ops.
    slack = {torch.bfloat16: 6.0, torch.float32: 3.0, torch.float64: 2.0}[dtype]
    assert error(losses, torch.where(scale == 0, 0.0, wanted)) <= slack * TOLERANCE[dtype]
    assert error(dx, exact[0].grad) <= slack * TOLERANCE[dtype]
    assert error(main - 1, exact[1].grad) <= slack * TOLERANCE[dtype] * 2
    assert (dx[scale == 0] == 0).all()
    again, none = function(x, weight, targets, scale, valid, main_grad=None, **options)
    assert torch.equal(again, losses) and none.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_do_not_change_the_losses(dtype):
    x, weight, targets, scale, main = inputs(67, 33, 101, 97, dtype)
    from megapre.kernels import cross_entropy

    parts = (cross_entropy.statistics_cpp, cross_entropy.gradient_cpp_)
    found = []
    for rows in (1, 10, 67, 1000):
        total = torch.zeros_like(main)
        found.append((*lce.chunked(*parts, x, weight, targets, scale, 97, total, lce.alone, {}, rows), total))
    for losses, dx, total in found[1:]:
        assert error(losses, found[0][0]) <= TOLERANCE[dtype] and error(dx, found[0][1]) <= TOLERANCE[dtype]
        assert error(total, found[0][2]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype):
    x, weight, targets, scale, main = inputs(70, 64, 1088, 1050, dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            total = main.clone()
            found.append((*lce.linear_ce_cpp(x, weight, targets, scale, 1050, main_grad=total), total))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("version", versions(OP), ids=lambda v: v.name)
def test_two_vocabulary_ranks(version):
    """The exchange is the caller's; two ranks are two passes, of which the first only finds the statistics."""
    function = load(version, torch.float32)
    x, weight, targets, scale, _ = inputs(9, 16, 60, 50, torch.float32)
    scale.fill_(1.0)
    options = {"smoothing": 0.1, "vocab": 50, "z_loss": 1e-2}
    parts = [(weight[:30], targets, 30), (weight[30:], targets - 30, 20)]
    seen: list[tuple] = []

    def record(*statistics):
        seen.append(statistics)
        return lce.alone(*statistics)

    for w, t, n in parts:
        function(x, w, t, scale, n, main_grad=None, exchange=record)
    top = torch.maximum(seen[0][0], seen[1][0])
    lse = top + sum(e * torch.exp(m - top) for m, e, _, _ in seen).log()
    target, level = (sum(s[i] for s in seen) for i in (2, 3))
    grads, dx = [], []
    for w, t, n in parts:
        main = torch.zeros_like(w)
        losses, part = function(
            x, w, t, scale, n, main_grad=main, exchange=lambda *_: (lse, target, level), **options
        )
        grads.append(main)
        dx.append(part)
    exact = [t.double().requires_grad_() for t in (x, weight)]
    wanted = formula(*exact, targets, 50, **options)
    wanted.sum().backward()
    assert error(losses, wanted) <= 3 * TOLERANCE[torch.float32]
    assert error(sum(dx), exact[0].grad) <= 5 * TOLERANCE[torch.float32]
    assert error(torch.cat(grads), exact[1].grad) <= 5 * TOLERANCE[torch.float32]


def test_the_logits_never_exist_in_whole(monkeypatch):
    function = load(next(v for v in versions(OP) if v.name == "cpp"), torch.float32)
    x, weight, targets, scale, main = inputs(64, 8, 500, 500, torch.float32)
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out is not main and out.data_ptr() != weight.data_ptr():
                largest = max(largest, out.untyped_storage().nbytes() if out._base is None else 0)
            return out

    with Watch():
        lce.chunked(
            lce.cross_entropy.statistics_cpp, lce.cross_entropy.gradient_cpp_, x, weight, targets, scale, 500, main,
            lce.alone, {}, 16,
        )  # fmt: skip
    assert 16 * 500 * 4 <= largest < 64 * 500 * 4
    assert function is lce.linear_ce_cpp


def tiles():
    """The C++ version for bf16 where it multiplies on AMX; others round logits to bf16, |logit| 2^-9."""
    function = load(next(v for v in versions(OP) if v.name == "cpp"), torch.bfloat16)
    if not torch.ops.megapre.has_tiles():
        pytest.skip("no AMX: the kernel that keeps exponentials is not used here")
    return function


LEVELS = ["zero", "low", "high", "low-first-block", "far-targets", "sure"]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("level", LEVELS)
def test_logits_far_from_zero(level, smoothing):
    """Rows, in all blocks of the vocabulary or in one, whose exponentials are beyond what is kept without a base."""
    vocab, valid, rows = 1088, 1050, 40
    x, weight, targets, scale, main = inputs(rows, 64, vocab, valid, torch.bfloat16)
    x[:, 0], x[:, 2], weight[:, 0] = 0, 0, 1
    if level in ("low", "high"):
        x[::2, 0] = 200 if level == "high" else -300
    elif level == "low-first-block":
        weight[512:, 0] = 0
        x[::2, 0] = -300
    elif level == "far-targets":
        weight[:, 2] = 0
        weight[targets, 2] = -1
        x[::2, 2] = 150
    elif level == "sure":  # 1 - p of about 1e-3
        weight[:, 2] = 0
        targets = torch.arange(rows)
        for row in range(rows):
            weight[row] = x[row] * 0.25
    exact = [t.double().requires_grad_() for t in (x, weight)]
    options = {"smoothing": smoothing, "vocab": valid}
    wanted = formula(*exact, targets, valid, **options)
    (wanted * scale.double()).sum().backward()
    losses, dx = tiles()(x, weight, targets, scale, valid, main_grad=main, **options)
    tolerance = TOLERANCE[torch.bfloat16]
    wanted = torch.where(scale == 0, 0.0, wanted)
    assert error(losses, wanted) <= 6 * tolerance, (losses, wanted)
    assert error(main - 1, exact[1].grad) <= 12 * tolerance
    for row in range(rows):  # each by itself: a row is not lost beside another
        assert error(dx[row], exact[0].grad[row]) <= 6 * tolerance, (row, dx[row], exact[0].grad[row])


def test_ignored_rows_may_hold_anything():
    x, weight, targets, scale, main = inputs(40, 64, 1088, 1050, torch.bfloat16)
    found = []
    for anything in (0.0, float("nan"), float("inf")):
        x[1::4], total = anything, main.clone()
        losses, dx = tiles()(x, weight, targets, scale, 1050, main_grad=total)
        found.append((losses, dx, total))
    for other in found[1:]:
        assert all(error(a, b) <= TOLERANCE[torch.bfloat16] for a, b in zip(other, found[0]))
    x[0] = float("nan")
    losses, dx = tiles()(x, weight, targets, scale, 1050, main_grad=main)
    assert losses[0].isnan() and dx[0].isnan().all() and main[:1050].isnan().all() and losses[2].isfinite()


def test_bad_shapes_in_one_sentence():
    x, weight, targets, scale, main = inputs(5, 8, 33, 30, torch.float32)
    for version in versions(OP):
        function = load(version, torch.float32)
        for wrong in (
            (x, weight[:, :7], targets, scale, 30, main), (x, weight, targets[:4], scale, 30, main),
            (x, weight, targets, scale, 34, main), (x, weight, targets, scale, 30, main[1:]),
        ):  # fmt: skip
            with pytest.raises(ValueError, match="linear_cross_entropy: x "):
                function(*wrong[:-1], main_grad=wrong[-1])
        with pytest.raises(ValueError, match="needs the number of real vocabulary entries"):
            function(x, weight, targets, scale, 30, main_grad=main, smoothing=0.1)
