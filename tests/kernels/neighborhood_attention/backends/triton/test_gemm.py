"""The batched-GEMM kernels against the definition: interpreted on the CPU, natively on a GPU."""

import pytest
import torch
from oracle import Case, check

from neighborhood_attention import na1d, na2d, na3d

pytestmark = pytest.mark.interpreter
FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
ONE = {"batch": 1, "heads": 1}
# Tiles of 64 queries, strips of 32 keys: (64,), (8, 8), (4, 4, 4) and (32,), (4, 8), (2, 4, 4).
CASES = {
    "several tiles and strips": Case((70,), (40,), **ONE, rpb=False),
    "rows and columns": Case((10, 8), (4, 3), **ONE, rpb=False),
    "causal, several tiles": Case((70,), (9,), is_causal=(True,), **ONE, rpb=False),
    "volume": Case((5, 4, 2), (3, 2, 2), **ONE, rpb=False),
    "huge heads": Case((33,), (3,), **ONE, head_dim=72, rpb=False),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name, device):
    case = CASES[name]
    check(FUNCTIONS[len(case.spatial)], case, torch.float32, device, backend="gemm")
