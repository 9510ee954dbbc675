"""Fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megapre.verify.pool import RankPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Eight rank processes over gloo, one thread each, for the whole session."""
    with RankPool(8) as ranks:
        yield ranks
