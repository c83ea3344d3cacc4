"""The unfused kernels at real sizes, and whatever the interpreter cannot show: on a GPU alone."""

from functools import partial

import pytest
import torch
from oracle import Case, check, random_gradients, random_tensors, results

from neighborhood_attention import na1d, na2d, na2d_qkvpacked, na3d

pytestmark = pytest.mark.gpu
fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}

PROBLEMS = [
    Case((7, 7), (7, 7), batch=3, head_dim=32),
    Case((28, 28), (7, 7), head_dim=32),
    Case((56, 56), (7, 7), dilation=(8, 8), batch=1, head_dim=32),
    Case((24, 24), (13, 13), head_dim=32),
    Case((37, 40), (7, 5), dilation=(2, 3), head_dim=64),
    Case((19, 22), (5, 4), stride=(2, 3), is_causal=(True, False), head_dim=32),
    Case((19, 22), (5, 7), head_dim=20, value_dim=40),
    Case((19, 22), (5, 7), head_dim=256, rpb=False),
    Case((1000,), (63,), dilation=(3,), head_dim=64),
    Case((517,), (32,), stride=(5,), is_causal=(True,), head_dim=128),
    Case((700,), (255,), head_dim=16),
    Case((7, 9, 11), (3, 5, 4), dilation=(2, 1, 2), head_dim=32),
    Case((8, 9, 10), (7, 7, 7), head_dim=32),
    Case((8, 9, 10), (3, 4, 3), stride=(1, 3, 2), is_causal=(True, False, True)),
]


@pytest.fixture(params=["naive", "gemm"])
def backend(request):
    return request.param


@pytest.mark.parametrize("dtype", [fp16, bf16, fp32], ids=str)
@pytest.mark.parametrize("case", PROBLEMS, ids=str)
def test_agrees_with_the_definition(case, dtype, backend):
    check(FUNCTIONS[len(case.spatial)], case, dtype, "cuda", backend=backend)


@pytest.mark.parametrize("dtype", [bf16, fp32], ids=str)
def test_a_packed_projection_agrees_with_the_definition(dtype, backend):
    check(na2d_qkvpacked, Case((28, 14), (7, 7), head_dim=32), dtype, "cuda", backend=backend)


def test_agrees_with_the_definition_in_tf32(tf32, backend):
    check(na2d, Case((19, 22), (5, 7), head_dim=32), fp32, "cuda", tolerance=2e-3, backend=backend)


@pytest.mark.parametrize("dtype", [bf16, fp32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((56, 56), (7, 7), batch=8, head_dim=32),
        Case((3000,), (33,), head_dim=64),
        Case((9, 20, 21), (3, 5, 5), dilation=(1, 2, 2), head_dim=32),
    ],
    ids=str,
)
def test_equal_inputs_give_equal_bits(case, dtype, backend):
    tensors = random_tensors(case.shapes(), dtype, "cuda")
    grads = random_gradients(case, dtype, "cuda")
    function = FUNCTIONS[len(case.spatial)]
    function = partial(function, **case.settings, return_lse=True, backend=backend)
    first = results(function, tensors, grads)
    for _ in range(3):
        for name, found in results(function, tensors, grads).items():
            assert torch.equal(found, first[name]), name


def test_weights_beyond_2_31_elements_are_served(backend, much_memory):
    much_memory()
    case = Case((512, 512), (91, 91), batch=1, heads=1, rpb=False)
    tensors = random_tensors(case.shapes(), fp16, "cuda")
    grads = random_gradients(case, fp16, "cuda")
    function = partial(na2d, **case.settings, return_lse=True)
    expected = results(partial(function, backend="fused"), tensors, grads)
    for name, found in results(partial(function, backend=backend), tensors, grads).items():
        error = (found.double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error < 4e-3, name
