"""The forward where one tile holds a whole dilation group, and so one strip all of its keys.

A program walks over images and dilation groups with its bias in registers; each softmax is done at
once: s = (scale * q k^T + bias) log2 e ; m = max s ; p = 2^(s - m) ; o = p v / sum p.
"""

from typing import Any

import triton
import triton.language as tl

from neighborhood_attention.backends.triton.launch import Launch, Problem, walking_launch
from neighborhood_attention.backends.triton.products import product
from neighborhood_attention.backends.triton.registers import in_rows
from neighborhood_attention.backends.triton.tiles import TilePlan
from neighborhood_attention.backends.triton.window import (
    count_tiles,
    flat_block,
    group_lengths,
    groups_alike,
    is_overflow,
    load_tokens,
    locate_item,
    locate_position,
    masked_scores,
    store_tokens,
    strip_tokens,
    table_entry,
    tile_tokens,
    token_index,
    token_offsets,
    wait_for_others,
    with_sign,
)


def whole_group_forward(problem: Problem, plan: TilePlan, settings: dict[str, Any]) -> Launch:
    """Its tensors are query, key, value, table, output and lse; the plan's tile is its strip."""
    return walking_launch(_whole_group_forward_kernel, problem, plan, settings)


@triton.jit
def _whole_group_forward_kernel(
    query, key, value, table, output, lse,
    query_strides, key_strides, value_strides,
    table_stride, batch, shares, positions, size, heads, heads_per_key, scale, front, back,
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
    wait_for_others(OVERLAPS)
    packed_bias = tl.load(flat_block(table + head * table_stride, entry, TOKENS * TOKENS))
    query += head * query_strides[4]
    key += head // heads_per_key * key_strides[4]
    value += head // heads_per_key * value_strides[4]
    output += head * VALUE_DIM
    lse += head

    for item in range(share, batch * groups[0] * groups[1] * groups[2], shares):
        image, group = locate_item(item, first_group, groups)
        _, is_token = tile_tokens(tile, length, group, DILATION, TILE)
        token = strip_tokens((0, 0, 0), length, group, DILATION, TILE)
        offsets = token_offsets(token, query_strides, WIDE)
        key_offsets, value_offsets = offsets, offsets
        if not EQUAL_STRIDES:
            key_offsets = token_offsets(token, key_strides, WIDE)
            value_offsets = token_offsets(token, value_strides, WIDE)
        q = load_tokens(query + image * query_strides[0], offsets, None, HEAD_DIM, BLOCK_D)
        k = load_tokens(key + image * key_strides[0], key_offsets, None, HEAD_DIM, BLOCK_D)
        v = load_tokens(value + image * value_strides[0], value_offsets, None, VALUE_DIM, BLOCK_V)
        dots = product(with_sign(q, SIGN), tl.trans(k), PRECISION)
        bias = in_rows(packed_bias, TOKENS, TOKENS, ROW_WARPS, COLUMN_WARPS)
        s = masked_scores(dots, scale, bias.to(tl.float32))
        row_max = tl.maximum(tl.max(s, 1), -3.4e38)  # of a token that is none: -inf
        p = tl.exp2(s - row_max[:, None])
        row_sum = tl.sum(p, 1)
        row_sum = tl.where(is_overflow(row_max, scale), float("nan"), row_sum)
        result = product(p.to(v.dtype), v, PRECISION) * (1.0 / row_sum)[:, None]
        index = token_index(token, size, heads, WIDE)
        first_token = image * size[0] * size[1] * size[2] * heads
        store_tokens(
            output + first_token * VALUE_DIM, index * VALUE_DIM, is_token, result,
            VALUE_DIM, BLOCK_V,
        )  # fmt: skip
        row_lse = (row_max + tl.log2(row_sum)) / 1.4426950408889634
        tl.store(lse + first_token + index, row_lse, mask=is_token)
