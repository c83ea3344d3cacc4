import numpy as np
import pytest
import torch

import nat_models
from nat_models import viz


@pytest.fixture
def model():
    return nat_models.create_model("nat_demo").eval()


def test_curves_show_every_series_from_epoch_one():
    epochs = [
        {"train/loss": 2.0 / i, "val/loss": 1.0 / i, "val/top1": 1 - 0.5 / i, "val/top5": 1.0}
        for i in (1, 2, 3)
    ]
    loss, accuracy = viz.curves(epochs).axes
    shown = {
        line.get_label(): line.get_xydata() for axes in (loss, accuracy) for line in axes.lines
    }
    assert set(shown) == {"training (augmented, smoothed)", "held out", "top-1", "top-5"}
    np.testing.assert_allclose(
        shown["training (augmented, smoothed)"], [(1, 2), (2, 1), (3, 2 / 3)]
    )
    np.testing.assert_allclose(shown["top-1"][:, 1], [50, 75, 100 - 50 / 3])
    assert viz.curves([{"train/loss": 1.0, "seconds": 1.0}]).axes[1].lines[:] == []


def test_neighborhoods_show_each_query_in_each_head(model):
    image, picture = torch.randn(1, 28, 28), np.zeros((28, 28), np.uint8)
    figure = viz.neighborhoods(model, image, picture, positions=[(0, 0), (6, 7)])
    attention = model.levels[0].blocks[-1].attn
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2 * (attention.num_heads + 1)
    assert [axes.get_ylabel() for axes in figure.axes[:4:3]] == ["query (0, 0)", "query (6, 7)"]

    heat = np.asarray(figure.axes[1].images[1].get_array())
    k = attention.kernel_size[0]
    assert heat.sum() == pytest.approx(1.0, abs=1e-5)
    assert np.array_equal(
        heat > 0, np.pad(np.ones((k, k), bool), (0, 14 - k))
    )  # moved inside the border


def test_maps_are_the_attention_that_the_layer_uses(model):
    """With values that name their position, the layer's output is the map itself."""
    attention = model.levels[1].blocks[0].attn
    x = torch.randn(1, 7, 7, 64)
    head = 0
    maps = viz._maps(attention, x, [(2, 5)])
    heads, dim = attention.num_heads, attention.head_dim
    outputs = torch.zeros(49)
    with torch.no_grad():
        attention.proj.weight.copy_(torch.eye(64))
        attention.proj.bias.zero_()
        qkv = attention.qkv(x).view(1, 7, 7, 3, heads, dim)
        for start in range(0, 49, dim):
            one_hot = torch.zeros(49, dim)
            chunk = range(start, min(49, start + dim))
            one_hot[list(chunk), [i - start for i in chunk]] = 1.0
            qkv[:, :, :, 2] = one_hot.view(1, 7, 7, 1, dim)
            attention.qkv.forward = lambda _, qkv=qkv: qkv.flatten(3)
            out = attention(x)[0, 2, 5].view(heads, dim)[head]
            outputs[list(chunk)] = out[: len(chunk)]
    torch.testing.assert_close(maps[head, 0].flatten(), outputs)


def test_small_maps_are_padded_as_the_layer_pads_them():
    model = nat_models.create_model("nat_demo").eval()
    picture = np.zeros((12, 12, 3), np.uint8)
    figure = viz.neighborhoods(
        model, torch.randn(1, 12, 12), picture, layer="levels.2.blocks.0.attn"
    )
    assert "on a 2x2 map" in figure.get_suptitle()


def test_training_mode_and_hooks_are_as_before(model):
    model.train()
    viz.neighborhoods(model, torch.randn(1, 28, 28), np.zeros((28, 28), np.uint8))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_compiled_models_are_looked_into(model):
    image, picture = torch.randn(1, 28, 28), np.zeros((28, 28), np.uint8)
    model.compile(backend="eager")
    with torch.no_grad():
        model(image[None])
    assert "on a 14x14 map" in viz.neighborhoods(model, image, picture).get_suptitle()


def test_layer_that_is_not_there(model):
    picture = np.zeros((28, 28), np.uint8)
    with pytest.raises(
        ValueError, match=r"layer='head': expected one of \['levels\.0\.blocks\.0\.attn'"
    ):
        viz.neighborhoods(model, torch.randn(1, 28, 28), picture, layer="head")
    with pytest.raises(ValueError, match="has no NeighborhoodAttention2D"):
        viz.neighborhoods(torch.nn.Identity(), torch.randn(1, 28, 28), picture)
