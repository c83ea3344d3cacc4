"""The operators as registered: what the compiler is told of the results is true."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nat_models.fused import ops

pytestmark = pytest.mark.interpreter
REGISTERED = torch.ops.nat_models
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
    for for_gradient in (False, True):
        arguments = maps[0], *branch, weight, bias, 1e-5, torch.float16, for_gradient
        torch.library.opcheck(REGISTERED.add_layer_norm, arguments, test_utils=TESTS)
    kept = maps[0].half(), torch.ones(2, 3, device=device)
    grads = maps[1], maps[2].half()
    dtypes = torch.float32, torch.float16 if has_branch else None
    arguments = *kept, *branch, weight, bias if has_branch else None, *grads, *dtypes
    torch.library.opcheck(REGISTERED.add_layer_norm_backward, arguments, test_utils=TESTS)


@pytest.mark.parametrize("with_hidden", [True, False], ids=["training", "inference"])
def test_linear_gelu(maps, device, with_hidden):
    x, weight = maps[0].half(), torch.randn(64, 32, device=device).half()
    bias = torch.randn(64, device=device).half()
    torch.library.opcheck(REGISTERED.linear_gelu, (x, weight, bias, with_hidden), test_utils=TESTS)


def test_gelu_linear_backward(device):
    grad, weight, hidden = (
        torch.randn(s, device=device).half() for s in [(5, 32), (32, 64), (5, 64)]
    )
    arguments = grad, weight, hidden
    torch.library.opcheck(REGISTERED.gelu_linear_backward, arguments, test_utils=TESTS)


def test_strided_tensors(maps, device):
    """A transposed map."""
    weight, bias = vectors(device)
    x = torch.randn(32, 6, device=device).T.view(2, 3, 32)
    settings = None, None, None, weight, bias, 1e-5, torch.float32, False
    _, strided, *_ = ops.add_layer_norm(x, *settings)
    _, contiguous, *_ = ops.add_layer_norm(x.contiguous(), *settings)
    assert torch.equal(strided, contiguous)


def test_the_dispatcher_is_used_where_something_looks_in_between(maps, device):
    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            seen.append(operator.name())
            return operator(*args, **(kwargs or {}))

    seen = []
    arguments = maps[0], None, None, None, *vectors(device), 1e-5, torch.float32, False
    expected = ops.add_layer_norm(*arguments)
    assert expected[0] is None
    with Names():
        actual = ops.add_layer_norm(*arguments)
    assert seen[0] == "nat_models::add_layer_norm"
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "everything"])
def test_small_linear(maps, device, is_alone):
    x, residual = maps[0].half(), torch.randn(2, 3, 64, device=device).half()
    weight = torch.randn(64, 32, device=device).half()
    bias, gamma = (torch.randn(64, device=device).half() for _ in range(2))
    arguments = (
        (None, None, None, 0.0, False, None, None)
        if is_alone
        else (bias, *vectors(device), 1e-5, True, gamma, residual)
    )
    torch.library.opcheck(REGISTERED.small_linear, (x, weight, *arguments), test_utils=TESTS)
