"""Fused neighborhood attention, forward: softmax(scale * Q K^T + bias) V in one pass, tile by tile.

A program owns a tile of queries of one dilation group. It walks over the additional keys, then over
strips of the keys that its queries attend to, and keeps a running maximum m, sum l and output o
(online softmax, arXiv 1805.02867; FlashAttention, arXiv 2205.14135):

    s = (scale * q k^T + bias) log2 e    [queries, keys of the strip]; -inf outside the window
    m' = max(m, max s) ; p = 2^(s - m')
    l = l 2^(m - m') + sum p ; o = o 2^(m - m') + p v

and at the end output = o / l, lse = (m + log2 l) / log2 e. Where keys stay in a ring, where a tile
holds a dilation group and where there are few tokens, kernels of their own do the same.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.triton.bias_table import BiasTable
from neighborhood_attention.backends.triton.fused_direct_forward import (
    NoTable,
    direct_forward,
    direct_plan,
)
from neighborhood_attention.backends.triton.fused_ring_forward import is_worth_it, ring_forward
from neighborhood_attention.backends.triton.fused_whole_group_forward import whole_group_forward
from neighborhood_attention.backends.triton.launch import (
    CACHED_PROBLEMS,
    Launch,
    Problem,
    describe,
    describe_packed,
    plan_arguments,
    reading_launch,
    scale_arguments,
    window_arguments,
)
from neighborhood_attention.backends.triton.products import product
from neighborhood_attention.backends.triton.registers import in_rows
from neighborhood_attention.backends.triton.ring import ALIGNMENT
from neighborhood_attention.backends.triton.ring import takes as takes_ring
from neighborhood_attention.backends.triton.tiles import TilePlan, choose_tiles, plan_tiles
from neighborhood_attention.backends.triton.window import (
    add_strip,
    additional_scores,
    count_strips,
    count_tiles,
    flat_block,
    group_lengths,
    is_overflow,
    load_additional,
    load_tokens,
    locate_tile,
    masked_scores,
    store_tokens,
    strip_start,
    strip_tokens,
    table_entry,
    tile_ranges,
    tile_tokens,
    token_index,
    token_offsets,
    wait_for_others,
    with_sign,
)
from neighborhood_attention.geometry import Neighborhood


def forward(inputs: Inputs, window: Neighborhood, scale: float) -> tuple[Tensor, Tensor]:
    """Output in the dtype of the query, log-sum-exp in fp32; the inputs may be strided."""
    query, key, value, rpb, *additional = inputs
    shape, device = query.shape[:-1], query.device
    output = torch.empty((*shape, value.shape[-1]), dtype=query.dtype, device=device)
    lse = torch.empty(shape, dtype=torch.float32, device=device)
    if output.numel() > 0:
        is_aligned = not any(x.data_ptr() % ALIGNMENT for x in (query, key, value))
        table, launch, takes_additional = _prepare(describe(inputs), window, scale, is_aligned)
        tensors = (query, key, value, *additional) if takes_additional else (query, key, value)
        launch(*tensors, table.build(rpb), output, lse)
    return output, lse


def forward_packed(
    qkv: Tensor, rpb: Tensor | None, window: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """As `forward` of the parts of `qkv`, without the time that it takes to make views of them."""
    *rows, _, heads, head_dim = qkv.shape
    output = torch.empty((*rows, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((*rows, heads), dtype=torch.float32, device=qkv.device)
    if output.numel() > 0:
        query, step = qkv.data_ptr(), qkv.stride(-3) * qkv.itemsize
        is_aligned = (query | step) % ALIGNMENT == 0
        description = describe_packed(qkv, rpb)
        table, launch, takes_additional = _prepare(description, window, scale, is_aligned)
        built = table.build(rpb)
        additional = (0, 0) if takes_additional else ()
        bias = 0 if built is None else built.data_ptr()
        results = bias, output.data_ptr(), lse.data_ptr()
        if not launch.at([query, query + step, query + 2 * step, *additional, *results]):
            none = (None,) * len(additional)
            launch(*qkv.unbind(-3), *none, built, output, lse)
    return output, lse


@lru_cache(CACHED_PROBLEMS)
def _prepare(
    description: tuple[Any, ...], window: Neighborhood, scale: float, is_aligned: bool
) -> tuple[BiasTable | NoTable, Launch, bool]:
    problem = Problem.of(description)
    settings = {
        **scale_arguments(scale), **problem.map_arguments(), **problem.head_arguments,
        **problem.additional_arguments, **window_arguments(window),
    }  # fmt: skip
    direct = direct_plan(problem, window)
    if direct is not None:
        return NoTable(), direct_forward(problem, direct, settings), False
    plan = _choose_plan(problem, window, is_aligned)
    table = BiasTable(problem, window, plan)
    settings["table_stride"] = table.head_stride
    if plan.in_ring:
        return table, ring_forward(problem, plan, settings), False
    is_whole_group = plan.holds_groups and plan.tile.tile == plan.tile.strip
    if is_whole_group and problem.additional_keys is None:
        return table, whole_group_forward(problem, plan, settings), False
    programs = problem.query.shape[0] * plan.programs * problem.query.shape[-2]
    settings |= plan_arguments(plan)
    return table, reading_launch(_forward_kernel, programs, problem, plan.tile, settings), True


def _choose_plan(problem: Problem, window: Neighborhood, is_aligned: bool) -> TilePlan:
    """With the keys in a ring, if that can and should be."""
    tiles, spatial = choose_tiles(problem, window), tuple(problem.spatial)
    if tiles.ring_forward is not None and is_aligned:
        plan = plan_tiles(tiles.ring_forward, window, spatial, of_keys=False)
        if takes_ring(problem, window, plan) and is_worth_it(problem, plan):
            return plan
    return plan_tiles(tiles.forward, window, spatial, of_keys=False)


@triton.jit
def _forward_kernel(
    query, key, value, additional_key, additional_value, table, output, lse,
    query_strides, key_strides, value_strides,
    additional_key_strides, additional_value_strides, additional_count,
    table_stride, size, heads, heads_per_key, scale, front, back,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
    ROW_WARPS: tl.constexpr, COLUMN_WARPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, SIGN: tl.constexpr,
    WIDE: tl.constexpr, EQUAL_STRIDES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One tile of queries. Grid: (images * dilation groups * tiles * heads,)."""
    TILE_TOKENS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    STRIP_TOKENS: tl.constexpr = STRIP[0] * STRIP[1] * STRIP[2]
    tiles = count_tiles(size, DILATION, TILE)
    image, head, group, tile = locate_tile(heads, tiles, DILATION)
    length = group_lengths(group, size, DILATION)
    start, end = tile_ranges(tile, length, KERNEL_SIZE, STRIDE, IS_CAUSAL, TILE, False)
    entry = table_entry(tile, group, size, length, front, back, DILATION, TILE)
    query_token, is_query = tile_tokens(tile, length, group, DILATION, TILE)

    key_head = head // heads_per_key
    query += image * query_strides[0] + head * query_strides[4]
    key += image * key_strides[0] + key_head * key_strides[4]
    value += image * value_strides[0] + key_head * value_strides[4]
    first_token = image * size[0] * size[1] * size[2] * heads + head
    output += first_token * VALUE_DIM
    lse += first_token
    entry *= STRIPS[0] * STRIPS[1] * STRIPS[2]
    table = flat_block(table + head * table_stride, entry, TILE_TOKENS * STRIP_TOKENS)

    query_offsets = token_offsets(query_token, query_strides, WIDE)
    q = with_sign(load_tokens(query, query_offsets, is_query, HEAD_DIM, BLOCK_D), SIGN)
    running_max = tl.full((TILE_TOKENS,), -3.4e38, tl.float32)
    running_sum = tl.zeros((TILE_TOKENS,), tl.float32)
    running_output = tl.zeros((TILE_TOKENS, BLOCK_V), tl.float32)

    if additional_key is not None:
        for first_key in range(0, additional_count, STRIP_TOKENS):
            k = load_additional(
                additional_key, additional_key_strides, image, key_head, first_key,
                additional_count, STRIP_TOKENS, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
            v = load_additional(
                additional_value, additional_value_strides, image, key_head, first_key,
                additional_count, STRIP_TOKENS, VALUE_DIM, BLOCK_V,
            )  # fmt: skip
            dots = product(q, tl.trans(k), PRECISION)
            s = additional_scores(dots, scale, first_key, additional_count, STRIP_TOKENS)
            running_max, running_sum, running_output = add_strip(
                running_max, running_sum, running_output, s, v, PRECISION
            )

    wait_for_others(OVERLAPS)
    for strip in range(count_strips(start, end, STRIP, STRIPS)):
        first = strip_start(strip, start, STRIP, STRIPS)
        key_token = strip_tokens(first, end, group, DILATION, STRIP)
        key_offsets = token_offsets(key_token, key_strides, WIDE)
        value_offsets = key_offsets
        if not EQUAL_STRIDES:
            value_offsets = token_offsets(key_token, value_strides, WIDE)
        k = load_tokens(key, key_offsets, None, HEAD_DIM, BLOCK_D)
        v = load_tokens(value, value_offsets, None, VALUE_DIM, BLOCK_V)
        bias = tl.load(table + strip * (TILE_TOKENS * STRIP_TOKENS))
        bias = in_rows(bias, TILE_TOKENS, STRIP_TOKENS, ROW_WARPS, COLUMN_WARPS)
        dots = product(q, tl.trans(k), PRECISION)
        s = masked_scores(dots, scale, bias.to(tl.float32))
        running_max, running_sum, running_output = add_strip(
            running_max, running_sum, running_output, s, v, PRECISION
        )

    # No softmax of what `masked_scores` clamped.
    running_sum = tl.where(is_overflow(running_max, scale), float("nan"), running_sum)
    token = token_index(query_token, size, heads, WIDE)
    result = running_output * (1.0 / running_sum)[:, None]
    store_tokens(output, token * VALUE_DIM, is_query, result, VALUE_DIM, BLOCK_V)
    result = (running_max + tl.log2(running_sum)) / 1.4426950408889634
    tl.store(lse + token, result, mask=is_query)
