"""Wrong type, shape, device or stride: the table picks a version that can, or one sentence names op and reason."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megapre.config.schema import KernelsConfig
from megapre.kernels import registry
from megapre.kernels.mask import Mask
from megapre.kernels.rules import RULES
from megapre.random import native

CPU = torch.device("cpu")
ROWS, BATCH, WIDTH = 5, 2, 16
Call = tuple[list[Any], dict[str, Any]]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def mask() -> dict[str, Any]:
    return dict(seed=1, step=2, site=3, positions=torch.arange(ROWS), samples=torch.arange(BATCH), probability=0.25)


def tables(wide: torch.dtype) -> list[Tensor]:
    return [draw(ROWS, BATCH, WIDTH // 2, dtype=wide), draw(ROWS, BATCH, WIDTH // 2, dtype=wide)]


def logits(t: torch.dtype, wide: torch.dtype) -> list[Any]:
    lse, scale = draw(ROWS, dtype=wide) + 9, torch.ones(ROWS, dtype=wide)
    return [draw(ROWS, WIDTH, dtype=t), torch.arange(ROWS), lse, scale, 13]


def routes() -> list[Tensor]:
    """Of two choices a token, one of which is dropped."""
    rows = torch.tensor([[0, 1], [2, 9], [3, 4], [8, 7], [5, 6]])
    return [torch.tensor([0, 0, 1, 2, 2, 4, 4, 3, 3]), rows]


CALLS: dict[str, Callable[[torch.dtype, torch.dtype], Call]] = {
    "rms_norm": lambda t, w: ([draw(ROWS, WIDTH, dtype=t), draw(WIDTH, dtype=t), 1e-5], {}),
    "layer_norm": lambda t, w: ([draw(ROWS, WIDTH, dtype=t), draw(WIDTH, dtype=t), draw(WIDTH, dtype=t), 1e-5], {}),
    "add_rms_norm": lambda t, w: ([*(draw(ROWS, WIDTH, dtype=t) for _ in "xr"), draw(WIDTH, dtype=t), 1e-5], {}),
    "add_layer_norm": lambda t, w: (
        [*(draw(ROWS, WIDTH, dtype=t) for _ in "xr"), *(draw(WIDTH, dtype=t) for _ in "wb"), 1e-5], {}
    ),
    "gelu": lambda t, w: ([draw(ROWS, WIDTH, dtype=t)], {}),
    "gelu_exact": lambda t, w: ([draw(ROWS, WIDTH, dtype=t)], {}),
    "relu": lambda t, w: ([draw(ROWS, WIDTH, dtype=t)], {}),
    "swiglu": lambda t, w: ([draw(ROWS, WIDTH, dtype=t)], {}),
    "geglu": lambda t, w: ([draw(ROWS, WIDTH, dtype=t)], {}),
    "bias_gelu": lambda t, w: ([draw(ROWS, WIDTH, dtype=t), draw(WIDTH, dtype=t)], {}),
    "rope": lambda t, w: ([draw(ROWS, BATCH, 3, WIDTH, dtype=t), *tables(w)], {}),
    "rope_qk": lambda t, w: ([*(draw(ROWS, BATCH, n, WIDTH, dtype=t) for n in (4, 2)), *tables(w)], {}),
    "relative_attention": lambda t, w: (
        [*(draw(n, BATCH, h, WIDTH, dtype=t) for n, h in ((ROWS, 4), (7, 2), (7, 2), (ROWS, 4))),
         draw(ROWS + 6, 4, WIDTH, dtype=t), draw(ROWS, BATCH, 4, dtype=t),
         (torch.arange(ROWS * BATCH).view(ROWS, BATCH) % 2, torch.arange(7 * BATCH).view(7, BATCH) % 2)],
        dict(mask=Mask()),
    ),
    "ce_statistics": lambda t, w: ([*logits(t, w)[:2], 13], {}),
    "ce_gradient_": lambda t, w: (logits(t, w), {"smoothing": 0.1, "vocab": 13}),
    "linear_cross_entropy": lambda t, w: (
        [draw(ROWS, 8, dtype=t), draw(WIDTH, 8, dtype=t), torch.arange(ROWS), torch.ones(ROWS, dtype=w), 13],
        {"main_grad": torch.zeros(WIDTH, 8, dtype=w)},
    ),
    "dropout": lambda t, w: ([draw(ROWS, BATCH, WIDTH, dtype=t)], mask()),
    "bias_dropout_residual": lambda t, w: (
        [draw(ROWS, BATCH, WIDTH, dtype=t), draw(WIDTH, dtype=t), draw(ROWS, BATCH, WIDTH, dtype=t)], mask()
    ),
    "weight_gradient_": lambda t, w: (
        [torch.zeros(6, WIDTH, dtype=w), draw(ROWS, 6, dtype=t), draw(ROWS, WIDTH, dtype=t)], {}
    ),
    "adamw_": lambda t, w: (
        [*(draw(WIDTH, dtype=w).abs() for _ in range(4)), draw(WIDTH, dtype=t)],
        dict(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=torch.tensor(1.0)),
    ),
    "square_sum": lambda t, w: ([draw(WIDTH, dtype=t)], {}),
    "top_k": lambda t, w: ([draw(ROWS, WIDTH, dtype=t), 3], {}),
    "permute": lambda t, w: ([draw(ROWS, WIDTH, dtype=t), *routes()], {}),
    "unpermute": lambda t, w: ([draw(9, WIDTH, dtype=t), draw(ROWS, 2, dtype=w), *routes()], {}),
    "grouped_mm": lambda t, w: ([draw(ROWS, WIDTH, dtype=t), draw(3, 7, WIDTH, dtype=t), [2, 0, 3]], {}),
    "grouped_dw_": lambda t, w: (
        [torch.zeros(3, 7, WIDTH, dtype=w), draw(ROWS, 7, dtype=t), draw(ROWS, WIDTH, dtype=t), [2, 0, 3]], {}
    ),
}  # fmt: skip


def ops(dtype: torch.dtype = torch.float32) -> registry.Kernels:
    return registry.choose(KernelsConfig(), CPU, dtype)


def results(function: Callable[..., Any], call: Call) -> list[Tensor]:
    """What a call returns and what it leaves in its arguments."""
    args, kwargs = call
    found = function(*args, **kwargs)
    found = found if isinstance(found, tuple) else (found,)
    return [x.double() for x in (*found, *args, *kwargs.values()) if isinstance(x, Tensor)]


def changed(call: Call, place: int | str, change: Callable[[Tensor], Tensor]) -> Call:
    args, kwargs = list(call[0]), dict(call[1])
    into: Any = args if isinstance(place, int) else kwargs
    into[place] = change(into[place])
    return args, kwargs


def places(call: Call) -> list[int | str]:
    """Where a call's tensors with dimensions are."""
    found = [*enumerate(call[0]), *call[1].items()]
    return [place for place, x in found if isinstance(x, Tensor) and x.dim()]


def test_every_rule_is_tested():
    assert set(RULES) <= set(CALLS)


@pytest.mark.parametrize("op", CALLS)
def test_types(op):
    """Whatever was chosen for bf16, other types go to a version that can; integers are refused."""
    chosen = getattr(ops(torch.bfloat16), op)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 5e-3), (torch.float64, 1e-12)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        reference = registry._load(next(v for v in registry.TABLE if v.op == op and v.name == "reference"))
        ours = results(chosen, CALLS[op](dtype, wide))
        for a, b in zip(ours, results(reference, CALLS[op](dtype, wide))):
            assert float((a - b).norm()) <= tolerance * float(b.norm().clamp_min(1e-12)), dtype
    wrong = changed(CALLS[op](torch.float32, torch.float32), 0, lambda x: x.long())
    with pytest.raises(ValueError, match=rf"^{op} cannot do this call: .*int64.*\(versions tried: .*reference"):
        chosen(*wrong[0], **wrong[1])


@pytest.mark.parametrize("op", [op for op in CALLS if op != "permute"])  # any number of rows and choices will do
def test_shapes(op):
    """One element too many in any tensor but the first, or a dimension too many."""
    call = CALLS[op](torch.float32, torch.float32)
    for place in places(call)[1:]:
        for change in (lambda x: torch.cat((x, x[..., :1]), -1), lambda x: x.unsqueeze(0)):
            wrong = changed(call, place, change)
            with pytest.raises(ValueError, match=rf"^{op} cannot do this call: .*\[.*\(versions tried: (cpp|torch), "):
                getattr(ops(), op)(*wrong[0], **wrong[1])


@pytest.mark.parametrize("op", [op for op in CALLS if op not in ("gelu", "gelu_exact", "relu", "square_sum", "top_k")])
def test_first_shape(op):
    any_width = ("ce_statistics", "ce_gradient_", "dropout", "permute", "unpermute")
    wider = op not in any_width
    change = (lambda x: torch.cat((x, x[..., :1]), -1)) if wider else (lambda x: x.unsqueeze(0))
    call = changed(CALLS[op](torch.float32, torch.float32), 0, change)
    with pytest.raises(ValueError, match=rf"^{op} cannot do this call: .*\(versions tried: "):
        getattr(ops(), op)(*call[0], **call[1])


@pytest.mark.parametrize("op", CALLS)
def test_devices(op):
    call = CALLS[op](torch.float32, torch.float32)
    for place in places(call)[1:]:
        wrong = changed(call, place, lambda x: x.to("meta"))
        with pytest.raises(ValueError, match=rf"^{op} cannot do this call: its tensors are on cpu and meta"):
            getattr(ops(), op)(*wrong[0], **wrong[1])


@pytest.mark.parametrize("op", CALLS)
def test_strides(op):
    """Every tensor in turn is every second element of a larger one, or a transposed one: the same results."""
    wanted = results(getattr(ops(), op), CALLS[op](torch.float32, torch.float32))

    def spread(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    def turned(x: Tensor) -> Tensor:
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    for place in places(CALLS[op](torch.float32, torch.float32)):
        for change in (spread, turned):
            found = results(getattr(ops(), op), changed(CALLS[op](torch.float32, torch.float32), place, change))
            for a, b in zip(found, wanted):
                assert float((a - b).norm()) <= 1e-5 * float(b.norm().clamp_min(1e-12)), place


def test_a_run_says_what_it_uses_and_what_is_broken(monkeypatch):
    lines = registry.report(ops(), CPU)
    assert len(lines) == 1 and "cpp: layer_norm, rms_norm" in lines[0] and "grouped_mm" in lines[0]
    monkeypatch.setattr(native, "load", lambda: "is not built")
    first, second = registry.report(ops(), CPU)
    assert "cpp" not in first and second.startswith("kernels: no cpp version of layer_norm, rms_norm")
    assert second.endswith(": it is not built")
