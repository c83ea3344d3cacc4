"""The model of the default experiment."""

import pytest
import timm
import torch
from torch.nn import functional as F

import nat_models  # noqa: F401  registers the models


@pytest.mark.parametrize("in_chans", [1, 3])
def test_maps_are_14_7_and_4_tokens_wide(in_chans):
    model = timm.create_model("nat_demo", in_chans=in_chans)
    images = torch.randn(2, in_chans, 28, 28)
    maps = model.forward_intermediates(images, intermediates_only=True)
    assert [m.shape[-2:] for m in maps] == [(14, 14), (7, 7), (4, 4)]
    assert model(images).shape == (2, 10)


def test_every_window_is_smaller_than_its_map():
    model = timm.create_model("nat_demo", device="meta")
    for side, level in zip((14, 7, 4), model.levels, strict=True):
        for block in level.blocks:
            kernel, dilation = block.attn.kernel_size[0], block.attn.dilation[0]
            assert 1 < kernel * dilation < side


def test_model_is_small_and_fit_for_every_backend():
    model = timm.create_model("nat_demo", device="meta")
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 300_000
    assert {block.attn.head_dim for level in model.levels for block in level.blocks} <= {16, 32, 64}


def test_config_describes_the_model():
    model = timm.create_model("nat_demo", device="meta")
    assert model.pretrained_cfg["input_size"] == (1, 28, 28)
    features = model.forward_features(torch.randn(1, 1, 28, 28, device="meta"))
    assert features.shape[1:3] == model.pretrained_cfg["pool_size"]
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("nat_demo", pretrained=True)


def test_model_learns_its_batch():
    model = timm.create_model("nat_demo")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, labels = torch.randn(10, 1, 28, 28), torch.arange(10)
    for _ in range(12):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(images).argmax(1) == labels).all()
