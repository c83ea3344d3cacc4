"""What the kernels share: the geometry, compiled from `geometry.py`, and addresses of tokens."""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from neighborhood_attention import geometry


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = triton.jit(function)
    # The interpreter wants `tl` among a function's globals, but runs plain functions as they are.
    return compiled if isinstance(compiled, triton.JITFunction) else function


group_length = _compiled(geometry.group_length)
window_start = _compiled(geometry.window_start)
window_end = _compiled(geometry.window_end)
attending_start = _compiled(geometry.attending_start)
attending_end = _compiled(geometry.attending_end)
bias_index = _compiled(geometry.bias_index)


@triton.jit
def tile_range(
    tile, length,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr,
    TILE: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """On one axis, the keys [start, end) that a tile of queries meets, or the other way round."""
    first = tile * TILE
    last = tl.minimum(first + TILE, length) - 1
    if OF_KEYS:
        start = attending_start(first, KERNEL, STRIDE, CAUSAL)
        end = attending_end(last, length, KERNEL, STRIDE, CAUSAL)
    else:
        start = window_start(first, length, KERNEL, STRIDE, CAUSAL)
        end = window_end(last, window_start(last, length, KERNEL, STRIDE, CAUSAL), KERNEL, CAUSAL)
    return start, end


@triton.jit
def tile_type(tile, length, is_short, front, back, TILE: tl.constexpr):
    """Entry of the bias table, on one axis, for a tile: see `tiles.TileAxis`."""
    behind = tile - (length + TILE - 1) // TILE + back + 1
    behind = tl.minimum(tl.maximum(behind, 0), back)  # a short group may end before the tile
    return tl.minimum(tile, front) + behind + is_short * (front + 1 + back)


@triton.jit
def block_tokens(
    first_row, first_column, length_h, length_w, group_h, group_w,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Rows and columns on the map of a block of a dilation group, and which of them exist."""
    i = tl.arange(0, ROWS * COLUMNS)
    row = first_row + i // COLUMNS
    column = first_column + i % COLUMNS
    return (
        row * DILATION_H + group_h,
        column * DILATION_W + group_w,
        (row < length_h) & (column < length_w),
    )


@triton.jit
def token_offsets(row, column, row_stride, column_stride, WIDE: tl.constexpr):
    """Offsets of tokens within an image; 64-bit where an image may exceed 2^31 elements."""
    if WIDE:
        row = row.to(tl.int64)
        column = column.to(tl.int64)
    return row * row_stride + column * column_stride


@triton.jit
def load_tokens(tensor, offsets, is_token, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[tokens, BLOCK_D] of a heads-last tensor; zeros where there is no element."""
    d = tl.arange(0, BLOCK_D)
    mask = is_token[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    return tl.load(tensor + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_tokens(tensor, offsets, is_token, block, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [tokens, BLOCK_D], leaving out what `load_tokens` fills with zeros."""
    d = tl.arange(0, BLOCK_D)
    mask = is_token[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    tl.store(tensor + offsets[:, None] + d[None, :], block.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def locate_tile(heads, row_tiles, column_tiles, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr):
    """Image, head, dilation group and tile of this program.

    The head runs fastest: heads lie side by side in memory. Image and head are 64-bit, since they
    are multiplied by the largest strides.
    """
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    program //= heads
    tile_w = program % column_tiles
    program //= column_tiles
    tile_h = program % row_tiles
    program //= row_tiles
    group_w = program % DILATION_W
    program //= DILATION_W
    batch = (program // DILATION_H).to(tl.int64)
    return batch, head, program % DILATION_H, group_w, tile_h, tile_w


@triton.jit
def table_entry(
    tile_h, tile_w, group_h, group_w, height, width, length_h, length_w,
    front_h, back_h, front_w, back_w,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Entry of the bias table for a tile."""
    short_h = (group_h >= height % DILATION_H) & (height % DILATION_H > 0)
    short_w = (group_w >= width % DILATION_W) & (width % DILATION_W > 0)
    column_types = (front_w + 1 + back_w) * (1 + (width % DILATION_W > 0))
    type_h = tile_type(tile_h, length_h, short_h, front_h, back_h, TILE_H)
    return type_h * column_types + tile_type(tile_w, length_w, short_w, front_w, back_w, TILE_W)


@triton.jit
def table_block(
    table, entry, STRIPS: tl.constexpr, TILE_TOKENS: tl.constexpr, STRIP_TOKENS: tl.constexpr
):
    """Pointers [TILE_TOKENS, STRIP_TOKENS] to the first strip of an entry of the bias table."""
    m = tl.arange(0, TILE_TOKENS)[:, None]
    n = tl.arange(0, STRIP_TOKENS)[None, :]
    table += entry.to(tl.int64) * (STRIPS * TILE_TOKENS * STRIP_TOKENS)
    return table + m * STRIP_TOKENS + n


@triton.jit
def masked_scores(dots, scale, bias):
    """Logits in powers of 2; -inf outside the window, whatever overflowed there."""
    scores = dots * (scale * 1.4426950408889634) + bias
    return tl.where(bias > float("-inf"), scores, float("-inf"))


@triton.jit
def masked_gradient(p, dp, bias, delta):
    """Gradient of the logits; exactly zero outside the window, whatever `dp` overflowed to."""
    return tl.where(bias > float("-inf"), p * (dp - delta), 0.0)
