"""What both unfused backends promise; their kernels: `test_naive.py`, `test_gemm.py`."""

from functools import partial

import pytest
import torch
from oracle import Case, check, random_gradients, random_tensors, results

from neighborhood_attention import NeighborhoodAttention2D, na1d, na2d, na3d
from neighborhood_attention.backends import Inputs, choose
from neighborhood_attention.geometry import Neighborhood

pytestmark = pytest.mark.interpreter

NATIVE = torch.cuda.is_available()
fp32, fp16 = torch.float32, torch.float16
FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
ONE = {"batch": 1, "heads": 1}
CASES = {
    "groups of two lengths": Case((5, 4), (2, 2), dilation=(2, 1), **ONE),
    "stride, causal rows": Case((5, 7), (4, 3), stride=(2, 3), is_causal=(True, False), **ONE),
    "stride, causal columns": Case((2, 7), (1, 3), (1, 2), (1, 2), (False, True), **ONE),
    "causal volume": Case((3, 2, 3), (2, 1, 2), is_causal=(True, False, False), **ONE),
    "small heads": Case((5,), (3,), batch=1, head_dim=8, value_dim=20),
    "large values": Case((5,), (3,), **ONE, value_dim=40, rpb=False),
    "axes of length 1": Case((1, 3), (1, 3), **ONE),
    "a window of one token": Case((3, 2), (1, 1), **ONE),
}


@pytest.fixture(params=["naive", "gemm"])
def backend(request):
    return request.param


def function_of(case, backend):
    """The function of this case's tensors alone."""
    function = FUNCTIONS[len(case.spatial)]
    return partial(function, **case.settings, return_lse=True, backend=backend)


# The interpreter computes bf16 wrongly.
@pytest.mark.parametrize("dtype", [fp32] + [torch.bfloat16] * NATIVE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name, dtype, backend, device):
    case = CASES[name]
    check(FUNCTIONS[len(case.spatial)], case, dtype, device, backend=backend)


def test_agrees_with_the_definition_in_fp16(backend, device):
    check(na2d, CASES["axes of length 1"], fp16, device, backend=backend)


def test_memory_around_views_of_any_strides_changes_nothing(backend, device):
    case = Case((2, 3), (2, 3), **ONE, head_dim=20)
    tensors = random_tensors(case.shapes(), fp32, device)
    grads = random_gradients(case, fp32, device)
    expected = results(function_of(case, backend), tensors, grads)

    def surrounded(tensor):
        larger = torch.full([n + 3 for n in tensor.shape], torch.nan, device=device)
        return larger[(slice(1, -2),) * tensor.dim()].copy_(tensor)

    def turned(tensor):  # the last axis is not the contiguous one
        return surrounded(tensor.mT.contiguous()).mT

    for changed in (surrounded, turned):
        views = {name: changed(tensor) for name, tensor in tensors.items()}
        found = results(function_of(case, backend), views, list(map(changed, grads)))
        for name in expected:
            assert torch.equal(found[name], expected[name]), name


def test_tokens_outside_a_window_however_large_change_nothing(backend, device):
    case = Case((6,), (3,), **ONE)
    tensors = random_tensors(case.shapes(), fp32, device)
    grads = random_gradients(case, fp32, device)
    for tensor in (tensors["query"], *grads):
        tensor[:, 2:] = 0  # of what sees the keys from 3 on
    grads[0].mul_(1024)  # products with large values overflow
    huge = {name: tensor.clone() for name, tensor in tensors.items()}
    huge["key"][:, 3:] = torch.finfo(fp32).max / 4
    huge["value"][:, 3:] = torch.finfo(fp32).max / 1024
    expected = results(function_of(case, backend), tensors, grads)
    found = results(function_of(case, backend), huge, grads)
    for name in expected:
        count = 2 if name in ("output", "lse") else None
        assert torch.equal(found[name][:, :count], expected[name][:, :count]), name
    assert not found["grad_key"][:, 3:].any()
    assert not found["grad_value"][:, 3:].any()


def test_scores_that_are_not_finite_are_not_hidden(backend, device):
    case = Case((8,), (3,), **ONE, rpb=False)
    tensors = {n: torch.ones(s, device=device) for n, s in case.shapes().items()}
    tensors["key"][:, 4] = torch.nan
    output, lse = function_of(case, backend)(**tensors)
    for result in (output, lse):
        broken = ~result.view(8, -1).isfinite().all(-1)
        assert broken.nonzero().flatten().tolist() == [3, 4, 5]


def test_an_empty_batch_has_empty_results_and_no_gradient(backend, device):
    case = Case((5,), (3,), batch=0)
    tensors = random_tensors(case.shapes(), fp32, device)
    found = results(function_of(case, backend), tensors, random_gradients(case, fp32, device))
    assert found["output"].shape == (0, 5, 2, 16)
    assert not found["grad_rpb"].any()


def test_equal_inputs_give_equal_bits(backend, device):
    case = Case((5,), (3,), **ONE)
    tensors = random_tensors(case.shapes(), fp32, device)
    grads = random_gradients(case, fp32, device)
    first, second = (results(function_of(case, backend), tensors, grads) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_module_runs_on_it(backend, device):
    module = NeighborhoodAttention2D(16, 1, 3, rel_pos_bias=True, backend=backend).to(device)
    x = torch.randn(1, 3, 4, 16, device=device)
    found = module(x)
    module.backend = "reference"
    torch.testing.assert_close(found, module(x))


@pytest.mark.parametrize(
    ("case", "dtype", "message"),
    [
        (Case((5,), (3,), heads=2, key_heads=1), fp32, "grouped heads"),
        (Case((5,), (3,), additional=2), fp32, "additional keys"),
        (Case((2**15 + 1,), (2**15 + 1,), **ONE, rpb=False), fp32, "up to 32768 keys, not 32769"),
        (Case((5,), (3,), head_dim=257), fp32, "head dimensions up to 256, not 257"),
        (Case((5,), (3,)), torch.float64, "float64; use backend='reference'"),
    ],
    ids=["grouped heads", "additional keys", "window", "head dimension", "dtype"],
)
def test_it_names_what_it_does_not_support(case, dtype, message, backend, device):
    tensors = random_tensors(case.shapes(), dtype, device)
    with pytest.raises(NotImplementedError, match=f"backend='{backend}' .*{message}"):
        function_of(case, backend)(**tensors)


def test_it_is_never_chosen_by_itself(device):
    window = Neighborhood((3,), (1,), (1,), (False,))
    for dtype in (fp32, torch.float64):  # fused serves the first alone
        x = torch.ones(1, 5, 1, 16, dtype=dtype, device=device)
        chosen = choose(None, Inputs(x, x, x), window).__name__
        assert chosen.rpartition(".")[2] in ("fused", "reference")
