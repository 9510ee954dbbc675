"""The benchmarks of kernels run as far as a machine without a GPU lets them."""

import pytest
import torch

from benchmarks.kernels import docs, gpu, published, setting, timing


@pytest.mark.skipif(torch.cuda.is_available(), reason="the refusal is for machines without a GPU")
def test_the_gpu_table_is_refused_without_a_gpu(capsys):
    assert gpu.main(["--ops", "rms_norm"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpu.main(["--ops", "nothing"])
    found, _ = gpu.on_gpu()
    assert "triton" not in found.kernels or found.kernels["triton"].chosen["rms_norm"] == "triton"
    assert gpu.heading("none")[2].count("|") == gpu.heading("none")[3].count("|")


def test_a_row_of_the_gpu_table_by_the_clock_of_the_cpu(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    here = setting.on_cpu()
    here.others["square_sum"] = {}
    line, wrong = gpu.one("square_sum", here, 2, "cpu")
    assert wrong == [] and line.count("|") == gpu.heading("none")[2].count("|")


def test_ratios_are_medians_of_the_rounds():
    times = {"megapre": [1.0, 2.0, 4.0], "compile": [3.0, 4.0, 4.0]}
    assert timing.ratio(times, "compile", "megapre") == "2.00 (1.00-3.00)"
    assert timing.ratio(times, "liger", "megapre") == "-"


def test_every_table_of_the_page_has_its_place():
    page = docs.PAGE.read_text()
    scripts = ("run", "static", "triton_static", "traffic", "gpu", "published")
    for script in scripts:
        assert page.count(f"<!-- benchmarks/kernels/{script}.py -->") == 1
    assert page.count(docs.END) == len(scripts)


def test_published_speeds_count_work_as_their_authors_do(monkeypatch):
    rows, kernels = published.published()
    assert published.work("fwd", 1024) == 16 * 2 * 1024**2 * 2048 and published.work("fwd+bwd", 1024) == 3.5 * 2**36
    monkeypatch.setattr(published, "measured", lambda row: {"cuda": "7"} if row[0] == "H100" else {})
    lines = published.table().splitlines()
    assert len(lines) == 2 + len(rows) and "FlashAttention-3" in kernels
    assert sum("|  | 7 |" in line for line in lines) == sum(row[0] == "H100" for row in rows) > 0
