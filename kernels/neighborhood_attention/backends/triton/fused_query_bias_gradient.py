"""Gradients of the query and of the bias in one pass, where few strips hold a tile's keys.

A program owns a tile of queries at one position of the map and walks over images and dilation
groups. It computes ds once (see `fused_backward`), for the query's gradient and for the sum over
its items that `fused_bias_gradient` reduces. The sums stay in registers, which bounds the strips.
"""

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neighborhood_attention.backends.triton.bias_table import BiasTable
from neighborhood_attention.backends.triton.fused_bias_gradient import BiasReduction
from neighborhood_attention.backends.triton.launch import Problem, walking_launch
from neighborhood_attention.backends.triton.products import product
from neighborhood_attention.backends.triton.registers import in_rows
from neighborhood_attention.backends.triton.tiles import TilePlan
from neighborhood_attention.backends.triton.window import (
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
    store_tokens,
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

MAX_STRIPS = 2


class QueryBiasGradient:
    """Fills the gradients of a problem's query and bias, and delta."""

    def __init__(
        self, problem: Problem, window: Neighborhood, plan: TilePlan, settings: dict[str, Any]
    ) -> None:
        tile, strips = plan.tile, prod(plan.strips)
        shares = plan.shares(problem.query.shape[0], problem.query.shape[-2])
        programs = plan.positions * problem.query.shape[-2] * shares
        self._table = BiasTable(problem, window, plan)
        self._sums = programs * strips * prod(tile.tile) * prod(tile.strip)
        arguments = settings | {"table_stride": self._table.head_stride}
        self._launch = walking_launch(_query_bias_gradient_kernel, problem, plan, arguments)
        self._reduction = BiasReduction(problem, plan, shares, settings)

    def begin(
        self, grad_query: Tensor, grad_rpb: Tensor, delta: Tensor, rpb: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Launch the kernels; the bias's gradient, or what is still to be added up to it.

        `tensors` are query, key, value, the output's gradient, output, lse, lse's gradient.
        """
        sums = torch.empty(self._sums, dtype=torch.float32, device=rpb.device)
        self._launch(*tensors, delta, self._table.build(rpb), grad_query, sums)
        return self._reduction.begin(grad_rpb, sums)

    def end(self, grad_rpb: Tensor, sums: Tensor) -> None:
        """Add up what `begin` returned."""
        self._reduction.end(grad_rpb, sums)


@triton.jit
def _query_bias_gradient_kernel(
    query, key, value, grad_output, output, lse, grad_lse, delta, table, grad_query, sums,
    query_strides, key_strides, value_strides, grad_output_strides, grad_query_strides,
    table_stride, batch, shares, positions, size, heads, heads_per_key, scale, front, back,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
    ROW_WARPS: tl.constexpr, COLUMN_WARPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, SIGN: tl.constexpr,
    WIDE: tl.constexpr, EQUAL_STRIDES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One tile at one position, a share of the items. Grid: (heads * positions * shares,)."""
    TILE_TOKENS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    STRIP_TOKENS: tl.constexpr = STRIP[0] * STRIP[1] * STRIP[2]
    ALL_STRIPS: tl.constexpr = STRIPS[0] * STRIPS[1] * STRIPS[2]
    tl.static_assert(ALL_STRIPS <= 2)
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    position = program // heads % positions
    share = program // heads // positions
    tiles = count_tiles(size, DILATION, TILE)
    tile, first_group = locate_position(position, size, tiles, DILATION)
    groups = groups_alike(first_group, size, DILATION)
    length = group_lengths(first_group, size, DILATION)
    start, end = tile_ranges(tile, length, KERNEL_SIZE, STRIDE, IS_CAUSAL, TILE, False)
    entry = table_entry(tile, first_group, size, length, front, back, DILATION, TILE) * ALL_STRIPS
    table = flat_block(table + head * table_stride, entry, TILE_TOKENS * STRIP_TOKENS)
    query += head * query_strides[4]
    key += head // heads_per_key * key_strides[4]
    value += head // heads_per_key * value_strides[4]
    grad_output += head * grad_output_strides[4]
    grad_query += head * grad_query_strides[4]
    output += head * VALUE_DIM
    wait_for_others(OVERLAPS)
    bias_0 = tl.load(table)
    bias_1 = tl.load(table + (ALL_STRIPS - 1) * (TILE_TOKENS * STRIP_TOKENS))
    sum_0 = tl.zeros((TILE_TOKENS, STRIP_TOKENS), tl.float32)
    sum_1 = tl.zeros((TILE_TOKENS, STRIP_TOKENS), tl.float32)

    for item in range(share, count_items(batch, groups, tile, length, TILE), shares):
        image, group = locate_item(item, first_group, groups)
        query_token, is_query = tile_tokens(tile, length, group, DILATION, TILE)
        token = token_index(query_token, size, heads, WIDE)
        first_token = image * size[0] * size[1] * size[2] * heads
        query_offsets = token_offsets(query_token, query_strides, WIDE)
        q = load_tokens(
            query + image * query_strides[0], query_offsets, is_query, HEAD_DIM, BLOCK_D
        )
        do = load_tokens(
            grad_output + image * grad_output_strides[0],
            token_offsets(query_token, grad_output_strides, WIDE), is_query, VALUE_DIM, BLOCK_V,
        )  # fmt: skip
        o = load_tokens(
            output + first_token * VALUE_DIM, token * VALUE_DIM, is_query, VALUE_DIM, BLOCK_V
        )
        row = first_token + head + token
        row_lse = tl.load(lse + row, mask=is_query, other=0.0) * 1.4426950408889634
        row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        if grad_lse is not None:
            row_delta -= tl.load(grad_lse + row, mask=is_query, other=0.0)
        tl.store(delta + row, row_delta, mask=is_query)
        q = with_sign(q, SIGN)
        dq = tl.zeros((TILE_TOKENS, BLOCK_D), tl.float32)
        for strip in tl.static_range(ALL_STRIPS):
            first = strip_start(strip, start, STRIP, STRIPS)
            key_token = strip_tokens(first, end, group, DILATION, STRIP)
            key_offsets = token_offsets(key_token, key_strides, WIDE)
            value_offsets = key_offsets
            if not EQUAL_STRIDES:
                value_offsets = token_offsets(key_token, value_strides, WIDE)
            k = load_tokens(key + image * key_strides[0], key_offsets, None, HEAD_DIM, BLOCK_D)
            v = load_tokens(
                value + image * value_strides[0], value_offsets, None, VALUE_DIM, BLOCK_V
            )
            bias = in_rows(
                bias_0 if strip == 0 else bias_1, TILE_TOKENS, STRIP_TOKENS, ROW_WARPS, COLUMN_WARPS
            )
            dots = product(q, tl.trans(k), PRECISION)
            s = masked_scores(dots, scale, bias.to(tl.float32))
            dp = product(do, tl.trans(v), PRECISION)
            p = tl.exp2(s - row_lse[:, None])
            ds = masked_gradient(p, dp, row_delta[:, None])
            if strip == 0:
                sum_0 += ds
            else:
                sum_1 += ds
            dq = product(ds.to(k.dtype), k, PRECISION, dq)
        grad_offsets = query_offsets
        if not EQUAL_STRIDES:
            grad_offsets = token_offsets(query_token, grad_query_strides, WIDE)
        store_tokens(
            grad_query + image * grad_query_strides[0], grad_offsets, is_query, dq * scale,
            HEAD_DIM, BLOCK_D,
        )  # fmt: skip

    block = ((share * heads + head) * positions + position) * ALL_STRIPS
    tl.store(table_block(sums, block, TILE_TOKENS, STRIP_TOKENS), sum_0)
    if ALL_STRIPS > 1:
        tl.store(table_block(sums, block + 1, TILE_TOKENS, STRIP_TOKENS), sum_1)
