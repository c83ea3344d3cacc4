"""The gradient of additional keys and values, which all queries of an image add to."""

import pytest
import torch
from oracle import Case, check, random_gradients, random_tensors, results

pytest.importorskip("triton")

from neighborhood_attention import na1d, na2d, na3d
from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.triton import fused_additional_gradient, fused_backward
from neighborhood_attention.backends.triton.launch import Problem, describe

pytestmark = pytest.mark.interpreter
FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
ONE = {"batch": 1, "heads": 1, "head_dim": 8, "rpb": False}


@pytest.fixture
def shares(monkeypatch):
    """Shares of 32 queries instead of 1024."""
    monkeypatch.setattr(fused_additional_gradient, "SHARE", 32)
    fused_backward._prepare.cache_clear()
    yield
    fused_backward._prepare.cache_clear()


CASES = {
    "a share that is not full": Case((45,), (3,), **ONE, additional=1),
    "two blocks of keys": Case((3, 12), (3, 3), **ONE, additional=33),
    "grouped heads, two images": Case(
        (2, 3, 6), (1, 2, 2), heads=2, key_heads=1, head_dim=8, additional=2, rpb=False
    ),
    "small values": Case((34,), (3,), heads=2, batch=1, value_dim=20, head_dim=40, additional=4),
}


@pytest.mark.parametrize("name", CASES)
def test_shares_add_up_to_the_definition(name, shares, device):
    case = CASES[name]
    check(FUNCTIONS[len(case.spatial)], case, torch.float32, device, backend="fused")


def test_either_gradient_alone_is_what_it_is_with_the_other(device):
    case = Case((9,), (3,), **ONE, additional=3)
    tensors = random_tensors(case.shapes(), torch.float32, device)
    grads = random_gradients(case, torch.float32, device)

    def function(**tensors):
        return na1d(**tensors, **case.settings, return_lse=True, backend="fused")

    both = results(function, tensors, grads)
    for name in ("additional_keys", "additional_values"):
        one = tensors | {name: tensors[name].detach().requires_grad_()}
        found = torch.autograd.grad(function(**one), one[name], grads)
        assert torch.equal(found[0], both[f"grad_{name}"])


def test_many_keys_and_queries_take_few_partial_sums():
    query, keys = (torch.empty(1, n, 4, 16, device="meta") for n in (2**20, 2**12))
    problem = Problem.of(describe(Inputs(query, query, query, None, keys, keys)))
    settings = problem.head_arguments | problem.additional_arguments | problem.map_arguments()
    settings |= {"scale": 1.0, "grad_output_strides": settings["query_strides"]}
    gradient = fused_additional_gradient.AdditionalGradient(problem, 2**12, settings)
    assert gradient._shares == 4  # 512 blocks of keys already keep the GPU busy
