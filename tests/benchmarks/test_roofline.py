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


def test_naive_is_bound_by_the_units_of_fp32_and_exact_products_take_three_of_tf32():
    ceilings = {"float16": 600, "float32": 50, "tf32": 300}
    roofs = {
        (precision, generation): roofline.roof(ceilings, precision, generation)
        for precision in ceilings
        for generation in ("naive", "gemm", "fused")
    }
    assert {roof for (_, generation), roof in roofs.items() if generation == "naive"} == {50}
    for generation in ("gemm", "fused"):
        assert [roofs[p, generation] for p in ceilings] == [600, 100, 300]


@pytest.fixture
def result():
    records = [
        PROBLEM.record | {"map": [n], "precision": "float32", "kernels": numbers,
                          "providers": {"fused": {"forward_us": 2.0}}}
        for n, numbers in ((10, [0, 0]), (20, [1]))
    ]  # fmt: skip
    rates = {"bandwidth": 1e9, "float16": 6e12, "float32": 1e12, "tf32": 6e12}
    return {"device": "Some GPU", "ceilings": rates, "results": records}


def test_intensities_have_median_and_extremes(result):
    result["results"][1]["kernel_size"] = [10]
    text = roofline.tables(result)
    fused, unfused = (
        [4 * window * 16 / (moved * 4) for window, moved in ((5, five), (10, ten))]
        for five, ten in ((4 * 16, 4 * 16), (4 * 16 + 4 * 5, 4 * 16 + 4 * 10))
    )
    cells = [f"{sum(v) / 2:.1f} ({v[0]:.1f}, {v[1]:.1f})" for v in (unfused, unfused, fused)]
    assert f"| forward | float32 | 1-D | 2 | {' | '.join(cells)} |" in text


def test_a_rate_is_of_what_its_units_can_do(result):
    (per_byte, compute, memory), _ = roofline.points(result["results"], "fused", False)
    assert compute == roofline.flops(PROBLEM, False) / 2e-6
    assert memory == pytest.approx(roofline.traffic(PROBLEM, "float32", "fused", False) / 2e-6)
    assert per_byte == roofline.intensity(PROBLEM, "float32", "fused", False)
    rates = [r for _, r, _ in roofline.points(result["results"], "fused", False)]
    assert f"| {sum(rates) / 2 / 2e12:.1%} |" in roofline.tables(result)
    assert roofline.points(result["results"], "fused", True) == []


def test_each_kernel_of_a_record_is_a_launch(result):
    result["kernels"] = [{"count": 7}, {"count": 8}]
    assert roofline.launches(result) == [2, 1]
    for record in result["results"]:
        del record["kernels"]
    assert roofline.launches(result) == [7, 8]  # of an older file


def test_the_picture_has_a_panel_a_precision_and_pass(result, tmp_path):
    (file,) = roofline.plots(result, tmp_path).values()
    assert file.name == "roofline-some-gpu.png"
    assert file.stat().st_size > 10_000
