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
    return x, fused.Branch(values, gamma, keep), fused.Norm(weight, bias, 1e-5)


def draw_layers(device):
    """Weights and biases of an MLP, CHANNELS -> WIDTH -> 48, in fp16."""
    shapes = (WIDTH, CHANNELS), (WIDTH,), (48, WIDTH), (48,)
    return [
        (torch.randn(shape, device=device) / (8 if len(shape) > 1 else 1)).half().requires_grad_()
        for shape in shapes
    ]


def definition(x, branch, norm):
    if branch is not None:
        values, gamma, keep = branch
        x = x + values * (1 if gamma is None else gamma) * (
            1 if keep is None else keep.view(-1, 1, 1, 1)
        )
    return x, F.layer_norm(x, (CHANNELS,), *norm)


def mlp_definition(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def gradients(outputs, leaves):
    """Of a weighted sum of all elements."""
    weights = [torch.arange(out.numel(), device=out.device).view_as(out).cos() for out in outputs]
    value = sum((out.float() * w).sum() for out, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(value, leaves)


def run(function, compiled, backend="aot_eager"):
    if compiled:
        function = torch.compile(function, fullgraph=True, backend=backend)
    return function()


def assert_gradients_close(outputs, expected, leaves):
    """In half precision."""
    pairs = zip(gradients(outputs, leaves), gradients(expected, leaves), leaves, strict=True)
    for actual, exact, leaf in pairs:
        assert actual.dtype == leaf.dtype
        tolerance = 1e-2 * exact.abs().max().item()
        torch.testing.assert_close(actual.double(), exact.double(), rtol=1e-2, atol=tolerance)


def test_an_addition_alone_is_exact():
    x, branch, *_ = arguments = tensors("cpu", torch.float64)
    assert torch.equal(fused.add(x, None), x)
    assert torch.equal(fused.add(x, branch), definition(*arguments)[0])


@FUSED
@pytest.mark.parametrize("kind", ["scaled", "plain", "alone"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_add_layer_norm(device, kind, compiled):
    x, scaled, norm = tensors(device)
    branch = {"scaled": scaled, "plain": fused.Branch(scaled.values), "alone": None}[kind]
    leaves = [x, *norm[:2], *(t for t in (branch or ())[:2] if t is not None)]

    def function():
        return fused.add_layer_norm(x, branch, norm)

    outputs, expected = run(function, compiled), definition(x, branch, norm)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(
        gradients(outputs, leaves), gradients(expected, leaves), rtol=1e-4, atol=1e-4
    )
    with torch.no_grad():
        torch.testing.assert_close(function(), expected)


@FUSED
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_mlp(device, compiled):
    leaves = [tensors(device, torch.float16)[0], *draw_layers(device)]

    def function():
        return fused.mlp(*leaves)

    expected = mlp_definition(*(t.double() for t in leaves))
    torch.testing.assert_close(run(function, compiled).double(), expected, rtol=5e-3, atol=5e-3)
    with torch.no_grad():
        torch.testing.assert_close(function().double(), expected, rtol=5e-3, atol=5e-3)
    assert_gradients_close([run(function, compiled)], [expected], leaves)


@FUSED
@pytest.mark.parametrize("precision", ["half", "autocast"])
@pytest.mark.parametrize("operation", ["linear", "mlp"])
@pytest.mark.parametrize("kind", ["scaled", "alone"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_layers_after_a_norm(device, precision, operation, kind, compiled):
    is_cast = precision == "autocast"
    x, branch, norm = tensors(device, torch.float32 if is_cast else torch.float16)
    if kind == "alone":
        branch = None
    layers = draw_layers(device)[: 4 if operation == "mlp" else 2]
    if is_cast:
        layers = [t.detach().float().requires_grad_() for t in layers]
    leaves = [x, *norm[:2], *layers, *(t for t in (branch or ())[:2])]
    ours = fused.add_norm_mlp if operation == "mlp" else fused.add_norm_linear
    theirs = mlp_definition if operation == "mlp" else F.linear

    def function():
        with torch.autocast(device, torch.float16, enabled=is_cast):
            return ours(x, branch, norm, *layers)

    exact = fused.Norm(norm.weight.double(), norm.bias.double(), norm.eps)
    in_double = branch and fused.Branch(*(t.double() for t in branch))
    total, normalized = definition(x.double(), in_double, exact)
    expected = [total, theirs(normalized, *(t.double() for t in layers))]
    outputs = run(function, compiled)
    assert outputs[0].dtype == x.dtype
    assert outputs[1].dtype == torch.float16
    with torch.no_grad():
        assert all(map(torch.equal, function(), outputs))
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=5e-3, atol=1e-2)
    assert_gradients_close(outputs, expected, leaves)


@FUSED
@pytest.mark.parametrize("operation", ["linear", "mlp"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_neither_sums_nor_norms_are_kept(device, operation, compiled):
    """What is kept has the norm's number of elements once, for its backward."""
    x, branch, norm = tensors(device)
    layers = [t.detach().float().requires_grad_() for t in draw_layers(device)]
    kept = []

    def function():
        with torch.autocast(device, torch.float16):
            if operation == "mlp":
                return fused.add_norm_mlp(x, fused.Branch(branch.values), norm, *layers)
            return fused.add_norm_linear(x, fused.Branch(branch.values), norm, *layers[:2])

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(function, compiled, "aot_eager_decomp_partition")
    assert [t.dtype for t in kept if t.numel() == x.numel()] == [torch.float16]


@FUSED
@pytest.mark.parametrize("frozen", ["norm", "layers", "input"])
@pytest.mark.parametrize("operation", ["linear", "mlp"])
def test_frozen_parts(device, operation, frozen):
    """Gradients of the others are the same as ever."""
    x, branch, norm = tensors(device, torch.float16)
    layers = draw_layers(device)[: 4 if operation == "mlp" else 2]
    function = fused.add_norm_mlp if operation == "mlp" else fused.add_norm_linear
    parts = {"norm": norm[:2], "layers": layers, "input": [x, *branch[:2]]}
    wanted = {
        name: gradients(function(x, branch, norm, *layers), part) for name, part in parts.items()
    }
    for tensor in parts.pop(frozen):
        tensor.requires_grad_(False)
    for name, part in parts.items():
        actual = gradients(function(x, branch, norm, *layers), part)
        assert all(map(torch.equal, actual, wanted[name]))


@FUSED
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_small_linear(device, compiled):
    """As the four layers of a block, and on a strided map."""
    x, branch, norm = tensors(device, torch.float16)
    residual, gamma, _ = branch
    first = torch.randn(WIDTH, CHANNELS, device=device).half() / 8
    second = torch.randn(CHANNELS, WIDTH, device=device).half() / 8
    shift = torch.randn(WIDTH, device=device).half()

    def function(x):
        hidden = fused.small_linear(x, first, shift, norm, has_gelu=True)
        return fused.small_linear(hidden, second, None, gamma=gamma, residual=residual)

    run = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    with torch.no_grad():
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
        outputs = [run(x), run(strided)]
    hidden = F.layer_norm(x.double(), (CHANNELS,), norm.weight.double(), norm.bias.double())
    hidden = F.gelu(F.linear(hidden, first.double(), shift.double()))
    expected = residual.double() + gamma.double() * F.linear(hidden, second.double())
    for output in outputs:
        torch.testing.assert_close(output.double(), expected, rtol=5e-3, atol=5e-3)


@FUSED
def test_autocast(device):
    """A stream in fp32, branches in half precision; a norm in fp32, one for a branch in half."""
    x, branch, norm = tensors(device)
    half = fused.Branch(branch.values.half(), *branch[1:])
    with torch.autocast(device, torch.float16):
        total, normalized = fused.add_layer_norm(x, half, norm)
        alone = fused.layer_norm(half.values, norm)
        weights = torch.randn(2, WIDTH, CHANNELS, device=device)
        output = fused.mlp(x, weights[0], x.new_zeros(WIDTH), weights[1].T, None)
    assert [t.dtype for t in (total, normalized)] == [torch.float32, torch.float16]
    assert [t.dtype for t in (alone, output)] == [torch.float32, torch.float16]
    expected = definition(x, half, norm)
    torch.testing.assert_close(total, expected[0])
    torch.testing.assert_close(normalized.float(), expected[1], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
def test_a_weight_of_another_dtype_is_refused(requires_grad):
    x, weight = torch.ones(2, 16).half(), torch.ones(16, 16, requires_grad=requires_grad)
    norm = fused.Norm(torch.ones(16).half(), torch.zeros(16).half(), 1e-5)
    with pytest.raises(TypeError, match=r"weight: .* torch\.float16, got torch\.float32"):
        fused.add_norm_linear(x, None, norm, weight, None)


@FUSED
def test_second_derivative_is_refused(device):
    x, branch, norm = tensors(device)
    _, normalized = fused.add_layer_norm(x, branch, norm)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(normalized.sum(), x, create_graph=True)


@FUSED
def test_empty_batch(device):
    x, branch, norm = tensors(device)
    none = fused.Branch(branch.values[:0], branch.gamma, branch.keep[:0])
    total, normalized = fused.add_layer_norm(x[:0], none, norm)
    assert total.shape == normalized.shape == (0, 3, 5, CHANNELS)
    normalized.sum().backward()
    assert norm.weight.grad.abs().max() == 0


@FUSED
def test_tensors_anywhere_in_memory(device):
    """An odd address, and a transposed weight: blocks are fetched at multiples of 16 bytes."""
    memory = torch.randn(6 * CHANNELS + 1, device=device).half()
    x, weight = memory[1:].view(6, CHANNELS), torch.randn(CHANNELS, WIDTH, device=device).half().T
    others = x.new_zeros(WIDTH), weight.T.contiguous(), None
    expected = fused.mlp(x.clone(), weight.contiguous(), *others)
    assert torch.equal(fused.mlp(x, weight, *others), expected)
