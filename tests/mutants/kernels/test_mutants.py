"""Mutants of the CUDA sources: a few in `make test`, all in `make nightly`."""

import pytest

from tests.kernels.simt import build
from tests.mutants.kernels import run

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "-")
QUICK = ("04-wrong-rng-offset", "05-missing-tail", "07-unsynchronised-reuse", "12-inverse-not-inverted")


def killed(patch):
    assert run.names(patch) and run.survivors(patch) == []


@pytest.mark.parametrize("patch", QUICK)
def test_a_few_are_killed(patch):
    killed(patch)


@pytest.mark.nightly
@pytest.mark.parametrize("patch", run.PATCHES)
def test_all_are_killed(patch):
    killed(patch)


def test_there_are_enough_and_the_script_sees_a_survivor(monkeypatch, tmp_path):
    assert len(run.PATCHES) >= 8
    monkeypatch.setattr(run, "HERE", tmp_path)
    text = "--- a/cuda/swiglu.cu\n+++ b/cuda/swiglu.cu\n@@ -1 +1 @@\n-{}\n+// Harmless.\n"
    first = (build.ROOT / "csrc" / "cuda" / "swiglu.cu").read_text().splitlines()[0]
    (tmp_path / "harmless.patch").write_text("Killed-by: swiglu\n" + text.format(first))
    (tmp_path / "stale.patch").write_text("Killed-by: swiglu\n" + text.format("// not there"))
    assert run.survivors("harmless") == ["swiglu"]
    with pytest.raises(run.Unusable, match="does not apply"):
        run.survivors("stale")
