"""The compiled libraries: fake versions and schemas of every op, and what nvcc makes of csrc/cuda."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megapre.random import native

ROOT = Path(__file__).resolve().parents[2]
SYMBOLS = {"megapre_keep_mask", "megapre_rms_norm_forward", "megapre_rms_norm_backward"}


def cases():
    x, w, grad = torch.randn(6, 10), torch.randn(10), torch.randn(6, 10)
    targets, positions, samples = torch.tensor([0, 1, 2, 3, -1, 9]), torch.arange(6), torch.arange(2)
    ops = torch.ops.megapre
    return {
        "layer_norm_forward": (x, w, w, 1e-5),
        "layer_norm_backward": (grad, x, w, torch.rand(2, 6)),
        "rms_norm_forward": (x.bfloat16(), w, 1e-5),
        "rms_norm_backward": (grad, x, w, torch.rand(1, 6)),
        "cross_entropy_statistics": (x, targets, 9),
        "cross_entropy_gradient_": (x.clone(), targets, torch.rand(6), torch.rand(6), 9),
        "gelu_forward": (x,),
        "gelu_backward": (grad, x),
        "swiglu_forward": (x,),
        "swiglu_backward": (torch.randn(6, 5), x),
        "philox_normal_": (torch.empty(3, 2), [1, 2, 3, 4], [6, 4], [1, 1]),
        "keep_mask": (5, 1, [7, 8], positions, samples, 3, 11, 0.25),
        "dropout": (torch.randn(6, 2, 9), 5, 1, 7, positions, samples, 0.25),
    }, ops


@pytest.mark.skipif(bool(native.load()), reason=native.load())
@pytest.mark.parametrize("name", native.FAKES)
def test_opcheck(name):
    torch.use_deterministic_algorithms(False)
    arguments, ops = cases()
    torch.library.opcheck(getattr(ops, name).default, arguments[name])


@pytest.mark.skipif(bool(native.load()), reason=native.load())
def test_bad_shapes_are_refused():
    ops = torch.ops.megapre
    for call in (
        lambda: ops.rms_norm_forward(torch.randn(3, 4), torch.randn(5), 1e-5),
        lambda: ops.rms_norm_forward(torch.randn(4, 3).t(), torch.randn(4), 1e-5),
        lambda: ops.rms_norm_forward(torch.randn(3, 4).double(), torch.randn(4), 1e-5),
        lambda: ops.cross_entropy_statistics(torch.randn(3, 4), torch.zeros(2, dtype=torch.int64), 4),
        lambda: ops.cross_entropy_statistics(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), 5),
        lambda: ops.dropout(torch.randn(3, 4, 5), 1, 1, 1, torch.arange(3), torch.arange(5), 0.1),
    ):
        with pytest.raises(RuntimeError):
            call()


def nvcc():
    home = os.environ.get("CUDA_HOME", "")
    inside = Path(home) / "bin" / "nvcc"
    return str(inside) if home and inside.exists() else shutil.which("nvcc")


@pytest.mark.skipif(nvcc() is None, reason="no nvcc: the CUDA kernels are not compiled here")
def test_cuda_sources_compile_and_export_their_functions(tmp_path):
    library = tmp_path / "cuda.so"
    sources = [str(path) for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))]
    command = [nvcc(), "-arch=sm_80", "-std=c++17", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC"]
    result = subprocess.run(
        [*command, "-Xptxas", "-v", *sources, "-o", str(library)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    reports = [line for line in result.stderr.splitlines() if "spill" in line]
    assert len(reports) >= 10 and all("0 bytes spill stores, 0 bytes spill loads" in line for line in reports)
    loaded = ctypes.CDLL(str(library))  # loads without a GPU
    assert all(hasattr(loaded, symbol) for symbol in SYMBOLS)
    # Nothing to do, nothing launched: the one path that runs without a GPU.
    zeros = [ctypes.c_void_p(0)] * 3 + [ctypes.c_int64(0)] * 3 + [ctypes.c_uint32(0)] * 4 + [ctypes.c_void_p(0)]
    assert loaded.megapre_keep_mask(*zeros) == 0
