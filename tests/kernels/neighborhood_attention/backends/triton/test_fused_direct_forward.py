"""The forward of few tokens, against the definition."""

import pytest
import torch
from oracle import Case, check

pytest.importorskip("triton")

from neighborhood_attention import na1d, na2d, na3d
from neighborhood_attention.backends.triton import (
    fused_direct_forward,
    fused_forward,
    tile_table,
)
from neighborhood_attention.backends.triton.launch import Problem, describe_packed

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
def use(monkeypatch):
    """use(False) leaves all to the other kernels again."""

    def choose(is_used):
        monkeypatch.setattr(fused_direct_forward, "is_worth_it", lambda problem: is_used)
        fused_forward._prepare.cache_clear()

    choose(True)
    yield choose
    fused_forward._prepare.cache_clear()


@pytest.fixture
def used(use, monkeypatch):
    """The problems that were prepared for this kernel."""
    found = []
    prepare = fused_forward.direct_forward

    def recorded(problem, plan, settings):
        found.append(problem)
        return prepare(problem, plan, settings)

    monkeypatch.setattr(fused_forward, "direct_forward", recorded)
    return found


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
def test_a_bias_in_the_dtype_of_the_query_is_read_as_it_is(used, device):
    query, key, value = torch.randn(3, 1, 5, 6, 2, 16, device=device).half().unbind()
    rpb = torch.randn(2, 5, 5, device=device).half()
    half, single = (
        na2d(query, key, value, kernel_size=3, rpb=bias, backend="fused")
        for bias in (rpb, rpb.float())
    )
    assert len(used) == 2
    assert torch.equal(half, single)


@interpreted
def test_a_value_that_is_not_finite_is_not_hidden(used, device):
    query, key, value = torch.randn(3, 1, 4, 4, 1, 16, device=device).half().unbind()
    query[0, 1, 2] = torch.nan
    output, lse = na2d(query, key, value, kernel_size=4, return_lse=True, backend="fused")
    assert len(used) == 1
    is_nan = lse[0, ..., 0].isnan()
    assert is_nan[1, 2]
    assert is_nan.sum() == 1
    assert output[0, 1, 2].isnan().all()
    assert output.isnan().sum() == 16


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
def test_launches_that_overlap_wait_for_what_they_read(used, device):
    """Each reads the output of the one before, and a bias that was written just now."""
    start = torch.randn(1, 14, 14, 8, 32, device=device).half()
    biases = torch.randn(16, 8, 13, 13, device=device)

    def chain(wait):
        x, rpb = start, torch.empty_like(biases[0])
        for bias in biases:
            rpb.copy_(bias)
            wait()
            x = na2d(x, x, x, kernel_size=7, rpb=rpb, backend="fused")
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
