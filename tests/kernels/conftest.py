import pytest
import torch


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """torch.empty gives NaN here, so that an element a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1000).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
