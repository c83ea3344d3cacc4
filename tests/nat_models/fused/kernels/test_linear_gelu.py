"""The product with GELU, and the GELU's gradient, against their definition in fp64."""

import pytest
import torch
from torch.nn import functional as F

linear_gelu = pytest.importorskip("nat_models.fused.kernels.linear_gelu")
from nat_models.fused.kernels.tiles import Tile, choose_tile  # noqa: E402

pytestmark = pytest.mark.interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = {
    f"{way}-{'descriptors' if descriptors else 'pointers'}": Tile(
        way, 64, 64, 64 if way == "rows" else 32, 4, 3, descriptors
    )
    for way in ("rows", "tiles", "persistent")
    for descriptors in (True, False)
}
# Rows, K and N: whole blocks, and none of them.
SHAPES = {"whole": (128, 64, 192), "edges": (75, 48, 96)}


@pytest.mark.parametrize("has_hidden", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_forward(tile, shape, has_hidden):
    rows, channels, width = shape
    x = torch.randn(rows, channels, device=DEVICE).half()
    weight = (torch.randn(width, channels, device=DEVICE) / channels**0.5).half()
    bias = torch.randn(width, device=DEVICE)
    output = torch.full((rows, width), torch.nan, device=DEVICE).half()
    hidden = output.clone() if has_hidden else None
    linear_gelu.forward(x, weight, bias, hidden, output, tile)
    expected = F.linear(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(output.double(), F.gelu(expected), rtol=1e-3, atol=1e-4)
    if has_hidden:
        torch.testing.assert_close(hidden.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_backward_of_two(tile, shape):
    rows, channels, width = shape
    grad = torch.randn(rows, channels, device=DEVICE).half()
    weight = (torch.randn(channels, width, device=DEVICE) / channels**0.5).half()
    hidden = torch.randn(rows, width, device=DEVICE).half()
    grad_hidden = torch.full_like(hidden, torch.nan)
    grad_bias = linear_gelu.backward_of_two(grad, weight, hidden, grad_hidden, tile)
    x = hidden.double().requires_grad_()
    F.gelu(x).backward(grad.double() @ weight.double())
    torch.testing.assert_close(grad_hidden.double(), x.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grad_bias.double(), x.grad.sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(75, 200), (32, 128)], ids=["edges", "whole"])
def test_backward(shape):
    hidden = torch.linspace(-8, 8, shape[0] * shape[1], device=DEVICE).view(shape)
    grad_output = torch.randn(shape, device=DEVICE)
    x = hidden.double().requires_grad_()
    F.gelu(x).backward(grad_output.double())
    grad_hidden = torch.full_like(hidden, torch.nan)
    grad_bias = linear_gelu.backward(hidden, grad_output, grad_hidden)
    torch.testing.assert_close(grad_hidden.double(), x.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_bias.double(), x.grad.sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [64, 96, 128, 192, 256, 384, 512, 768, 1536])
def test_tiles_fit_into_shared_memory(channels):
    for ratio in (2, 3, 4):
        tile = choose_tile(channels, ratio * channels)
        assert tile.way == "tiles" or tile.channels >= channels
        inputs = tile.stages * (tile.rows + tile.columns) * tile.channels
        if tile.way == "rows":
            inputs = (tile.rows + tile.stages * tile.columns) * tile.channels
        assert 2 * (inputs + 2 * tile.rows * tile.columns) < 227 * 1024
