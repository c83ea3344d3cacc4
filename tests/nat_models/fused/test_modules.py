"""Modules in the place of PyTorch's and timm's: the same parameters, the same results."""

from copy import deepcopy

import pytest
import timm
import torch
from torch import nn

from nat_models import fused
from nat_models.models.layers import neighborhood_attention_block

X = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(1))


def pair(name, device="cpu"):
    """A fused module, and the one that it replaces, with the same parameters."""
    if name == "LayerNorm":
        ours, theirs = fused.LayerNorm(32), nn.LayerNorm(32)
        nn.init.normal_(theirs.weight)
    else:
        ours, theirs = fused.Mlp(32, 64), timm.layers.Mlp(32, 64)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(device), theirs.to(device)


@pytest.mark.parametrize("name", ["LayerNorm", "Mlp"])
def test_composition_is_exact(name):
    ours, theirs = pair(name)
    assert isinstance(ours, type(theirs))
    assert torch.equal(ours(X), theirs(X))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["LayerNorm", "Mlp"])
def test_fused(name, device):
    ours, theirs = pair(name, device)
    x = X.half().to(device)
    with torch.no_grad():
        torch.testing.assert_close(ours.half()(x), theirs.half()(x), rtol=5e-3, atol=2e-3)


@pytest.mark.interpreter
def test_fused_block(device):
    """Mixed precision against fp64: the result and the gradients of all parameters."""
    torch.manual_seed(0)
    block = neighborhood_attention_block(32, 2, kernel_size=3, layer_scale=0.5).to(device)
    exact = deepcopy(block).double()
    x = X.to(device).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    with torch.autocast(device, torch.float16):
        assert block.is_fused(x)
        assert block.mlp.is_fused(x)
        output = block(x)
    expected = exact(x64)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected, rtol=2e-3, atol=2e-3)
    output.cos().sum().backward()
    expected.cos().sum().backward()
    pairs = zip([x, *block.parameters()], [x64, *exact.parameters()], strict=True)
    for ours, theirs in pairs:
        assert ours.grad.dtype == torch.float32
        tolerance = 1e-2 * theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-2, atol=tolerance)


@pytest.mark.interpreter
@pytest.mark.parametrize("part", ["fc1", "act"])
def test_hooks_are_called(device, part):
    mlp, _ = pair("Mlp", device)
    called = []
    getattr(mlp, part).register_forward_hook(lambda *_: called.append(part))
    mlp.half()(X.half().to(device))
    assert called == [part]


def test_observed_modules_are_found():
    module = nn.Linear(2, 2)
    assert not fused.is_observed(module)
    handle = module.register_forward_pre_hook(lambda *_: None)
    assert fused.is_observed(module)
    handle.remove()
    assert not fused.is_observed(module)
    module.compile()
    assert fused.is_observed(module)


@pytest.mark.interpreter
def test_transforms_take_the_composition(device):
    norm, _ = pair("LayerNorm", device)
    x = X.to(device)
    torch.testing.assert_close(torch.func.vmap(norm)(x), norm(x))


@pytest.mark.interpreter
@pytest.mark.parametrize("activation", [nn.GELU("tanh"), nn.ReLU()], ids=["tanh", "relu"])
def test_other_activations_are_left_alone(device, activation):
    ours, theirs = pair("Mlp", device)
    ours.act = theirs.act = activation
    x = X.half().to(device)
    assert torch.equal(ours.half()(x), theirs.half()(x))
