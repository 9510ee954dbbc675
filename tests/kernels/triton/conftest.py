"""The value tests of this folder run in two places: in triton's interpreter, and on a GPU (``pytest -m gpu``).

The interpreter is chosen when triton is imported, so its tests run in a process of their own, which ``test_tiers.py``
starts; elsewhere without a GPU there is nothing to collect in the ``test_values_*`` files.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_values_*.py"]
if INTERPRETED:
    collect_ignore_glob = ["test_tiers.py"]  # which starts the process that we are in

if INTERPRETED:
    from tests.kernels.triton import interpreter

    interpreter.install()


@pytest.fixture(params=["cpu" if INTERPRETED else pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)
