"""The forward where a tile holds a dilation group, against the definition."""

from dataclasses import replace

import pytest
import torch
from oracle import Case, check, check_that_nan_shows

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
    check_that_nan_shows(na2d, 8, torch.float32, device, backend="fused")
    assert len(used) == 1
