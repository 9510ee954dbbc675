"""All mutants: each re-creates a bug that a real engine had, or seeds one, and names the test that must notice it.

``exhibits.py`` says which of them stand for which exhibit. A mutant that no longer applies is a fault of the museum:
one that cannot be planted proves nothing.
"""

from __future__ import annotations

from tests.museum.architectures import ARCHITECTURE_MUTANTS
from tests.museum.blocks import BLOCK_MUTANTS
from tests.museum.data import DATA
from tests.museum.experts import EXPERT_MUTANTS
from tests.museum.hub import HUB_MUTANTS
from tests.museum.kernels import KERNELS
from tests.museum.objectives import OBJECTIVE_MUTANTS
from tests.museum.parallel import PARALLEL
from tests.museum.proof import PROOF
from tests.museum.relative import RELATIVE_MUTANTS
from tests.museum.state import STATE
from tests.museum.strategies import STRATEGY_MUTANTS
from tests.museum.training import TRAINING
from tests.museum.triton import TRITON_MUTANTS

OF_KERNELS = (*KERNELS, *TRITON_MUTANTS)
ALL = (
    *PARALLEL, *TRAINING, *PROOF, *BLOCK_MUTANTS, *ARCHITECTURE_MUTANTS, *RELATIVE_MUTANTS, *EXPERT_MUTANTS,
    *OBJECTIVE_MUTANTS, *DATA, *STATE, *STRATEGY_MUTANTS, *HUB_MUTANTS, *OF_KERNELS,
)  # fmt: skip
"""Those of ``QUICK`` run in `make test`, all of them in the nightly lane."""

QUICK = (
    "kv-head-copies-not-summed", "sum-of-input-gradients-not-awaited", "denominator-of-this-rank",
    "microbatches-overwrite-each-other", "zero3-layer-does-not-wait-for-its-weights", "comparer-takes-the-best",
    "every-epoch-in-the-same-order", "checksum-not-compared", "expert-gradients-over-the-dense-replicas",
    "triton-rope-interleaved-sign",
)  # fmt: skip
