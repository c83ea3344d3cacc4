"""The problem sizes of `data/op_cases.json`, those that the definition can do in full."""

import pytest
import torch
from op_cases import op_cases, pairs_of_tokens
from oracle import check

from neighborhood_attention import na1d, na2d, na3d

FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
DTYPES = torch.float64, torch.float32, torch.float16, torch.bfloat16
# Elements of the oracle's matrix, on a CPU in reasonable time.
SMALL = [case for case in op_cases() if pairs_of_tokens(case) <= 5e6]


# Neighbors in the list are the masks of one size: each dtype comes to see each kind of mask.
@pytest.mark.parametrize(
    ("case", "dtype"),
    [pytest.param(c, DTYPES[i % 4], id=f"{c}-{DTYPES[i % 4]}") for i, c in enumerate(SMALL)],
)
def test_the_reference_agrees_with_the_definition(case, dtype):
    check(FUNCTIONS[len(case.spatial)], case, dtype, backend="reference")
