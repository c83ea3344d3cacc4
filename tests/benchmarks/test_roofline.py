import pytest
import roofline
from problem import Problem

PROBLEM = Problem((10,), 2, 16, (5,), (1,), 3)
TOKENS = 3 * 10 * 2  # rows of 16 channels


def test_work_is_that_of_the_products():
    assert roofline.flops(PROBLEM, False) == 2 * 2 * TOKENS * 5 * 16
    assert roofline.flops(PROBLEM, True) == 5 * 2 * TOKENS * 5 * 16


def test_fused_kernels_move_the_tensors_and_unfused_ones_their_weights_too():
    row, weights = 16 * TOKENS, 5 * TOKENS
    assert roofline.traffic(PROBLEM, "float16", "fused", False) == 2 * 4 * row
    assert roofline.traffic(PROBLEM, "float16", "fused", True) == 2 * 8 * row
    for generation in ("naive", "gemm"):
        assert roofline.traffic(PROBLEM, "float32", generation, False) == 4 * (
            4 * row + 4 * weights
        )
        assert roofline.traffic(PROBLEM, "float32", generation, True) == 4 * (
            10 * row + 8 * weights
        )


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ({"warps": 4, "registers": 128, "shared_memory": 0}, 16 / 64),  # registers of 4 programs
        ({"warps": 4, "registers": 32, "shared_memory": 99 * 1024}, 8 / 64),  # memory of 2
        ({"warps": 8, "registers": 16, "shared_memory": 0}, 1),
        ({"warps": 1, "registers": 16, "shared_memory": 0}, 32 / 64),  # 32 programs
    ],
    ids=["registers", "memory", "full", "programs"],
)
def test_occupancy_is_bound_by_what_runs_out_first(kernel, expected):
    hopper = {"registers": 65536, "shared_memory": 233472, "threads": 2048}
    assert roofline.occupancy(kernel, hopper) == expected
