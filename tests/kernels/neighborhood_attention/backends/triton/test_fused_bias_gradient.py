"""The two stages of the bias's gradient, however the work is divided."""

import pytest
import torch
from oracle import Case, check

pytest.importorskip("triton")

from neighborhood_attention import na1d, na2d, na3d
from neighborhood_attention.backends.triton import fused_backward, fused_bias_gradient
from neighborhood_attention.backends.triton.tiles import TilePlan

pytestmark = pytest.mark.interpreter
FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}


@pytest.fixture
def divide(monkeypatch):
    """divide(shares, name=value): how the work is divided; what was prepared is forgotten."""

    def divide(shares=None, **sizes):
        if shares is not None:
            monkeypatch.setattr(TilePlan, "shares", lambda *_: shares)
        for name, value in sizes.items():
            monkeypatch.setattr(fused_bias_gradient, name, value)
        fused_backward._prepare.cache_clear()

    yield divide
    fused_backward._prepare.cache_clear()


@pytest.fixture
def reductions(monkeypatch):
    """The reductions that were prepared."""
    found = []

    class Recorded(fused_bias_gradient.BiasReduction):
        def __init__(self, problem, plan, shares, settings):
            super().__init__(problem, plan, shares, settings)
            found.append((shares, self._splits))

    monkeypatch.setattr(fused_bias_gradient, "BiasReduction", Recorded)
    return found


# Groups of two lengths, of which the shorter has fewer tiles.
UNEVEN = Case((65,), (3,), dilation=(2,), batch=3, heads=1, head_dim=8)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, (6, 2)),
        ({"shares": 1}, (1, 1)),
        ({"shares": 4, "REDUCED": 256, "TARGET_REDUCTIONS": 3}, (4, 3)),
    ],
    ids=["a share a group", "one share", "several splits"],
)
def test_every_division_has_the_same_sum(sizes, expected, divide, reductions, device):
    divide(**sizes)
    check(na1d, UNEVEN, torch.float32, device, backend="fused")
    assert reductions == [expected]


@pytest.mark.parametrize(
    "case",
    [
        Case((7, 3), (3, 2), dilation=(2, 1), is_causal=(False, True), heads=1, head_dim=40),
        Case((5, 3, 6), (2, 1, 2), batch=1, heads=2, head_dim=8, key_heads=1),
    ],
    ids=str,
)
def test_several_splits_agree_on_every_axis(case, divide, reductions, device):
    divide(REDUCED=32, TARGET_REDUCTIONS=40)
    check(FUNCTIONS[len(case.spatial)], case, torch.float32, device, backend="fused")
    assert reductions[0][1] > 1


def test_a_wide_window_has_its_offsets_in_blocks(device):
    case = Case((45,), (36,), batch=1, heads=2, head_dim=8)  # 71 offsets, 64 a block
    check(na1d, case, torch.float32, device, backend="fused")


@pytest.mark.parametrize(
    ("dtype", "reduced"),
    [(torch.float16, 4096), (torch.float64, 256)],
    ids=["fp16, one split", "fp64, several splits"],
)
def test_the_gradient_has_the_dtype_of_the_bias(dtype, reduced, divide, device):
    divide(REDUCED=reduced)
    query = torch.randn(1, 33, 1, 8, device=device)
    found = []
    for bias_dtype in (torch.float32, dtype):
        torch.manual_seed(0)
        rpb = torch.randn(1, 5, device=device).half().to(bias_dtype).requires_grad_()
        na1d(query, query, query, 3, rpb=rpb, backend="fused").square().sum().backward()
        found.append(rpb.grad)
    assert found[1].dtype == dtype
    torch.testing.assert_close(found[1].float(), found[0], rtol=1e-3, atol=1e-4)
