"""The forward of few tokens, against the definition."""

import pytest
import torch
from oracle import Case, check, check_that_nan_shows

pytest.importorskip("triton")

from neighborhood_attention import na1d, na2d, na2d_qkvpacked, na3d
from neighborhood_attention.backends.triton import (
    fused_direct_forward,
    fused_forward,
    tile_table,
)
from neighborhood_attention.backends.triton.launch import Problem, describe_packed

LOG2_E = 1.4426950408889634
IS_WORTH_IT = fused_direct_forward.is_worth_it  # before a fixture replaces it
interpreted = pytest.mark.interpreter

FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
ONE = {"batch": 1, "heads": 1}
CASES = {
    "a window of each size": Case((9, 11), (7, 4), **ONE),
    "full window": Case((7, 7), (7, 7), batch=2, heads=2),
    "groups of two lengths": Case((9, 17), (3, 5), dilation=(2, 3), batch=2, heads=2),
    "a group that ends before a tile": Case((5, 10), (2, 2), dilation=(2, 1), **ONE),
    "stride, causal rows": Case((8, 12), (4, 3), stride=(2, 3), is_causal=(True, False), **ONE),
    "grouped heads": Case((5, 6), (3, 3), batch=2, heads=4, key_heads=2),
    "no bias, a value dimension of its own": Case((5, 6), (3, 3), value_dim=24, rpb=False, **ONE),
    "heads that fill no block": Case((5, 6), (3, 3), head_dim=24, **ONE),
    "sequence": Case((50,), (7,), dilation=(2,), heads=2),
    "video": Case((5, 4, 6), (3, 2, 3), is_causal=(True, False, False), heads=2),
}
# What another kernel must do.
OTHERS = {
    "additional keys": Case((5, 6), (3, 3), additional=3, **ONE),
    "many keys": Case((20, 20), (15, 15), batch=1, heads=1),
    "large heads": Case((4, 4), (2, 2), head_dim=80, **ONE),
}


@pytest.fixture
def used(monkeypatch):
    """The problems that were prepared for this kernel, which takes all that it can."""
    found = []
    prepare = fused_forward.direct_forward

    def recorded(problem, plan, settings):
        found.append(problem)
        return prepare(problem, plan, settings)

    monkeypatch.setattr(fused_direct_forward, "is_worth_it", lambda problem: True)
    monkeypatch.setattr(fused_forward, "direct_forward", recorded)
    fused_forward._prepare.cache_clear()
    yield found
    fused_forward._prepare.cache_clear()


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name, used, device):
    case = CASES[name]
    check(FUNCTIONS[len(case.spatial)], case, torch.float16, device, backend="fused")
    assert len(used) == 1


@interpreted
@pytest.mark.parametrize("name", OTHERS)
def test_other_problems_take_another_kernel(name, used, device):
    check(na2d, OTHERS[name], torch.float16, device, backend="fused")
    assert not used


@interpreted
def test_fp32_takes_another_kernel(used, device):
    check(na2d, CASES["full window"], torch.float32, device, backend="fused")
    assert not used


@interpreted
@pytest.mark.parametrize("scale", [-0.7, 0.0], ids=str)
def test_scales_of_every_sign(scale, used, device):
    check(na2d, CASES["full window"], torch.float16, device, scale=scale, backend="fused")
    assert len(used) == 1


@interpreted
def test_a_packed_map_without_a_bias(used, device):
    qkv = torch.randn(1, 5, 6, 3, 2, 16, device=device).half()
    query, key, value = qkv.double().unbind(-3)
    expected = na2d(query, key, value, kernel_size=3, backend="reference")
    for _ in range(2):  # the second launch takes addresses
        output = na2d_qkvpacked(qkv, kernel_size=3, backend="fused")
        torch.testing.assert_close(output.double(), expected, rtol=2e-3, atol=2e-3)
    assert len(used) == 1


@interpreted
def test_the_bias_is_rounded_as_backwards_round_it_and_may_be_strided(used, device):
    query, key, value = torch.randn(3, 1, 5, 6, 2, 16, device=device).half().unbind()
    rpb = 500 + torch.randn(5, 5, 2, device=device).permute(2, 0, 1)
    # In powers of 2, as scores are.
    rounded = ((rpb * LOG2_E).half().double() / LOG2_E).contiguous()
    output, expected = (
        na2d(*tensors, kernel_size=3, rpb=bias, backend=backend)
        for tensors, bias, backend in (
            ((query, key, value), rpb, "fused"),
            ((query.double(), key.double(), value.double()), rounded, "reference"),
        )
    )
    assert len(used) == 1
    error = (output - expected).norm() / expected.norm()
    assert error < 1e-3  # of a bias that is not rounded: some percent


@interpreted
def test_biases_of_minus_infinity_leave_nothing(used, device):
    query, key, value = torch.randn(3, 1, 4, 4, 1, 16, device=device).half().unbind()
    rpb = torch.full((1, 7, 7), -torch.inf, device=device)
    _, lse = na2d(query, key, value, kernel_size=4, rpb=rpb, return_lse=True, backend="fused")
    assert len(used) == 1
    assert not lse.isnan().any()


@interpreted
def test_a_value_that_is_not_finite_is_not_hidden(used, device):
    check_that_nan_shows(na2d, 16, torch.float16, device, backend="fused")
    assert len(used) == 1


@interpreted
def test_nothing_outside_the_map_is_read(used, device):
    """NaN beside each token, where other heads of a packed map lie."""
    packed = torch.full((1, 5, 6, 3, 16), torch.nan, device=device).half()
    packed[..., 1, :] = torch.randn(1, 5, 6, 16, device=device)
    middle = packed[..., 1:2, :]
    output = na2d(middle, middle, middle, kernel_size=3, backend="fused")
    assert len(used) == 1
    whole = middle.contiguous()
    assert torch.equal(output, na2d(whole, whole, whole, kernel_size=3, backend="fused"))


@pytest.mark.gpu
def test_bf16(used, device):
    check(na2d, CASES["groups of two lengths"], torch.bfloat16, device, backend="fused")
    assert len(used) == 1


@pytest.mark.gpu
def test_launches_that_overlap_wait_for_what_they_read(used, device, monkeypatch):
    """Each reads what the one before wrote, as its query and as its bias."""
    # Else a launch that fills the output with NaN would come between.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    start = torch.randn(1, 14, 14, 8, 32, device=device).half()

    def chain(wait):
        x = start
        for _ in range(32):
            rpb = x.flatten()[: 8 * 13 * 13].view(8, 13, 13)
            x = na2d(x, x, x, kernel_size=7, rpb=rpb, backend="fused")
            wait()
        return x

    expected = chain(torch.cuda.synchronize)
    for _ in range(20):
        assert torch.equal(chain(lambda: None), expected)
    assert len(used) == 1


def test_few_tokens_on_a_gpu_where_launches_overlap(monkeypatch):
    few = torch.empty(1, 14, 14, 3, 8, 32, dtype=torch.bfloat16)
    many = few.expand(128, *few.shape[1:])
    for capability, expected in (("9.0", [True, False]), ("8.0", [False, False])):
        monkeypatch.setattr(tile_table, "capability", lambda _, found=capability: found)
        problems = [Problem.of(describe_packed(qkv, None)) for qkv in (few, many)]
        assert [IS_WORTH_IT(problem) for problem in problems] == expected
