"""The query's and the bias's gradient in one pass, against the definition."""

from dataclasses import replace

import pytest
import torch
from oracle import Case, check, random_gradients, random_tensors, results

pytest.importorskip("triton")

from neighborhood_attention import na2d
from neighborhood_attention.backends.triton import fused_backward
from neighborhood_attention.backends.triton.tiles import WINDOWED

pytestmark = pytest.mark.interpreter

ONE = {"batch": 1, "heads": 1, "head_dim": 8}
CASES = {
    "one strip": Case((9, 18), (2, 3), **ONE),
    "two strips": Case((13, 10), (6, 3), **ONE),  # of 4 rows, where 2 rows meet 7
    "groups of two lengths, grouped heads": Case(
        (9, 17), (3, 2), dilation=(1, 2), batch=1, heads=2, key_heads=1, head_dim=8
    ),
    "stride, causal columns": Case((9, 9), (3, 3), stride=(2, 1), is_causal=(False, True), **ONE),
    "a value dimension of its own": Case((9, 9), (3, 3), value_dim=24, batch=1, heads=1),
}


@pytest.fixture
def used(monkeypatch):
    """The problems that were prepared for this pass; by the rule fp32 does not take it."""
    found = []
    choose_tiles = fused_backward.choose_tiles

    def choose(problem, window):
        tiles = choose_tiles(problem, window)
        return replace(tiles, query_bias_gradient=WINDOWED.query_bias_gradient)

    class Recorded(fused_backward.QueryBiasGradient):
        def __init__(self, problem, *others):
            super().__init__(problem, *others)
            found.append(problem)

    monkeypatch.setattr(fused_backward, "QueryBiasGradient", Recorded)
    monkeypatch.setattr(fused_backward, "choose_tiles", choose)
    fused_backward._prepare.cache_clear()
    yield found
    fused_backward._prepare.cache_clear()


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name, used, device):
    dtype = torch.float16 if CASES[name].value_dim > 8 else torch.float32
    check(na2d, CASES[name], dtype, device, backend="fused")
    assert len(used) == 1


def test_inputs_of_unequal_strides_agree_with_equal_ones(used, device):
    case = Case((9, 10), (3, 3), **ONE)
    tensors = random_tensors(case.shapes(), torch.float32, device)
    grads = random_gradients(case, torch.float32, device)

    def function(**leaves):
        return na2d(**leaves, kernel_size=3, return_lse=True, backend="fused")

    def spread(tensor):
        return torch.stack([tensor, tensor], 2)[:, :, 0]

    strided = tensors | {name: spread(tensors[name]) for name in ("query", "value")}
    expected, found = results(function, tensors, grads), results(function, strided, grads)
    assert len(used) == 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_a_bias_without_a_gradient_takes_the_plain_pass(used, device):
    query = torch.randn(1, 9, 9, 1, 8, device=device, requires_grad=True)
    rpb = torch.randn(1, 5, 5, device=device)
    na2d(query, query, query, 3, rpb=rpb, backend="fused").sum().backward()
    assert not used
