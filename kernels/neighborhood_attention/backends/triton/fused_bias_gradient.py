"""Gradient of the relative positional bias: sums of ds (see `fused_backward`) by relative offset.

Two stages, each in a fixed order. First, a program owns one strip at one position of the map, walks
over images and dilation groups, sums ds [queries, keys of the strip] in registers and stores the
sum once. Then the sums of all positions that share an offset are added up, an offset a program.
"""

from math import ceil, prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from neighborhood_attention.backends.triton.bias_table import BiasTable
from neighborhood_attention.backends.triton.launch import (
    Launch,
    Problem,
    can_overlap,
    plan_arguments,
    walking_launch,
)
from neighborhood_attention.backends.triton.products import product
from neighborhood_attention.backends.triton.registers import in_rows
from neighborhood_attention.backends.triton.tile import Tile
from neighborhood_attention.backends.triton.tiles import TilePlan, plan_tiles
from neighborhood_attention.backends.triton.window import (
    block_positions,
    count_items,
    count_tiles,
    flat_block,
    group_lengths,
    groups_alike,
    load_tokens,
    locate_item,
    locate_position,
    masked_gradient,
    masked_scores,
    strip_start,
    strip_tokens,
    table_block,
    table_entry,
    tile_ranges,
    tile_tokens,
    token_index,
    token_offsets,
    wait_for_others,
    with_sign,
)
from neighborhood_attention.geometry import Neighborhood

# Enough to fill a large GPU.
TARGET_REDUCTIONS = 128
# Partial sums that a reducing program reads at a time.
REDUCED = 4096
MAX_COLUMNS = 64


class BiasGradient:
    """Fills the gradient of a problem's bias."""

    def __init__(
        self, problem: Problem, window: Neighborhood, tile: Tile, settings: dict[str, Any]
    ) -> None:
        batch, *spatial, heads, _ = problem.query.shape
        plan = plan_tiles(tile, window, tuple(spatial), of_keys=False)
        blocks = plan.positions * prod(plan.strips)
        shares = plan.shares(batch, heads * prod(plan.strips))
        self._table = BiasTable(problem, window, plan)
        self._partial = shares * heads * blocks * prod(tile.tile) * prod(tile.strip)
        arguments = settings | {"table_stride": self._table.head_stride}
        self._launch = walking_launch(
            _partial_kernel, problem, plan, arguments, parts=prod(plan.strips)
        )
        self._reduction = BiasReduction(problem, plan, shares, settings)

    def fill(self, gradient: Tensor, rpb: Tensor, *tensors: Tensor) -> None:
        """Fill `gradient`; `tensors` are query, key, value, the output's gradient, lse, delta."""
        partial = torch.empty(self._partial, dtype=torch.float32, device=rpb.device)
        self._launch(*tensors, self._table.build(rpb), partial)
        self._reduction.fill(gradient, partial)


class BiasReduction:
    """Adds up the sums of ds [shares, heads, positions, strips, queries, keys] by offset.

    The last two the other way round for a plan of keys.
    """

    def __init__(
        self, problem: Problem, plan: TilePlan, shares: int, settings: dict[str, Any]
    ) -> None:
        heads = problem.query.shape[-2]
        *rows, columns = (2 * size - 1 for size in settings["KERNEL_SIZE"])
        block_columns = min(MAX_COLUMNS, triton.next_power_of_2(columns))
        blocks = ceil(columns / block_columns)
        block_items = max(1, REDUCED // (prod(plan.tile.tile) * block_columns))
        programs = heads * prod(rows) * blocks
        overlaps = can_overlap(problem.device)
        items = plan.positions * shares
        self._splits = max(1, min(TARGET_REDUCTIONS // programs, ceil(items / block_items)))
        self._launch = Launch(
            _reduce_kernel,
            programs * self._splits,
            {
                **settings, **plan_arguments(plan), "positions": plan.positions, "items": items,
                "splits": self._splits, "blocks": blocks, "ITEMS": block_items,
                "COLUMNS": block_columns, "OF_KEYS": plan.of_keys, "OVERLAPS": overlaps,
            },
            num_warps=8,
            launch_pdl=overlaps,
        )  # fmt: skip

    def fill(self, gradient: Tensor, partial: Tensor) -> None:
        """Fill `gradient` from the partial sums."""
        self.end(gradient, self.begin(gradient, partial))

    def begin(self, gradient: Tensor, partial: Tensor) -> Tensor:
        """Launch the kernel; it fills `gradient`, or several of its size that are returned."""
        sums = gradient
        if self._splits > 1:
            sums = partial.new_empty(self._splits, *gradient.shape)
        self._launch(partial, sums)
        return sums

    def end(self, gradient: Tensor, sums: Tensor) -> None:
        """Add up what `begin` returned."""
        if sums is gradient:
            return
        if gradient.dtype == sums.dtype:
            torch.sum(sums, 0, out=gradient)
        else:
            gradient.copy_(sums.sum(0))


@triton.jit
def _partial_kernel(
    query, key, value, grad_output, lse, delta, table, partial,
    query_strides, key_strides, value_strides, grad_output_strides, table_stride,
    batch, shares, positions, size, heads, heads_per_key, scale, front, back,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
    ROW_WARPS: tl.constexpr, COLUMN_WARPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One strip at one position, for a share of the images. Grid: (positions * strips * heads *
    shares,).
    """
    TILE_TOKENS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    STRIP_TOKENS: tl.constexpr = STRIP[0] * STRIP[1] * STRIP[2]
    ALL_STRIPS: tl.constexpr = STRIPS[0] * STRIPS[1] * STRIPS[2]
    block = tl.program_id(0)
    strip = block % ALL_STRIPS
    tiles = count_tiles(size, DILATION, TILE)
    tile, group = locate_position(block // ALL_STRIPS % positions, size, tiles, DILATION)
    head = (block // ALL_STRIPS // positions % heads).to(tl.int64)
    share = block // ALL_STRIPS // positions // heads
    groups = groups_alike(group, size, DILATION)
    length = group_lengths(group, size, DILATION)
    start, end = tile_ranges(tile, length, KERNEL_SIZE, STRIDE, IS_CAUSAL, TILE, False)
    first = strip_start(strip, start, STRIP, STRIPS)
    entry = table_entry(tile, group, size, length, front, back, DILATION, TILE) * ALL_STRIPS
    table = flat_block(table + head * table_stride, entry + strip, TILE_TOKENS * STRIP_TOKENS)
    wait_for_others(OVERLAPS)
    bias = in_rows(tl.load(table), TILE_TOKENS, STRIP_TOKENS, ROW_WARPS, COLUMN_WARPS)
    bias = bias.to(tl.float32)
    total = tl.zeros((TILE_TOKENS, STRIP_TOKENS), tl.float32)
    query += head * query_strides[4]
    key += head // heads_per_key * key_strides[4]
    value += head // heads_per_key * value_strides[4]
    grad_output += head * grad_output_strides[4]

    items = count_items(batch, groups, tile, length, TILE)
    for item in range(share, items, shares):
        image, this_group = locate_item(item, group, groups)
        query_token, is_query = tile_tokens(tile, length, this_group, DILATION, TILE)
        key_token = strip_tokens(first, end, this_group, DILATION, STRIP)
        query_offsets = token_offsets(query_token, query_strides, WIDE)
        key_offsets = token_offsets(key_token, key_strides, WIDE)
        value_offsets = token_offsets(key_token, value_strides, WIDE)
        grad_offsets = token_offsets(query_token, grad_output_strides, WIDE)
        q = load_tokens(
            query + image * query_strides[0], query_offsets, is_query, HEAD_DIM, BLOCK_D
        )
        do = load_tokens(
            grad_output + image * grad_output_strides[0], grad_offsets, is_query,
            VALUE_DIM, BLOCK_V,
        )  # fmt: skip
        k = load_tokens(key + image * key_strides[0], key_offsets, None, HEAD_DIM, BLOCK_D)
        v = load_tokens(value + image * value_strides[0], value_offsets, None, VALUE_DIM, BLOCK_V)
        token = token_index(query_token, size, heads, WIDE)
        token += image * size[0] * size[1] * size[2] * heads + head
        row_lse = tl.load(lse + token, mask=is_query, other=0.0) * 1.4426950408889634
        row_delta = tl.load(delta + token, mask=is_query, other=0.0)

        q = with_sign(q, SIGN)
        s = masked_scores(product(q, tl.trans(k), PRECISION), scale, bias)
        dp = product(do, tl.trans(v), PRECISION)
        p = tl.exp2(s - row_lse[:, None])
        total += masked_gradient(p, dp, row_delta[:, None])

    tl.store(table_block(partial, block, TILE_TOKENS, STRIP_TOKENS), total)


@triton.jit
def _reduce_kernel(
    partial, gradient, positions, items, splits, blocks, size, heads, front, back,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
    ITEMS: tl.constexpr, COLUMNS: tl.constexpr, OF_KEYS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Some offsets on the last axis, one on each other. Grid: (blocks * offsets * heads * splits,).

    Writes [splits, heads, offsets of all axes].
    """
    wait_for_others(OVERLAPS)
    if OVERLAPS:
        gdc_launch_dependents()  # all before this kernel has ended; it takes little room
    TILE_TOKENS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    STRIP_TOKENS: tl.constexpr = STRIP[0] * STRIP[1] * STRIP[2]
    spans_d: tl.constexpr = 2 * KERNEL_SIZE[0] - 1
    spans_h: tl.constexpr = 2 * KERNEL_SIZE[1] - 1
    spans_w: tl.constexpr = 2 * KERNEL_SIZE[2] - 1
    block = tl.program_id(0) % blocks
    program = tl.program_id(0) // blocks
    offset_d = program // spans_h % spans_d - KERNEL_SIZE[0] + 1  # key - query
    offset_h = program % spans_h - KERNEL_SIZE[1] + 1
    head = program // (spans_d * spans_h) % heads
    split = program // (spans_d * spans_h) // heads
    column = block * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    offset_w = column - KERNEL_SIZE[2] + 1
    if OF_KEYS:
        offset_d, offset_h, offset_w = -offset_d, -offset_h, -offset_w
    i = tl.arange(0, ITEMS * TILE_TOKENS)
    tile_d, tile_h, tile_w = block_positions(TILE, i % TILE_TOKENS)
    total = tl.zeros((ITEMS * TILE_TOKENS, COLUMNS), tl.float32)
    tiles = count_tiles(size, DILATION, TILE)
    for first in range(split * ITEMS, items, splits * ITEMS):
        item = first + i // TILE_TOKENS
        tile, group = locate_position(item % positions, size, tiles, DILATION)
        length = group_lengths(group, size, DILATION)
        start, _ = tile_ranges(tile, length, KERNEL_SIZE, STRIDE, IS_CAUSAL, TILE, OF_KEYS)
        # The other token's position, counted from the first strip's first token.
        d = tile[0] * TILE[0] + tile_d + offset_d - start[0]
        h = tile[1] * TILE[1] + tile_h + offset_h - start[1]
        w = (tile[2] * TILE[2] + tile_w - start[2])[:, None] + offset_w
        is_row = (item < items) & (d >= 0) & (h >= 0)
        is_row &= (d < STRIPS[0] * STRIP[0]) & (h < STRIPS[1] * STRIP[1])
        is_pair = is_row[:, None] & (w >= 0) & (w < STRIPS[2] * STRIP[2]) & (column < spans_w)
        strip = ((d // STRIP[0] * STRIPS[1] + h // STRIP[1]) * STRIPS[2])[:, None] + w // STRIP[2]
        n = ((d % STRIP[0] * STRIP[1] + h % STRIP[1]) * STRIP[2])[:, None] + w % STRIP[2]
        first_strip = (item // positions * heads + head).to(tl.int64) * positions + item % positions
        strip += first_strip[:, None] * (STRIPS[0] * STRIPS[1] * STRIPS[2])
        index = (strip * TILE_TOKENS + (i % TILE_TOKENS)[:, None]) * STRIP_TOKENS + n
        total += tl.load(partial + index, mask=is_pair, other=0.0)
    sums = tl.sum(total, 0)[None, :].to(gradient.dtype.element_ty)
    row = program.to(tl.int64) * spans_w
    tl.store(gradient + row + column, sums, mask=column < spans_w)
