"""The addressing that the kernels share, run by small kernels of its own."""

import itertools

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from neighborhood_attention.backends.triton.tiles import tile_axis  # noqa: E402
from neighborhood_attention.backends.triton.window import (  # noqa: E402
    locate_tile,
    masked_gradient,
    masked_scores,
    tile_type,
)

pytestmark = pytest.mark.interpreter


@triton.jit
def _locate(
    found, heads, row_tiles, column_tiles, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr
):
    batch, head, group_h, group_w, tile_h, tile_w = locate_tile(
        heads, row_tiles, column_tiles, DILATION_H, DILATION_W
    )
    found += tl.program_id(0) * 6
    tl.store(found, batch)
    tl.store(found + 1, head)
    tl.store(found + 2, group_h)
    tl.store(found + 3, group_w)
    tl.store(found + 4, tile_h)
    tl.store(found + 5, tile_w)


def test_each_tile_of_each_group_head_and_image_has_one_program(device):
    heads, rows, columns, dilation_h, dilation_w, images = 3, 2, 5, 2, 3, 2
    programs = heads * rows * columns * dilation_h * dilation_w * images
    found = torch.full((programs, 6), -1, device=device)
    _locate[(programs,)](found, heads, rows, columns, dilation_h, dilation_w)
    expected = itertools.product(
        *map(range, (images, heads, dilation_h, dilation_w, rows, columns))
    )
    assert sorted(map(tuple, found.tolist())) == sorted(expected)
    assert found[:heads, 1].tolist() == list(range(heads))  # neighbors in memory


@triton.jit
def _type(found, length, is_short, front, back, TILE: tl.constexpr):
    tile = tl.program_id(0)
    tl.store(found + tile, tile_type(tile, length, is_short, front, back, TILE))


@pytest.mark.parametrize(
    ("length", "kernel_size", "stride", "dilation"),
    [(56, 7, 1, 1), (61, 5, 2, 3), (20, 15, 1, 1), (23, 3, 3, 4)],
)
def test_types_are_numbered_from_the_front_to_the_back(
    length, kernel_size, stride, dilation, device
):
    axis = tile_axis(length, kernel_size, stride, dilation, False, 4, False)
    short = length % dilation > 0
    for is_short in range(1 + short):
        members = len(range(is_short * (dilation - 1), length, dilation))
        tiles = -(-members // 4)
        found = torch.full((tiles,), -1, device=device)
        _type[(tiles,)](found, members, is_short, axis.front, axis.back, 4)
        first = is_short * axis.types // axis.classes
        between = tiles - axis.front - axis.back
        last = first + axis.front + 1
        expected = [
            *range(first, first + min(axis.front, tiles)),
            *[first + axis.front] * between,
            *range(last, last + axis.back),
        ]
        assert found.tolist() == expected


@triton.jit
def _mask(dots, bias, scores, gradients):
    i = tl.arange(0, 4)
    d, b = tl.load(dots + i), tl.load(bias + i)
    tl.store(scores + i, masked_scores(d, 0.5, b))
    tl.store(gradients + i, masked_gradient(tl.exp2(b), d, b, 1.0))


def test_what_overflows_outside_the_window_is_masked(device):
    inf = float("inf")
    dots = torch.tensor([2.0, inf, -inf, torch.nan], device=device)
    bias = torch.tensor([1.0, -inf, -inf, -inf], device=device)
    scores, gradients = torch.empty_like(dots), torch.empty_like(dots)
    _mask[(1,)](dots, bias, scores, gradients)
    assert scores[0].item() == pytest.approx(2 * 0.5 * 1.4426950408889634 + 1)
    assert scores[1:].tolist() == [-inf] * 3
    assert gradients.tolist() == [2.0, 0.0, 0.0, 0.0]
