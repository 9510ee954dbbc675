"""apex as one more version: found by its attributes, called by its published interface (a double of it here)."""

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from megapre.config.schema import KernelsConfig
from megapre.kernels import apex, optimizer, registry

CUDA = torch.device("cuda")


@pytest.fixture
def installed(monkeypatch):
    """A double with apex' signatures: norms of apex.normalization.fused_layer_norm and amp_C's capturable Adam."""

    def adam(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, correction, decay, inverse):
        assert chunk > 0 and noop.dtype == step.dtype == torch.int32 and (mode, correction) == (1, 1)
        if int(noop):
            return
        for g, p, m, v in zip(*lists):
            g.mul_(inverse)
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            rate, count = float(lr), int(step)
            update = m / (1 - beta1**count) / ((v / (1 - beta2**count)).sqrt() + eps) + decay * p
            p.sub_(update * rate)

    modules = {name: ModuleType(name) for name in (
        "apex", "apex.normalization", "apex.normalization.fused_layer_norm", "fused_layer_norm_cuda", "amp_C",
    )}  # fmt: skip
    norms = modules["apex.normalization.fused_layer_norm"]
    norms.fused_layer_norm_affine = lambda x, w, b, shape, eps: F.layer_norm(x, shape, w, b, eps)
    norms.fused_rms_norm_affine = lambda x, w, shape, eps: F.rms_norm(x, shape, w, eps)
    modules["amp_C"].multi_tensor_adam_capturable = adam
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    apex.missing.cache_clear()
    yield modules
    apex.missing.cache_clear()


def test_absent_or_another_project(monkeypatch):
    apex.missing.cache_clear()
    rows = {(r["op"], r["version"]): r for r in registry.rows(CUDA, torch.bfloat16)}
    for op in ("rms_norm", "layer_norm", "adamw_"):
        assert not rows[op, "apex"]["usable"] and "needs NVIDIA apex" in rows[op, "apex"]["why not"]
        assert not rows[op, "apex"]["deterministic"] and not rows[op, "apex"]["picked"]
    with pytest.raises(ValueError, match="layer_norm version 'apex' needs NVIDIA apex"):
        registry.choose(KernelsConfig(norm="apex"), CUDA, torch.bfloat16)
    # The project of that name on PyPI is a framework for web sites: the import works, the attributes are not there.
    for name in ("apex", "apex.normalization", "apex.normalization.fused_layer_norm"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    apex.missing.cache_clear()
    assert "has no fused_layer_norm_affine" in apex.missing_norms()
    apex.missing.cache_clear()


def test_choice_by_name(installed):
    kernels = registry.choose(KernelsConfig(norm="apex", optimizer="apex"), CUDA, torch.bfloat16)
    assert kernels.chosen["rms_norm"] == kernels.chosen["layer_norm"] == kernels.chosen["adamw_"] == "apex"
    assert kernels.chosen["add_rms_norm"] == "torch"
    del installed["amp_C"].multi_tensor_adam_capturable
    apex.missing.cache_clear()
    assert "has no multi_tensor_adam_capturable" in apex.missing_adam()


def test_values(installed):
    x, w, b = torch.randn(5, 16), torch.randn(16), torch.randn(16)
    torch.testing.assert_close(apex.rms_norm_apex(x, w, 1e-5), F.rms_norm(x, (16,), w, 1e-5))
    for bias in (b, None):
        torch.testing.assert_close(apex.layer_norm_apex(x, w, bias, 1e-5), F.layer_norm(x, (16,), w, bias, 1e-5))
    numbers = dict(lr=torch.tensor(0.1), beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, step=torch.tensor(3.0))
    for skip in (0.0, 1.0):
        ours, theirs = ([t.clone() for t in (w, b, b / 2, b.abs(), w.bfloat16())] for _ in range(2))
        more = {"divisor": torch.tensor(4.0), "skip": torch.tensor(skip)}
        apex.adamw_apex_(*ours, **numbers, **more)
        optimizer.adamw_reference_(*theirs, **numbers, **more)
        for index in (0, 2, 3, 4):
            torch.testing.assert_close(ours[index], theirs[index])
