"""Gradient of the relative positional bias: sums of ds (see `fused_backward`) by relative offset.

Two stages, each in a fixed order. First, a program owns one strip at one position of the map, walks
over images and dilation groups, sums ds [queries, keys of the strip] in registers and stores the
sum once. Then a program for each entry of the bias adds up the pairs of tokens that use it.
"""

from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from neighborhood_attention.backends.triton.bias_table import build_bias_table
from neighborhood_attention.backends.triton.launch import block_arguments, window_arguments
from neighborhood_attention.backends.triton.tiles import Tile, plan_tiles
from neighborhood_attention.backends.triton.window import (
    block_tokens,
    group_length,
    load_tokens,
    masked_gradient,
    masked_scores,
    table_block,
    table_entry,
    tile_range,
    token_offsets,
)
from neighborhood_attention.geometry import Neighborhood

# Enough to fill a large GPU; each costs a block of partial sums.
TARGET_WARPS = 2048


def bias_gradient(
    tensors: tuple[Tensor, ...],
    rpb: Tensor,
    lse: Tensor,
    delta: Tensor,
    window: Neighborhood,
    scale: float,
    tile: Tile,
) -> Tensor:
    """Gradient of `rpb`, like it; `tensors` are query, key, value and the output's gradient."""
    query = tensors[0]
    batch, height, width, heads, _ = query.shape
    plan = plan_tiles(tile, window, (height, width), of_keys=False)
    table = build_bias_table(rpb, window, (height, width), plan, query)
    positions = plan.rows.classes * plan.columns.classes * plan.rows.tiles * plan.columns.tiles
    warps = positions * plan.strips * heads * tile.num_warps
    splits = max(1, min(batch, ceil(TARGET_WARPS / warps)))
    partial = torch.empty(
        splits, heads, positions, plan.strips, plan.tile_tokens, plan.strip_tokens,
        dtype=torch.float32, device=query.device,
    )  # fmt: skip
    settings = {**window_arguments(window), **plan.arguments()}
    _partial_kernel[(positions * plan.strips, heads, splits)](
        *tensors, lse, delta, table, partial,
        *(stride for t in tensors for stride in t.stride()[:4]), table.stride(0),
        batch, height, width, heads, scale, **settings, **block_arguments(*tensors),
        **tile.options,
    )  # fmt: skip
    gradient = torch.empty(rpb.shape, dtype=rpb.dtype, device=rpb.device)
    _reduce_kernel[(gradient[0].numel(), heads)](
        partial, gradient, height, width, positions, splits,
        **settings, BLOCK=max(1, 2048 // plan.tile_tokens),
    )  # fmt: skip
    return gradient


@triton.jit
def _locate_position(
    position, height, width, row_tiles, column_tiles,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
):  # fmt: skip
    """Tile, and whether its dilation groups are the short ones, for a position of the map."""
    tile_w = position % column_tiles
    tile_h = position // column_tiles % row_tiles
    classes_w = 1 + (width % DILATION_W > 0)
    classes = position // (column_tiles * row_tiles)
    return tile_h, tile_w, classes // classes_w, classes % classes_w


@triton.jit
def _partial_kernel(
    query, key, value, grad_output, lse, delta, table, partial,
    query_b, query_h, query_w, query_n, key_b, key_h, key_w, key_n,
    value_b, value_h, value_w, value_n,
    grad_output_b, grad_output_h, grad_output_w, grad_output_n, table_n,
    batch, height, width, heads, scale, row_tiles, column_tiles, front_h, back_h, front_w, back_w,
    KERNEL_SIZE_H: tl.constexpr, KERNEL_SIZE_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    IS_CAUSAL_H: tl.constexpr, IS_CAUSAL_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STRIP_H: tl.constexpr, STRIP_W: tl.constexpr,
    COLUMN_STRIPS: tl.constexpr, STRIPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One strip of a position, some of the images. Grid: (positions * strips, heads, splits)."""
    position, strip = tl.program_id(0) // STRIPS, tl.program_id(0) % STRIPS
    head, share = tl.program_id(1).to(tl.int64), tl.program_id(2)
    tile_h, tile_w, short_h, short_w = _locate_position(
        position, height, width, row_tiles, column_tiles, DILATION_H, DILATION_W
    )
    first_group_h, first_group_w = short_h * (height % DILATION_H), short_w * (width % DILATION_W)
    length_h = group_length(first_group_h, height, DILATION_H)
    length_w = group_length(first_group_w, width, DILATION_W)
    # The long groups come first, the short ones follow.
    groups_h = tl.where(
        (short_h > 0) | (height % DILATION_H == 0), DILATION_H - first_group_h, height % DILATION_H
    )
    groups_w = tl.where(
        (short_w > 0) | (width % DILATION_W == 0), DILATION_W - first_group_w, width % DILATION_W
    )
    start_h, _ = tile_range(tile_h, length_h, KERNEL_SIZE_H, STRIDE_H, IS_CAUSAL_H, TILE_H, False)
    start_w, _ = tile_range(tile_w, length_w, KERNEL_SIZE_W, STRIDE_W, IS_CAUSAL_W, TILE_W, False)
    entry = table_entry(
        tile_h, tile_w, first_group_h, first_group_w, height, width, length_h, length_w,
        front_h, back_h, front_w, back_w, DILATION_H, DILATION_W, TILE_H, TILE_W,
    )  # fmt: skip
    table = table_block(table + head * table_n, entry, STRIPS, TILE_H * TILE_W, STRIP_H * STRIP_W)
    bias = tl.load(table + strip * (TILE_H * TILE_W * STRIP_H * STRIP_W)).to(tl.float32)
    total = tl.zeros((TILE_H * TILE_W, STRIP_H * STRIP_W), tl.float32)

    # A short group may end before this tile.
    is_tile = (tile_h * TILE_H < length_h) & (tile_w * TILE_W < length_w)
    items = tl.where(is_tile, batch * groups_h * groups_w, 0)
    for item in range(share, items, tl.num_programs(2)):
        group_w = first_group_w + item % groups_w
        group_h = first_group_h + item // groups_w % groups_h
        image = (item // (groups_w * groups_h)).to(tl.int64)
        query_row, query_column, is_query = block_tokens(
            tile_h * TILE_H, tile_w * TILE_W, length_h, length_w, group_h, group_w,
            DILATION_H, DILATION_W, TILE_H, TILE_W,
        )  # fmt: skip
        key_row, key_column, is_key = block_tokens(
            start_h + strip // COLUMN_STRIPS * STRIP_H, start_w + strip % COLUMN_STRIPS * STRIP_W,
            length_h, length_w, group_h, group_w, DILATION_H, DILATION_W, STRIP_H, STRIP_W,
        )  # fmt: skip
        q = load_tokens(
            query + image * query_b + head * query_n,
            token_offsets(query_row, query_column, query_h, query_w, WIDE),
            is_query, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        do = load_tokens(
            grad_output + image * grad_output_b + head * grad_output_n,
            token_offsets(query_row, query_column, grad_output_h, grad_output_w, WIDE),
            is_query, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        k = load_tokens(
            key + image * key_b + head * key_n,
            token_offsets(key_row, key_column, key_h, key_w, WIDE),
            is_key, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        v = load_tokens(
            value + image * value_b + head * value_n,
            token_offsets(key_row, key_column, value_h, value_w, WIDE),
            is_key, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        token = token_offsets(query_row, query_column, width * heads, heads, WIDE)
        token += image * height * width * heads + head
        row_lse = tl.load(lse + token, mask=is_query, other=0.0) * 1.4426950408889634
        row_delta = tl.load(delta + token, mask=is_query, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        p = tl.exp2(masked_scores(s, scale, bias) - row_lse[:, None])
        total += masked_gradient(p, dp, bias, row_delta[:, None])

    positions = tl.num_programs(0) // STRIPS
    block = ((share * heads + head) * positions + position) * STRIPS + strip
    tl.store(table_block(partial, block, 1, TILE_H * TILE_W, STRIP_H * STRIP_W), total)


@triton.jit
def _reduce_kernel(
    partial, gradient, height, width, positions, splits,
    row_tiles, column_tiles, front_h, back_h, front_w, back_w,
    KERNEL_SIZE_H: tl.constexpr, KERNEL_SIZE_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    IS_CAUSAL_H: tl.constexpr, IS_CAUSAL_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STRIP_H: tl.constexpr, STRIP_W: tl.constexpr,
    COLUMN_STRIPS: tl.constexpr, STRIPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One entry of one head's bias. Grid: (entries, heads)."""
    entry, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    offset_h = entry // (2 * KERNEL_SIZE_W - 1) - KERNEL_SIZE_H + 1  # key - query
    offset_w = entry % (2 * KERNEL_SIZE_W - 1) - KERNEL_SIZE_W + 1
    m = tl.arange(0, TILE_H * TILE_W)[None, :]
    total = tl.zeros((BLOCK, TILE_H * TILE_W), tl.float32)
    for first in range(0, positions * splits, BLOCK):
        item = first + tl.arange(0, BLOCK)[:, None]
        position = item % positions
        tile_h, tile_w, short_h, short_w = _locate_position(
            position, height, width, row_tiles, column_tiles, DILATION_H, DILATION_W
        )
        length_h = group_length(short_h * (DILATION_H - 1), height, DILATION_H)
        length_w = group_length(short_w * (DILATION_W - 1), width, DILATION_W)
        start_h, _ = tile_range(
            tile_h, length_h, KERNEL_SIZE_H, STRIDE_H, IS_CAUSAL_H, TILE_H, False
        )
        start_w, _ = tile_range(
            tile_w, length_w, KERNEL_SIZE_W, STRIDE_W, IS_CAUSAL_W, TILE_W, False
        )
        # Of the key, counted from the first strip's.
        row = tile_h * TILE_H + m // TILE_W + offset_h - start_h
        column = tile_w * TILE_W + m % TILE_W + offset_w - start_w
        strip = row // STRIP_H * COLUMN_STRIPS + column // STRIP_W
        is_pair = (row >= 0) & (column >= 0) & (column < COLUMN_STRIPS * STRIP_W) & (strip < STRIPS)
        share = item // positions
        block = ((share * heads + head).to(tl.int64) * positions + position) * STRIPS + strip
        pair = m * (STRIP_H * STRIP_W) + row % STRIP_H * STRIP_W + column % STRIP_W
        index = block * (TILE_H * TILE_W * STRIP_H * STRIP_W) + pair
        total += tl.load(partial + index, mask=is_pair & (item < positions * splits), other=0.0)
    gradient += head * tl.num_programs(0) + entry
    tl.store(gradient, tl.sum(total).to(gradient.dtype.element_ty))
