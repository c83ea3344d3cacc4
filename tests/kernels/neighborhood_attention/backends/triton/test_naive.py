"""The naive kernels against the definition: interpreted on the CPU, natively on a GPU."""

import pytest
import torch
from oracle import Case, check

from neighborhood_attention import na1d, na2d, na3d

pytestmark = pytest.mark.interpreter
FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
ONE = {"batch": 1, "heads": 1, "head_dim": 128}  # blocks of 8 tokens, and of 4 neighbors
CASES = {
    "several blocks of neighbors": Case((11,), (10,), **ONE),
    "heads and images": Case((4,), (3,), head_dim=60, rpb=False),
    "several lines": Case((3, 3), (2, 2), **ONE),
    "several planes": Case((3, 2, 4), (2, 2, 3), **ONE, is_causal=(False, False, True)),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name, device):
    case = CASES[name]
    check(FUNCTIONS[len(case.spatial)], case, torch.float32, device, backend="naive")
