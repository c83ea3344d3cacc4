"""A linear layer of few rows, with what surrounds it, against the definition in fp64."""

from math import ceil

import pytest
import torch
from torch.nn import functional as F

small_linear = pytest.importorskip("nat_models.fused.kernels.small_linear")
Tile = small_linear.Tile

pytestmark = pytest.mark.interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WHOLE = {
    "whole": Tile(16, 32, 128, 4, 1),
    "whole, not overlapping": Tile(32, 64, 128, 4, 1, False),
}
TILES = WHOLE | {"steps": Tile(16, 32, 32, 4, 2)}
# Rows, K and N: whole blocks, and none of them.
SHAPES = {"whole": (32, 128, 64), "edges": (49, 80, 48)}
NORM, SCALE = ("norm_weight", "norm_bias"), ("gamma", "residual")
# What is there, and whether the GELU is taken: the four layers of a block, and others.
LAYERS = {
    "alone": ([], False),
    "norm": (["bias", *NORM], False),
    "norm and gelu": (["bias", *NORM], True),
    "norm without bias": (NORM, False),
    "residual": (["bias", "residual"], False),
    "scaled residual": (["bias", *SCALE], False),
    "everything": (["bias", *NORM, *SCALE], True),
}


def draw(rows, channels, width, names, dtype=torch.float16):
    """All tensors but the output, those missing None; the rows are far from their mean."""

    def tensor(name, *shape):
        present = name in ("x", "weight", *names)
        return torch.randn(shape, device=DEVICE).to(dtype) if present else None

    return {
        "x": 2 * tensor("x", rows, channels) + 3,
        "weight": tensor("weight", width, channels) / channels**0.5,
        "bias": tensor("bias", width),
        "norm_weight": tensor("norm_weight", channels),
        "norm_bias": tensor("norm_bias", channels),
        "gamma": tensor("gamma", width),
        "residual": tensor("residual", rows, width),
    }


def definition(x, weight, bias, norm_weight, norm_bias, gamma, residual, has_gelu):
    if norm_weight is not None:
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-5)
    x = F.linear(x, weight, bias)
    x = F.gelu(x) if has_gelu else x
    x = x if gamma is None else gamma * x
    return x if residual is None else residual + x


def run(tensors, has_gelu, tile=None):
    x, weight, bias, norm_weight, norm_bias, gamma, residual = tensors.values()
    output = x.new_full((len(x), len(weight)), torch.nan)
    norm = norm_weight, norm_bias, 1e-5
    small_linear.forward(x, weight, bias, *norm, has_gelu, gamma, residual, output, tile)
    return output


def check(rows, channels, width, layer, tile):
    names, has_gelu = layer
    tensors = draw(rows, channels, width, names)
    exact = {name: t if t is None else t.double() for name, t in tensors.items()}
    expected = definition(**exact, has_gelu=has_gelu)
    actual = run(tensors, has_gelu, tile).double()
    # A normalized row is rounded once before the product.
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tile", WHOLE.values(), ids=WHOLE)
def test_rows_in_one_block(tile, shape, layer):
    check(*shape, layer, tile)


@pytest.mark.parametrize("name", ["alone", "scaled residual"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
def test_steps(tile, shape, name):
    check(*shape, LAYERS[name], tile)


@pytest.mark.parametrize("shape", [(49, 512, 64), (196, 64, 192), (49, 1536, 32)], ids=str)
@pytest.mark.parametrize("name", ["norm and gelu", "scaled residual"])
def test_chosen_tiles(shape, name):
    if name == "scaled residual" or shape[1] <= small_linear.MAX_NORM_CHANNELS:
        check(*shape, LAYERS[name], None)


@pytest.mark.parametrize("channels", [32, 64, 96, 256, 384, 768, 1024])
@pytest.mark.parametrize("rows", [49, 196, 3136])
def test_chosen_tiles_hold_normalized_rows(rows, channels):
    for has_norm in (True, False):
        tile = small_linear.choose_tile(rows, channels, 3 * channels, has_norm)
        assert tile.channels >= channels or not has_norm
        assert min(tile.rows, tile.columns, tile.channels) >= 16  # tensor cores take no less
        assert max(tile.rows, tile.columns // 2) * tile.channels <= 2**14  # else registers spill


@pytest.mark.parametrize("width", [64, 256, 768, 1536])
@pytest.mark.parametrize("rows", [49, 196, 784, 3136, 8192])
def test_blocks_leave_enough_programs_and_not_too_many(rows, width):
    tile = small_linear.choose_tile(rows, 64, width, False)

    def programs(m, n):
        return ceil(rows / m) * ceil(width / n)

    least, most = small_linear.MIN_PROGRAMS, small_linear.MAX_PROGRAMS
    assert programs(16, tile.columns) >= least or tile.columns == 16
    assert programs(16, 2 * tile.columns) < least or tile.columns == 64
    assert programs(*tile[:2]) <= most or tile.rows == 64
    assert tile.rows == 16 or programs(tile.rows // 2, tile.columns) > most


def test_nothing_is_read_beyond_the_rows():
    """NaN around every tensor."""
    names, has_gelu = LAYERS["everything"]
    tensors = draw(49, 80, 48, names)
    expected = run(tensors, has_gelu)
    for name, tensor in tensors.items():
        memory = tensor.new_full((tensor.numel() + 64,), torch.nan)
        tensors[name] = memory[32:-32].view_as(tensor).copy_(tensor)
    assert torch.equal(run(tensors, has_gelu), expected)


@pytest.mark.parametrize("tile", [WHOLE["whole"], TILES["steps"]], ids=["whole", "steps"])
def test_launches_that_overlap_wait_for_what_they_read(tile):
    """Each takes what the one before has written, over memory that the one before read."""
    tensors = draw(49, 128, 128, ["bias", "residual"])
    maps = [tensors["residual"], torch.empty_like(tensors["residual"])]

    def chain(tile):
        maps[0].copy_(tensors["x"])
        for i in range(16):
            source, target = maps[i % 2], maps[1 - i % 2]
            norm = None, None, 0.0
            small_linear.forward(
                source, tensors["weight"], tensors["bias"], *norm, True, None, source, target, tile
            )
        return maps[0].clone()

    assert torch.equal(chain(tile), chain(tile._replace(overlaps=False)))
