"""All gradients in one pass, where one tile holds a whole dilation group.

A program walks over images and dilation groups. Queries and keys of a group are the same tokens, so
each is read once and ds (see `fused_backward`) is computed once: for the gradients of query, key
and value, and for its sum over the items, which `fused_bias_gradient` reduces.
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
    strip_tokens,
    table_block,
    table_entry,
    tile_tokens,
    token_index,
    token_offsets,
    wait_for_others,
    with_sign,
)
from neighborhood_attention.geometry import Neighborhood


class WholeGroupGradient:
    """Fills all gradients of a problem; `plan` is of keys, and its tile is its strip."""

    def __init__(
        self, problem: Problem, window: Neighborhood, plan: TilePlan, settings: dict[str, Any]
    ) -> None:
        heads = problem.query.shape[-2]
        shares = plan.shares(problem.query.shape[0], heads)
        programs = plan.positions * heads * shares
        self._table = BiasTable(problem, window, plan)
        self._sums = programs * prod(plan.tile.tile) * prod(plan.tile.strip)
        arguments = settings | {"table_stride": self._table.head_stride}
        self._launch = walking_launch(_whole_group_kernel, problem, plan, arguments)
        self._reduction = BiasReduction(problem, plan, shares, settings)

    def fill(
        self, grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, grad_rpb: Tensor | None,
        rpb: Tensor | None, *tensors: Tensor | None,
    ) -> None:  # fmt: skip
        """`tensors` are query, key, value, the output's gradient, output, lse, lse's gradient."""
        sums = None
        if grad_rpb is not None:  # before the table: in deterministic mode a kernel fills it
            sums = torch.empty(self._sums, dtype=torch.float32, device=grad_rpb.device)
        self._launch(*tensors, self._table.build(rpb), grad_query, grad_key, grad_value, sums)
        if grad_rpb is not None and sums is not None:
            self._reduction.fill(grad_rpb, sums)


@triton.jit
def _whole_group_kernel(
    query, key, value, grad_output, output, lse, grad_lse, table,
    grad_query, grad_key, grad_value, sums,
    query_strides, key_strides, value_strides, grad_output_strides,
    grad_query_strides, grad_key_strides, grad_value_strides,
    table_stride, batch, shares, positions, size, heads, scale, front, back,
    DILATION: tl.constexpr, TILE: tl.constexpr,
    ROW_WARPS: tl.constexpr, COLUMN_WARPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, SIGN: tl.constexpr,
    WIDE: tl.constexpr, EQUAL_STRIDES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Groups of one length, a share of the items. Grid: (heads * positions * shares,)."""
    TOKENS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    position = program // heads % positions
    share = program // heads // positions
    tiles = count_tiles(size, DILATION, TILE)
    tile, first_group = locate_position(position, size, tiles, DILATION)
    groups = groups_alike(first_group, size, DILATION)
    length = group_lengths(first_group, size, DILATION)
    entry = table_entry(tile, first_group, size, length, front, back, DILATION, TILE)
    table = flat_block(table + head * table_stride, entry, TOKENS * TOKENS)
    wait_for_others(OVERLAPS)
    packed_bias = tl.load(table)
    query += head * query_strides[4]
    key += head * key_strides[4]
    value += head * value_strides[4]
    grad_output += head * grad_output_strides[4]
    grad_query += head * grad_query_strides[4]
    grad_key += head * grad_key_strides[4]
    grad_value += head * grad_value_strides[4]
    output += head * VALUE_DIM
    ds_sum = tl.zeros((TOKENS, TOKENS), tl.float32)

    for item in range(share, batch * groups[0] * groups[1] * groups[2], shares):
        image, group = locate_item(item, first_group, groups)
        _, is_token = tile_tokens(tile, length, group, DILATION, TILE)
        token = strip_tokens((0, 0, 0), length, group, DILATION, TILE)
        offsets = token_offsets(token, query_strides, WIDE)
        key_offsets, value_offsets = offsets, offsets
        if not EQUAL_STRIDES:
            key_offsets = token_offsets(token, key_strides, WIDE)
            value_offsets = token_offsets(token, value_strides, WIDE)
        index = token_index(token, size, heads, WIDE)
        first_token = image * size[0] * size[1] * size[2] * heads
        q = load_tokens(query + image * query_strides[0], offsets, None, HEAD_DIM, BLOCK_D)
        k = load_tokens(key + image * key_strides[0], key_offsets, None, HEAD_DIM, BLOCK_D)
        v = load_tokens(value + image * value_strides[0], value_offsets, None, VALUE_DIM, BLOCK_V)
        do = load_tokens(
            grad_output + image * grad_output_strides[0],
            token_offsets(token, grad_output_strides, WIDE), None, VALUE_DIM, BLOCK_V,
        )  # fmt: skip
        o = load_tokens(
            output + first_token * VALUE_DIM, index * VALUE_DIM, None, VALUE_DIM, BLOCK_V
        )
        row = first_token + head + index
        row_lse = tl.load(lse + row) * 1.4426950408889634
        row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        if grad_lse is not None:
            row_delta -= tl.load(grad_lse + row)
        bias = in_rows(packed_bias, TOKENS, TOKENS, ROW_WARPS, COLUMN_WARPS).to(tl.float32)

        dots = product(with_sign(k, SIGN), tl.trans(q), PRECISION)
        s = masked_scores(dots, scale, bias)
        p = tl.exp2(s - row_lse[None, :])
        dv = product(p.to(do.dtype), do, PRECISION)
        dp = product(v, tl.trans(do), PRECISION)
        ds = masked_gradient(p, dp, row_delta[None, :])
        if sums is not None:
            ds_sum += ds
        ds = ds.to(q.dtype)
        dk = product(ds, q, PRECISION)
        # A transposed result of a product: wrong on Hopper in some shapes before Triton 3.7.1, so
        # the tests check each that may be chosen.
        dq = product(tl.trans(ds), k, PRECISION)

        query_offsets = offsets
        if not EQUAL_STRIDES:
            query_offsets = token_offsets(token, grad_query_strides, WIDE)
            key_offsets = token_offsets(token, grad_key_strides, WIDE)
            value_offsets = token_offsets(token, grad_value_strides, WIDE)
        grad_value_image = grad_value + image * grad_value_strides[0]
        store_tokens(grad_value_image, value_offsets, is_token, dv, VALUE_DIM, BLOCK_V)
        grad_key_image = grad_key + image * grad_key_strides[0]
        store_tokens(grad_key_image, key_offsets, is_token, dk * scale, HEAD_DIM, BLOCK_D)
        grad_query_image = grad_query + image * grad_query_strides[0]
        store_tokens(grad_query_image, query_offsets, is_token, dq * scale, HEAD_DIM, BLOCK_D)

    if sums is not None:
        block = (share * heads + head) * positions + position
        tl.store(table_block(sums, block, TOKENS, TOKENS), ds_sum)
