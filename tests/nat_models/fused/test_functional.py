"""The operations as PyTorch's users meet them: gradients, autocast, compilation."""

import pytest
import torch
from torch.nn import functional as F

from nat_models import fused

FUSED = pytest.mark.interpreter
CHANNELS, WIDTH = 32, 64


def tensors(device, dtype=torch.float32):
    def draw(*shape):
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    x, values = draw(2, 3, 5, CHANNELS), draw(2, 3, 5, CHANNELS)
    gamma, weight, bias = draw(CHANNELS), draw(CHANNELS), draw(CHANNELS)
    keep = torch.tensor([0.0, 2.0], device=device).to(dtype)
    return x, fused.Branch(values, gamma, keep), weight, bias


def definition(x, branch, weight, bias):
    if branch is not None:
        values, gamma, keep = branch
        x = x + values * (1 if gamma is None else gamma) * (
            1 if keep is None else keep.view(-1, 1, 1, 1)
        )
    return x, F.layer_norm(x, (CHANNELS,), weight, bias, 1e-5)


def gradients(outputs, leaves):
    """Of a weighted sum of all elements."""
    weights = [torch.arange(out.numel(), device=out.device).view_as(out).cos() for out in outputs]
    value = sum((out.float() * w).sum() for out, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(value, leaves)


def test_an_addition_alone_is_exact():
    x, branch, *_ = arguments = tensors("cpu", torch.float64)
    assert torch.equal(fused.add(x, None), x)
    assert torch.equal(fused.add(x, branch), definition(*arguments)[0])


@FUSED
@pytest.mark.parametrize("kind", ["scaled", "plain", "alone"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_add_layer_norm(device, kind, compiled):
    x, scaled, weight, bias = tensors(device)
    plain = fused.Branch(scaled.values)
    branch = {"scaled": scaled, "plain": plain, "alone": None}[kind]
    leaves = [x, weight, bias, *(t for t in (branch or ())[:2] if t is not None)]
    arguments = x, branch, weight, bias

    def function():
        return fused.add_layer_norm(*arguments, 1e-5)

    run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    outputs, expected = run(), definition(*arguments)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(
        gradients(outputs, leaves), gradients(expected, leaves), rtol=1e-4, atol=1e-4
    )
    with torch.no_grad():
        torch.testing.assert_close(function(), expected)


@FUSED
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_mlp(device, compiled):
    x = tensors(device, torch.float16)[0]
    weights = [torch.randn(shape, device=device) / 8 for shape in [(WIDTH, CHANNELS), (48, WIDTH)]]
    biases = [torch.randn(width, device=device) for width in (WIDTH, 48)]
    leaves = [
        x, *(t.half().requires_grad_() for pair in zip(weights, biases, strict=True) for t in pair)
    ]  # fmt: skip

    def function():
        return fused.mlp(*leaves)

    run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    x, weight1, bias1, weight2, bias2 = (t.double() for t in leaves)
    expected = F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)
    torch.testing.assert_close(run().double(), expected, rtol=5e-3, atol=5e-3)
    with torch.no_grad():
        torch.testing.assert_close(function().double(), expected, rtol=5e-3, atol=5e-3)
    wanted = gradients([expected], leaves)
    for actual, exact in zip(gradients([run()], leaves), wanted, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-2, atol=1e-2 * exact.abs().max().item())


@FUSED
def test_autocast(device):
    """A stream in fp32, branches in half precision; a norm in fp32, one for a branch in half."""
    x, branch, weight, bias = tensors(device)
    half = fused.Branch(branch.values.half(), *branch[1:])
    with torch.autocast(device, torch.float16):
        total, normalized = fused.add_layer_norm(x, half, weight, bias, 1e-5)
        alone = fused.layer_norm(half.values, weight, bias, 1e-5)
        weights = torch.randn(2, WIDTH, CHANNELS, device=device)
        output = fused.mlp(x, weights[0], x.new_zeros(WIDTH), weights[1].T, None)
    assert [t.dtype for t in (total, normalized)] == [torch.float32, torch.float16]
    assert [t.dtype for t in (alone, output)] == [torch.float32, torch.float16]
    expected = definition(x, half, weight, bias)
    torch.testing.assert_close(total, expected[0])
    torch.testing.assert_close(normalized.float(), expected[1], rtol=2e-3, atol=2e-3)


@FUSED
def test_second_derivative_is_refused(device):
    x, branch, weight, bias = tensors(device)
    _, normalized = fused.add_layer_norm(x, branch, weight, bias, 1e-5)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(normalized.sum(), x, create_graph=True)


@FUSED
def test_empty_batch(device):
    x, branch, weight, bias = tensors(device)
    none = fused.Branch(branch.values[:0], branch.gamma, branch.keep[:0])
    total, normalized = fused.add_layer_norm(x[:0], none, weight, bias, 1e-5)
    assert total.shape == normalized.shape == (0, 3, 5, CHANNELS)
    normalized.sum().backward()
    assert weight.grad.abs().max() == 0


@FUSED
def test_tensors_anywhere_in_memory(device):
    """An odd address, and a transposed weight: blocks are fetched at multiples of 16 bytes."""
    memory = torch.randn(6 * CHANNELS + 1, device=device).half()
    x, weight = memory[1:].view(6, CHANNELS), torch.randn(CHANNELS, WIDTH, device=device).half().T
    others = x.new_zeros(WIDTH), weight.T.contiguous(), None
    expected = fused.mlp(x.clone(), weight.contiguous(), *others)
    assert torch.equal(fused.mlp(x, weight, *others), expected)
