import pytest
import torch

from megapre.config.schema import KernelsConfig
from megapre.kernels import registry
from megapre.random import native

CPU = torch.device("cpu")


def test_every_row_loads_and_every_op_has_a_reference():
    for version in registry.TABLE:
        assert callable(registry._load(version)) and hasattr(KernelsConfig(), version.key)
    for op in registry.OPS:
        assert any(version.op == op and version.name == "reference" for version in registry.TABLE)


def test_auto_picks_cpp_then_torch_then_reference(monkeypatch):
    chosen = registry.choose(KernelsConfig(), CPU, torch.bfloat16).chosen
    assert chosen["rms_norm"] == chosen["ce_statistics"] == chosen["dropout"] == "cpp"
    assert chosen["attention"] == "cpp" and chosen["rope_qk"] == chosen["adamw_"] == "cpp"
    chosen = registry.choose(KernelsConfig(), CPU, torch.float16).chosen
    assert chosen["layer_norm"] == "torch" and chosen["ce_gradient_"] == "reference"
    assert set(registry.choose(KernelsConfig(), CPU, torch.float64).chosen.values()) == {"reference"}
    assert set(registry.choose(KernelsConfig(), torch.device("cuda"), torch.bfloat16).chosen.values()) == {
        "torch", "sdpa", "reference",
    }  # fmt: skip
    monkeypatch.setattr(native, "load", lambda: "is not built")
    kernels = registry.choose(KernelsConfig(), CPU, torch.float32)
    assert kernels.chosen["layer_norm"] == "torch" and kernels.chosen["dropout"] == "reference"
    reasons = {(row["op"], row["version"]): row["why not"] for row in registry.rows(CPU, torch.float32)}
    assert reasons["dropout", "cpp"] == "is not built"
    with pytest.raises(ValueError, match=r"layer_norm version 'cpp' is not built: set kernels.norm to"):
        registry.choose(KernelsConfig(norm="cpp"), CPU, torch.float32)


def test_names_are_checked_in_one_sentence():
    with pytest.raises(ValueError, match=r"attention has no version 'flashy': set kernels.attention to auto or one of"):
        registry.choose(KernelsConfig(attention="flashy"), CPU, torch.float32)
    with pytest.raises(ValueError, match=r"layer_norm version 'cuda' runs on CUDA devices, not on cpu: set kernels"):
        registry.choose(KernelsConfig(norm="cuda"), CPU, torch.float32)
    with pytest.raises(ValueError, match="handles fp32 and bf16, not fp64"):
        registry.choose(KernelsConfig(cross_entropy="cpp"), CPU, torch.float64)
    chosen = registry.choose(KernelsConfig(norm="reference", activation="torch"), CPU, torch.float32).chosen
    assert chosen["layer_norm"] == chosen["rms_norm"] == "reference" and chosen["swiglu"] == "torch"


def test_rows_tell_everything():
    rows = registry.rows(CPU, torch.float32)
    assert len(rows) == len(registry.TABLE) and sum(row["picked"] for row in rows) == len(registry.OPS)
    assert all(row["usable"] == (row["why not"] == "") for row in rows)
    assert all(row["usable"] for row in rows if row["picked"])
    on_cuda = {row["version"]: row for row in registry.rows(torch.device("cuda"), torch.float32)}
    assert not on_cuda["sdpa"]["deterministic"] and on_cuda["reference"]["deterministic"]


@pytest.mark.nightly
def test_chosen_kernels_compile_to_one_graph():
    from megapre.kernels.attention import AttentionDropout
    from megapre.kernels.mask import CAUSAL

    kernels = registry.choose(KernelsConfig(), CPU, torch.float32)
    positions, samples = torch.arange(8), torch.arange(2)

    def block(x, w, step):
        y = kernels.rms_norm(kernels.layer_norm(x, w, 0.5 * w, 1e-5), w, 1e-5)
        q = y.view(8, 2, 4, 8)
        dropout = AttentionDropout(1, step, [0, 1, 2, 3], samples, 0.2)
        a = kernels.attention(q, 2 * q, q + 1, mask=CAUSAL, dropout=dropout)
        a = kernels.gelu(a.reshape(8, 2, 32))
        a = kernels.dropout(a, seed=1, step=step, site=4, positions=positions, samples=samples, probability=0.1)
        return kernels.swiglu(a).square().sum()

    x, w = torch.randn(8, 2, 32), torch.randn(32, requires_grad=True)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for step in (3, 4):
        results = [torch.autograd.grad(f(x, w, step), w)[0] for f in (block, compiled)]
        torch.testing.assert_close(results[0], results[1])
