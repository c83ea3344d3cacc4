"""The forward where a tile holds a dilation group, against the definition."""

from dataclasses import replace

import pytest
import torch
from oracle import Case, check

pytest.importorskip("triton")

from neighborhood_attention import na2d
from neighborhood_attention.backends.triton import fused_forward

pytestmark = pytest.mark.interpreter

ONE = {"batch": 1, "heads": 1, "head_dim": 8}
CASES = {
    "full window": Case((7, 8), (7, 8), **ONE),
    "groups of two lengths": Case((7, 5), (3, 2), dilation=(2, 2), batch=2, heads=2, head_dim=8),
    "stride, causal rows": Case((8, 6), (4, 3), stride=(2, 3), is_causal=(True, False), **ONE),
    "grouped heads": Case((5, 6), (3, 3), batch=2, heads=4, key_heads=2, head_dim=8),
    "no bias, a value dimension of its own": Case(
        (5, 6), (3, 3), value_dim=16, rpb=False, batch=1, heads=1, head_dim=8
    ),
}
# What another kernel must do.
OTHERS = {
    "additional keys": Case((5, 6), (3, 3), additional=3, **ONE),
    "a longer group": Case((5, 9), (3, 3), **ONE),
    "a strip of another shape than the tile": Case((2, 4), (2, 2), batch=1, heads=1, head_dim=256),
}


@pytest.fixture
def used(monkeypatch):
    """The problems that were prepared for this kernel; its programs take several items each."""
    found = []
    prepare, choose = fused_forward.whole_group_forward, fused_forward.choose_tiles

    def recorded(problem, plan, settings):
        found.append(problem)
        return prepare(problem, plan, settings)

    def few_programs(problem, window):
        tiles = choose(problem, window)
        return replace(tiles, forward=replace(tiles.forward, programs=3))

    monkeypatch.setattr(fused_forward, "whole_group_forward", recorded)
    monkeypatch.setattr(fused_forward, "choose_tiles", few_programs)
    fused_forward._prepare.cache_clear()
    yield found
    fused_forward._prepare.cache_clear()


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name, used, device):
    check(na2d, CASES[name], torch.float32, device, backend="fused")
    assert len(used) == 1


@pytest.mark.parametrize("name", OTHERS)
def test_other_problems_take_another_kernel(name, used, device):
    check(na2d, OTHERS[name], torch.float32, device, backend="fused")
    assert not used


def test_a_value_that_is_not_finite_is_not_hidden(used, device):
    query, key, value = torch.randn(3, 1, 4, 4, 1, 8, device=device).unbind()
    query[0, 1, 2] = torch.nan
    output, lse = na2d(query, key, value, kernel_size=4, return_lse=True, backend="fused")
    assert len(used) == 1
    is_nan = lse[0, ..., 0].isnan()
    assert is_nan[1, 2]
    assert is_nan.sum() == 1
    assert output[0, 1, 2].isnan().all()
    assert output.isnan().sum() == 8
