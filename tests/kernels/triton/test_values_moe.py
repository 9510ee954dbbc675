import pytest
import torch

from megapre.kernels.triton import moe
from tests.kernels.moe_cases import ROUTES, SIZES, WIDTHS, Version, check_products, check_top_k, check_ways

OURS = Version(
    moe.top_k_triton, moe.permute_triton, moe.unpermute_triton, moe.grouped_mm_triton, moe.grouped_dw_triton_
)
DTYPES = [torch.float32, torch.bfloat16]
SEED = 11


def test_top_k(device):
    check_top_k(OURS, str(device), SEED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_permute_and_unpermute(case, dtype, device):
    for width in (11, 1030):  # less and more than a block
        check_ways(OURS, case, width, dtype, str(device), SEED)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_grouped_products(sizes, dtype, device):
    for outs, ins in WIDTHS:
        check_products(OURS, sizes, outs, ins, dtype, str(device), SEED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_larger_than_a_block(dtype, device):
    check_products(OURS, [130, 0, 5], 133, 150, dtype, str(device), SEED)
