"""The product with GELU, and the GELU's gradient, against their definition in fp64."""

import pytest
import torch
from torch.nn import functional as F

linear_gelu = pytest.importorskip("nat_models.fused.kernels.linear_gelu")
Tile = linear_gelu.Tile

pytestmark = pytest.mark.interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILES = {
    "rows": Tile("rows", 64, 64, 64, 4, 3),
    "tiles": Tile("tiles", 64, 64, 32, 4, 3),
    "persistent": Tile("persistent", 64, 64, 32, 4, 3, 1),
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
def test_backward(tile, shape):
    rows, channels, width = shape
    grad = torch.randn(rows, channels, device=DEVICE).half()
    weight = (torch.randn(channels, width, device=DEVICE) / channels**0.5).half()
    hidden = torch.randn(rows, width, device=DEVICE).half()
    grad_hidden, activated = (torch.full_like(hidden, torch.nan) for _ in range(2))
    grad_bias = linear_gelu.backward(grad, weight, hidden, grad_hidden, activated, tile)
    x = hidden.double().requires_grad_()
    expected = F.gelu(x)
    expected.backward(grad.double() @ weight.double())
    torch.testing.assert_close(activated.double(), expected.detach(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grad_hidden.double(), x.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(grad_bias.double(), x.grad.sum(0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("channels", [32, 64, 96, 512, 1536])
@pytest.mark.parametrize("is_gradient", [False, True], ids=["forward", "gradient"])
def test_chosen_tiles_take_the_layer(channels, is_gradient):
    tile = linear_gelu.choose_tile(channels, is_gradient)
    assert tile.way != "rows" or tile.channels >= channels
    assert (tile.resident > 0) == (tile.way == "persistent")
