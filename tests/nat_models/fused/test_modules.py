"""Modules in the place of PyTorch's and timm's: the same parameters, the same results."""

import pytest
import timm
import torch
from torch import nn

from nat_models import fused

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
