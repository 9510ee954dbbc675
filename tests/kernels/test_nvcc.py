"""What nvcc makes of csrc/cuda for sm_80 and sm_90: links, loads without a GPU, and keeps its static budgets."""

import ctypes
import subprocess

import pytest

from benchmarks.kernels import static
from megapre.kernels import cuda

pytestmark = pytest.mark.skipif(bool(static.missing()), reason=static.missing() or "-")


@pytest.mark.parametrize("arch", static.ARCHS)
def test_nothing_spills_and_no_kernel_is_left_out(arch):
    found = static.kernels(arch)
    assert len(found) > 100 and all(kernel.lines for kernel in found.values())
    for name, kernel in found.items():
        if name.startswith("attention: "):
            check_attention(name, kernel)
            continue
        assert kernel.spills == 0 and not kernel.mix["LDL"] + kernel.mix["STL"], f"{name} spills {kernel.spills} bytes"
        assert kernel.shared <= 1024, name
        # Nothing here needs fp64 but the one thread of `prepare` and the last sum of squares.
        assert not kernel.mix["DFMA"] or "prepare" in name, name


def check_attention(name, kernel):
    """Products on tensor cores from staged tiles, and no local memory in the loop that does them.

    Around that loop a few values spill, where addresses and the tiles that a mask cuts are prepared.
    """
    assert kernel.mix["HMMA"] and kernel.mix["LDGSTS"] and kernel.mix["LDSM"], name
    local = sum(op.startswith(("LDL", "STL")) for op in kernel.hot())
    most = 2 if "bias_gradient<32>" in name else 0  # which reads two spilled values a tile
    assert local <= most and kernel.spills <= 128, f"{name}: {local}, {kernel.spills}"


@pytest.mark.parametrize("arch", static.ARCHS)
@pytest.mark.parametrize("row", static.TABLE, ids=lambda row: row.op)
def test_budgets(row, arch):
    i, kernel = static.ARCHS.index(arch), static.kernel_of(row, arch)
    regs, instr = row.regs[i], row.instr[i] if row.instr else float("inf")
    if row.stands:
        assert row.missed
        regs, instr = row.stands[i]
    count = kernel.per_element(row)
    assert count > 0
    assert kernel.regs <= regs and count <= instr, f"{kernel.name}: {kernel.regs} registers, {count:.1f} instructions"
    assert kernel.wide("LDG") >= row.wide[0] and kernel.wide("STG") >= row.wide[1], kernel.mix


@pytest.mark.parametrize("arch", static.ARCHS)
def test_instruction_mix(arch):
    found = static.kernels(arch)
    assert found["cross_entropy: fused_shared<B>"].mix["LDGSTS"] > 0  # cp.async, not loads through registers
    for name, kernel in found.items():
        if name.startswith("norm: norms::forward<"):
            loads, stores = kernel.mix["LDG"], kernel.mix["STG"]  # but for one or two statistics, all are 128 bits wide
            assert kernel.wide("LDG") == loads and stores - kernel.wide("STG") <= 2, name
            assert kernel.mix["BAR"] <= 2 and kernel.mix["SHFL"] <= 20, name
        if name.startswith("swiglu") and "1>" not in name:
            assert kernel.wide("LDG") == kernel.mix["LDG"] and kernel.wide("STG") == kernel.mix["STG"], name
    for rope in ("B, 8, false", "B, 8, true", "float, 4, false"):
        kernel = found[f"rope: rotate<{rope}>"]
        assert kernel.wide("LDG") == kernel.mix["LDG"] and kernel.wide("STG") == kernel.mix["STG"]


def test_the_library_links_and_exports_its_functions(tmp_path):
    static.kernels("sm_80")
    objects = [
        str(static.compile_object(source, "sm_80")[0]) for source in sorted((static.ROOT / "csrc/cuda").glob("*.cu"))
    ]
    library = tmp_path / "cuda.so"
    command = [static.find("nvcc"), "-shared", "-cudart", "static", "-arch=sm_80", *objects, "-o", str(library)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded = cuda.declare(ctypes.CDLL(str(library)))  # loads without a GPU, and every function is there
    # Nothing to do, nothing launched: the one path that runs without a GPU.
    zeros = [kind(0) for kind in cuda.SIGNATURES["megapre_keep_mask"]]
    assert loaded.megapre_keep_mask(*zeros) == 0


def test_a_wrong_budget_would_be_seen():
    kernel = static.kernel_of(static.TABLE[0], "sm_80")
    assert kernel.regs > 16 and kernel.per_element(static.TABLE[0]) > 8
    looped = next(row for row in static.TABLE if row.op.startswith("RoPE"))
    assert static.kernel_of(looped, "sm_80").per_element(looped) > 3.5  # the arithmetic alone
