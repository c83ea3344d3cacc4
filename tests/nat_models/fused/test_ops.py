"""The operators as registered: what the compiler is told of the results is true."""

import pytest
import torch

from nat_models.fused import ops

pytestmark = pytest.mark.interpreter
TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")


@pytest.fixture
def maps(device):
    return [torch.randn(2, 3, 32, device=device) for _ in range(3)]


def vectors(device):
    return [torch.randn(32, device=device) for _ in range(2)]


@pytest.mark.parametrize("has_branch", [True, False], ids=["branch", "alone"])
def test_add_layer_norm(maps, device, has_branch):
    weight, bias = vectors(device)
    branch = (maps[1].half(), bias, torch.ones(2, device=device)) if has_branch else (None,) * 3
    arguments = maps[0], *branch, weight, bias, 1e-5, torch.float16
    torch.library.opcheck(ops.add_layer_norm, arguments, test_utils=TESTS)
    grads = maps[1], maps[2].half()
    dtypes = torch.float32, torch.float16 if has_branch else None
    arguments = maps[0], *branch, weight, 1e-5, *grads, *dtypes
    torch.library.opcheck(ops.add_layer_norm_backward, arguments, test_utils=TESTS)


@pytest.mark.parametrize("with_hidden", [True, False], ids=["training", "inference"])
def test_linear_gelu(maps, device, with_hidden):
    x, weight = maps[0].half(), torch.randn(64, 32, device=device).half()
    bias = torch.randn(64, device=device).half()
    torch.library.opcheck(ops.linear_gelu, (x, weight, bias, with_hidden), test_utils=TESTS)


def test_gelu_backward(maps):
    torch.library.opcheck(ops.gelu_backward, (maps[0], maps[1]), test_utils=TESTS)


def test_gelu_linear_backward(device):
    grad, weight, hidden = (
        torch.randn(s, device=device).half() for s in [(5, 32), (32, 64), (5, 64)]
    )
    arguments = grad, weight, hidden
    torch.library.opcheck(ops.gelu_linear_backward, arguments, test_utils=TESTS)


def test_strided_tensors(maps, device):
    """A transposed map, an expanded gradient."""
    weight, bias = vectors(device)
    x = torch.randn(32, 6, device=device).T.view(2, 3, 32)
    settings = None, None, None, weight, bias, 1e-5, torch.float32
    for strided, contiguous in zip(
        ops.add_layer_norm(x, *settings), ops.add_layer_norm(x.contiguous(), *settings), strict=True
    ):
        assert torch.equal(strided, contiguous)
    ones = torch.ones((), device=device).expand(2, 3, 32)
    for strided, contiguous in zip(
        ops.gelu_backward(x.contiguous(), ones),
        ops.gelu_backward(x.contiguous(), ones.contiguous()),
        strict=True,
    ):
        assert torch.equal(strided, contiguous)
