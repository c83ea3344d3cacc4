"""All gradients in one pass where a tile holds a dilation group, against the definition."""

import pytest
import torch
from oracle import Case, check, random_gradients, random_tensors, results

pytest.importorskip("triton")

from neighborhood_attention import na2d
from neighborhood_attention.backends.triton import fused_backward

pytestmark = pytest.mark.interpreter

ONE = {"batch": 1, "heads": 1, "head_dim": 8}
CASES = {
    "full window": Case((7, 8), (7, 8), **ONE),
    "groups of two lengths": Case((7, 5), (3, 2), dilation=(2, 2), batch=2, heads=2, head_dim=8),
    "stride, causal rows": Case((8, 6), (4, 3), stride=(2, 3), is_causal=(True, False), **ONE),
    "no bias, a value dimension of its own": Case(
        (5, 6), (3, 3), value_dim=16, rpb=False, batch=1, heads=1, head_dim=8
    ),
}
# What another pass must do.
OTHERS = {
    "grouped heads": Case((5, 6), (3, 3), batch=1, heads=2, key_heads=1, head_dim=8),
    "additional keys": Case((5, 6), (3, 3), additional=3, **ONE),
    "a longer group": Case((5, 9), (3, 3), **ONE),
}


@pytest.fixture
def used(monkeypatch):
    """The problems that were prepared for this pass."""
    found = []

    class Recorded(fused_backward.WholeGroupGradient):
        def __init__(self, problem, *others):
            super().__init__(problem, *others)
            found.append(problem)

    monkeypatch.setattr(fused_backward, "WholeGroupGradient", Recorded)
    fused_backward._prepare.cache_clear()
    yield found
    fused_backward._prepare.cache_clear()


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name, used, device):
    check(na2d, CASES[name], torch.float32, device, backend="fused")
    assert len(used) == 1


@pytest.mark.parametrize("name", OTHERS)
def test_other_problems_take_another_pass(name, used, device):
    check(na2d, OTHERS[name], torch.float32, device, backend="fused")
    assert not used


def test_inputs_of_unequal_strides_agree_with_equal_ones(used, device):
    case = Case((4, 5), (3, 3), **ONE)
    tensors = random_tensors(case.shapes(), torch.float32, device)
    grads = random_gradients(case, torch.float32, device)

    def function(**leaves):
        return na2d(**leaves, kernel_size=3, return_lse=True, backend="fused")

    strided = tensors | {"key": torch.stack([tensors["key"]] * 2, 2)[:, :, 1]}
    expected, found = results(function, tensors, grads), results(function, strided, grads)
    assert len(used) == 2
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)
