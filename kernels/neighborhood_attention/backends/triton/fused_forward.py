"""Fused neighborhood attention, forward: softmax(scale * Q K^T + bias) V in one pass, tile by tile.

A program owns a tile of queries of one dilation group. It walks over strips of the keys that its
queries attend to and keeps a running maximum m, sum l and output o (online softmax, arXiv
1805.02867; FlashAttention, arXiv 2205.14135):

    s = (scale * q k^T + bias) log2 e    [queries, keys of the strip]; -inf outside the window
    m' = max(m, max s) ; p = 2^(s - m')
    l = l 2^(m - m') + sum p ; o = o 2^(m - m') + p v

and at the end output = o / l, lse = (m + log2 l) / log2 e.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neighborhood_attention.backends.triton.bias_table import build_bias_table
from neighborhood_attention.backends.triton.launch import (
    block_arguments,
    window_arguments,
    with_contiguous_heads,
)
from neighborhood_attention.backends.triton.tiles import choose_tiles, plan_tiles
from neighborhood_attention.backends.triton.window import (
    block_tokens,
    group_length,
    load_tokens,
    locate_tile,
    masked_scores,
    store_tokens,
    table_block,
    table_entry,
    tile_range,
    token_offsets,
)
from neighborhood_attention.geometry import Neighborhood


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    window: Neighborhood,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output in the dtype of `query`, log-sum-exp in fp32."""
    query, key, value = with_contiguous_heads(query, key, value)
    batch, height, width, heads, _ = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    tile = choose_tiles(query, window).forward
    plan = plan_tiles(tile, window, (height, width), of_keys=False)
    table = build_bias_table(rpb, window, (height, width), plan, query)
    _forward_kernel[(batch * plan.programs * heads,)](
        query, key, value, table, output, lse,
        *query.stride()[:4], *key.stride()[:4], *value.stride()[:4],
        0 if rpb is None else table.stride(0),
        height, width, heads, scale,
        **window_arguments(window), **plan.arguments(), **block_arguments(query, key, value),
        **tile.options,
    )  # fmt: skip
    return output, lse


@triton.jit
def _forward_kernel(
    query, key, value, table, output, lse,
    query_b, query_h, query_w, query_n, key_b, key_h, key_w, key_n,
    value_b, value_h, value_w, value_n, table_n,
    height, width, heads, scale, row_tiles, column_tiles, front_h, back_h, front_w, back_w,
    KERNEL_SIZE_H: tl.constexpr, KERNEL_SIZE_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    IS_CAUSAL_H: tl.constexpr, IS_CAUSAL_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STRIP_H: tl.constexpr, STRIP_W: tl.constexpr,
    COLUMN_STRIPS: tl.constexpr, STRIPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of queries. Grid: (images * dilation groups * tiles * heads,)."""
    batch, head, group_h, group_w, tile_h, tile_w = locate_tile(
        heads, row_tiles, column_tiles, DILATION_H, DILATION_W
    )
    length_h = group_length(group_h, height, DILATION_H)
    length_w = group_length(group_w, width, DILATION_W)
    start_h, end_h = tile_range(
        tile_h, length_h, KERNEL_SIZE_H, STRIDE_H, IS_CAUSAL_H, TILE_H, False
    )
    start_w, _ = tile_range(tile_w, length_w, KERNEL_SIZE_W, STRIDE_W, IS_CAUSAL_W, TILE_W, False)
    entry = table_entry(
        tile_h, tile_w, group_h, group_w, height, width, length_h, length_w,
        front_h, back_h, front_w, back_w, DILATION_H, DILATION_W, TILE_H, TILE_W,
    )  # fmt: skip
    query_row, query_column, is_query = block_tokens(
        tile_h * TILE_H, tile_w * TILE_W, length_h, length_w, group_h, group_w,
        DILATION_H, DILATION_W, TILE_H, TILE_W,
    )  # fmt: skip

    query += batch * query_b + head * query_n
    key += batch * key_b + head * key_n
    value += batch * value_b + head * value_n
    first_token = batch * height * width * heads + head
    output += first_token * HEAD_DIM
    lse += first_token
    table = table_block(table + head * table_n, entry, STRIPS, TILE_H * TILE_W, STRIP_H * STRIP_W)

    query_offsets = token_offsets(query_row, query_column, query_h, query_w, WIDE)
    q = load_tokens(query, query_offsets, is_query, HEAD_DIM, BLOCK_D)
    running_max = tl.full((TILE_H * TILE_W,), -1.0e38, tl.float32)
    running_sum = tl.zeros((TILE_H * TILE_W,), tl.float32)
    running_output = tl.zeros((TILE_H * TILE_W, BLOCK_D), tl.float32)

    for strip in range(tl.cdiv(end_h - start_h, STRIP_H) * COLUMN_STRIPS):
        key_row, key_column, is_key = block_tokens(
            start_h + strip // COLUMN_STRIPS * STRIP_H, start_w + strip % COLUMN_STRIPS * STRIP_W,
            length_h, length_w, group_h, group_w, DILATION_H, DILATION_W, STRIP_H, STRIP_W,
        )  # fmt: skip
        key_offsets = token_offsets(key_row, key_column, key_h, key_w, WIDE)
        k = load_tokens(key, key_offsets, is_key, HEAD_DIM, BLOCK_D)
        value_offsets = token_offsets(key_row, key_column, value_h, value_w, WIDE)
        v = load_tokens(value, value_offsets, is_key, HEAD_DIM, BLOCK_D)
        bias = tl.load(table + strip * (TILE_H * TILE_W * STRIP_H * STRIP_W)).to(tl.float32)

        s = masked_scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale, bias)
        new_max = tl.maximum(running_max, tl.max(s, 1))
        p = tl.exp2(s - new_max[:, None])
        decay = tl.exp2(running_max - new_max)
        running_max = new_max
        running_sum = running_sum * decay + tl.sum(p, 1)
        running_output *= decay[:, None]
        running_output = tl.dot(p.to(v.dtype), v, running_output, input_precision=PRECISION)

    token = token_offsets(query_row, query_column, width * heads, heads, WIDE)
    o = running_output / running_sum[:, None]
    store_tokens(output, token * HEAD_DIM, is_query, o, HEAD_DIM, BLOCK_D)
    tl.store(lse + token, (running_max + tl.log2(running_sum)) / 1.4426950408889634, mask=is_query)
