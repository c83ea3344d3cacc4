"""Fused neighborhood attention, backward. The log-sum-exp gives the probabilities once more:

    p = exp(scale * q k^T + bias - lse)
    dp = dO v^T ; delta = sum(dO * O) - dlse ; ds = p * (dp - delta)
    dq = scale * ds k ; dk = scale * ds^T q ; dv = p^T dO
    dbias[k - q] = sum of ds over images and positions

No kernel needs an atomic operation, so equal inputs give equal bits:

    query gradient        A program owns a tile of queries and walks over strips of keys, as in the
                          forward; it also stores delta.
    key gradient          A program owns a tile of keys and walks over strips of the queries that
                          attend to them. All products have the keys in rows: to transpose the
                          result of a product is slow on Hopper and, before Triton 3.7.1, wrong.
    bias gradient         See `fused_bias_gradient`, `fused_query_bias_gradient`.
    additional gradient   See `fused_additional_gradient`.
    all in one            See `fused_whole_group`.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.triton.bias_table import BiasTable
from neighborhood_attention.backends.triton.fused_additional_gradient import AdditionalGradient
from neighborhood_attention.backends.triton.fused_bias_gradient import BiasGradient
from neighborhood_attention.backends.triton.fused_query_bias_gradient import (
    MAX_STRIPS,
    QueryBiasGradient,
)
from neighborhood_attention.backends.triton.fused_whole_group import WholeGroupGradient
from neighborhood_attention.backends.triton.launch import (
    CACHED_PROBLEMS,
    Launch,
    Layout,
    Problem,
    describe,
    layout,
    plan_arguments,
    reading_launch,
    scale_arguments,
    window_arguments,
)
from neighborhood_attention.backends.triton.products import product
from neighborhood_attention.backends.triton.registers import in_rows
from neighborhood_attention.backends.triton.tile import Tile
from neighborhood_attention.backends.triton.tiles import (
    TilePlan,
    choose_tiles,
    plan_tiles,
)
from neighborhood_attention.backends.triton.window import (
    additional_scores,
    count_strips,
    count_tiles,
    flat_block,
    group_lengths,
    load_additional,
    load_tokens,
    locate_tile,
    masked_gradient,
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


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    inputs: Inputs,
    output: Tensor,
    lse: Tensor,
    window: Neighborhood,
    scale: float,
    gradients: Inputs,
) -> None:
    """Fills the gradients, strided or not."""
    query, key, value, rpb, *additional = inputs
    grads = tuple(map(layout, (grad_output, *gradients[:3])))
    launches = _prepare(describe(inputs), grads, window, scale, gradients.rpb is not None)
    tensors = query, key, value, grad_output
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    saved = output, lse, grad_lse
    if launches.whole_group is not None:
        launches.whole_group.fill(*gradients[:4], rpb, *tensors, *saved)
        return
    delta = torch.empty_like(lse)
    key_table, key_launch = launches.key_gradient
    key_bias = key_table.build(rpb)  # first, so that nothing lies between what follows
    summed, sums = launches.query_bias_gradient, None
    if summed is not None:
        sums = summed.begin(gradients.query, gradients.rpb, delta, rpb, *tensors, *saved)
    else:
        table, launch = launches.query_gradient
        launch(*tensors, *additional, *saved, delta, table.build(rpb), gradients.query)
    key_launch(*tensors, lse, delta, key_bias, gradients.key, gradients.value)
    if summed is not None:
        summed.end(gradients.rpb, sums)
    if launches.bias_gradient is not None:
        launches.bias_gradient.fill(gradients.rpb, rpb, *tensors, lse, delta)
    if gradients.additional_keys is not None and additional[0] is not None:
        launches.additional_gradient.fill(
            *gradients[4:], query, grad_output, *additional, lse, delta
        )


@dataclass(frozen=True)
class _Launches:
    """The launches of a backward pass; None where there is nothing to do, or another does it."""

    whole_group: Any = None  # WholeGroupGradient
    query_gradient: Any = None  # BiasTable, Launch
    query_bias_gradient: Any = None  # QueryBiasGradient
    key_gradient: Any = None  # BiasTable, Launch
    bias_gradient: Any = None  # BiasGradient
    additional_gradient: Any = None  # AdditionalGradient


@lru_cache(CACHED_PROBLEMS)
def _prepare(
    description: tuple[Any, ...],
    grads: tuple[Any, ...],
    window: Neighborhood,
    scale: float,
    needs_bias: bool,
) -> _Launches:
    problem = Problem.of(description)
    layouts = (Layout(*grad) for grad in grads)
    names = "grad_output", "grad_query", "grad_key", "grad_value"
    settings = {
        **scale_arguments(scale),
        **problem.map_arguments(**dict(zip(names, layouts, strict=True))),
        **problem.head_arguments, **problem.additional_arguments, **window_arguments(window),
    }  # fmt: skip
    tiles = choose_tiles(problem, window)
    batch, *spatial, heads, _ = problem.query.shape
    key_heads = problem.key.shape[-2]
    additional = problem.additional_keys

    def plan(tile: Tile, of_keys: bool) -> TilePlan:
        return plan_tiles(tile, window, tuple(spatial), of_keys)

    def prepare(kernel: Any, tile: Tile, of_keys: bool) -> tuple[BiasTable, Launch]:
        tile_plan = plan(tile, of_keys)
        table = BiasTable(problem, window, tile_plan)
        programs = batch * tile_plan.programs * (key_heads if of_keys else heads)
        arguments = {**settings, **plan_arguments(tile_plan), "table_stride": table.head_stride}
        if of_keys:  # what reduces the sums, right before it, has waited for delta
            arguments["WAITS_LAST"] = query_bias_gradient is not None
        return table, reading_launch(kernel, programs, problem, tile, arguments)

    whole = tiles.whole_group and plan(tiles.whole_group, of_keys=True)
    if whole and whole.holds_groups and heads == key_heads and additional is None:
        return _Launches(whole_group=WholeGroupGradient(problem, window, whole, settings))

    query_gradient = query_bias_gradient = bias_gradient = None
    summed = tiles.query_bias_gradient and plan(tiles.query_bias_gradient, of_keys=False)
    if needs_bias and summed and prod(summed.strips) <= MAX_STRIPS and additional is None:
        query_bias_gradient = QueryBiasGradient(problem, window, summed, settings)
    else:
        query_gradient = prepare(_query_gradient_kernel, tiles.query_gradient, of_keys=False)
        if needs_bias:
            bias_gradient = BiasGradient(problem, window, tiles.bias_gradient, settings)
    return _Launches(
        query_gradient=query_gradient,
        query_bias_gradient=query_bias_gradient,
        key_gradient=prepare(_key_gradient_kernel, tiles.key_gradient, of_keys=True),
        bias_gradient=bias_gradient,
        additional_gradient=additional
        and AdditionalGradient(problem, additional.shape[1], settings),
    )


@triton.jit
def _query_gradient_kernel(
    query, key, value, grad_output, additional_key, additional_value,
    output, lse, grad_lse, delta, table, grad_query,
    query_strides, key_strides, value_strides, grad_output_strides, grad_query_strides,
    additional_key_strides, additional_value_strides, additional_count,
    table_stride, size, heads, heads_per_key, scale, front, back,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
    ROW_WARPS: tl.constexpr, COLUMN_WARPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr, OVERLAPS: tl.constexpr,
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
    grad_output += image * grad_output_strides[0] + head * grad_output_strides[4]
    grad_query += image * grad_query_strides[0] + head * grad_query_strides[4]
    first_token = image * size[0] * size[1] * size[2] * heads + head
    output += first_token * VALUE_DIM
    lse += first_token
    delta += first_token
    entry *= STRIPS[0] * STRIPS[1] * STRIPS[2]
    table = flat_block(table + head * table_stride, entry, TILE_TOKENS * STRIP_TOKENS)

    token = token_index(query_token, size, heads, WIDE)
    query_offsets = token_offsets(query_token, query_strides, WIDE)
    q = with_sign(load_tokens(query, query_offsets, is_query, HEAD_DIM, BLOCK_D), SIGN)
    grad_offsets = token_offsets(query_token, grad_output_strides, WIDE)
    do = load_tokens(grad_output, grad_offsets, is_query, VALUE_DIM, BLOCK_V)
    o = load_tokens(output, token * VALUE_DIM, is_query, VALUE_DIM, BLOCK_V)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + first_token + token, mask=is_query, other=0.0)
    tl.store(delta + token, row_delta, mask=is_query)
    row_lse = tl.load(lse + token, mask=is_query, other=0.0) * 1.4426950408889634
    dq = tl.zeros((TILE_TOKENS, BLOCK_D), tl.float32)

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
            dp = product(do, tl.trans(v), PRECISION)
            ds = tl.exp2(s - row_lse[:, None]) * (dp - row_delta[:, None])
            dq = product(ds.to(k.dtype), k, PRECISION, dq)

    strips = count_strips(start, end, STRIP, STRIPS)
    wait_for_others(OVERLAPS)
    next_bias = tl.load(table)  # one strip ahead
    for strip in range(strips):
        first = strip_start(strip, start, STRIP, STRIPS)
        key_token = strip_tokens(first, end, group, DILATION, STRIP)
        key_offsets = token_offsets(key_token, key_strides, WIDE)
        value_offsets = token_offsets(key_token, value_strides, WIDE)
        k = load_tokens(key, key_offsets, None, HEAD_DIM, BLOCK_D)
        v = load_tokens(value, value_offsets, None, VALUE_DIM, BLOCK_V)
        bias = in_rows(next_bias, TILE_TOKENS, STRIP_TOKENS, ROW_WARPS, COLUMN_WARPS)
        next_strip = tl.minimum(strip + 1, strips - 1)
        next_bias = tl.load(table + next_strip * (TILE_TOKENS * STRIP_TOKENS))

        dots = product(q, tl.trans(k), PRECISION)
        s = masked_scores(dots, scale, bias.to(tl.float32))
        dp = product(do, tl.trans(v), PRECISION)
        p = tl.exp2(s - row_lse[:, None])
        ds = masked_gradient(p, dp, row_delta[:, None])
        dq = product(ds.to(k.dtype), k, PRECISION, dq)

    grad_query_offsets = token_offsets(query_token, grad_query_strides, WIDE)
    store_tokens(grad_query, grad_query_offsets, is_query, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_gradient_kernel(
    query, key, value, grad_output, lse, delta, table, grad_key, grad_value,
    query_strides, key_strides, value_strides, grad_output_strides,
    grad_key_strides, grad_value_strides,
    table_stride, size, heads, heads_per_key, scale, front, back,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
    ROW_WARPS: tl.constexpr, COLUMN_WARPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, SIGN: tl.constexpr, WIDE: tl.constexpr,
    OVERLAPS: tl.constexpr, WAITS_LAST: tl.constexpr,
):  # fmt: skip
    """One tile of keys. Grid: (images * dilation groups * tiles * key heads,)."""
    TILE_TOKENS: tl.constexpr = TILE[0] * TILE[1] * TILE[2]
    STRIP_TOKENS: tl.constexpr = STRIP[0] * STRIP[1] * STRIP[2]
    tiles = count_tiles(size, DILATION, TILE)
    image, key_head, group, tile = locate_tile(heads // heads_per_key, tiles, DILATION)
    length = group_lengths(group, size, DILATION)
    start, end = tile_ranges(tile, length, KERNEL_SIZE, STRIDE, IS_CAUSAL, TILE, True)
    entry = table_entry(tile, group, size, length, front, back, DILATION, TILE)
    key_token, is_key = tile_tokens(tile, length, group, DILATION, TILE)

    query += image * query_strides[0]
    key += image * key_strides[0] + key_head * key_strides[4]
    value += image * value_strides[0] + key_head * value_strides[4]
    grad_output += image * grad_output_strides[0]
    grad_key += image * grad_key_strides[0] + key_head * grad_key_strides[4]
    grad_value += image * grad_value_strides[0] + key_head * grad_value_strides[4]
    lse += image * size[0] * size[1] * size[2] * heads
    delta += image * size[0] * size[1] * size[2] * heads
    entry *= STRIPS[0] * STRIPS[1] * STRIPS[2]
    table = flat_block(table, entry, TILE_TOKENS * STRIP_TOKENS)

    key_offsets = token_offsets(key_token, key_strides, WIDE)
    value_offsets = token_offsets(key_token, value_strides, WIDE)
    k = with_sign(load_tokens(key, key_offsets, is_key, HEAD_DIM, BLOCK_D), SIGN)
    v = load_tokens(value, value_offsets, is_key, VALUE_DIM, BLOCK_V)
    dk = tl.zeros((TILE_TOKENS, BLOCK_D), tl.float32)
    dv = tl.zeros((TILE_TOKENS, BLOCK_V), tl.float32)

    wait_for_others(OVERLAPS and not WAITS_LAST)
    for head in range(key_head * heads_per_key, (key_head + 1) * heads_per_key):
        strips = count_strips(start, end, STRIP, STRIPS)
        next_bias = tl.load(table + head * table_stride)  # one strip ahead
        for strip in range(strips):
            first = strip_start(strip, start, STRIP, STRIPS)
            query_token = strip_tokens(first, end, group, DILATION, STRIP)
            query_offsets = token_offsets(query_token, query_strides, WIDE)
            grad_offsets = token_offsets(query_token, grad_output_strides, WIDE)
            token = token_index(query_token, size, heads, WIDE)
            q = load_tokens(query + head * query_strides[4], query_offsets, None, HEAD_DIM, BLOCK_D)
            do = load_tokens(
                grad_output + head * grad_output_strides[4], grad_offsets, None, VALUE_DIM, BLOCK_V
            )  # fmt: skip
            row_lse = tl.load(lse + head + token) * 1.4426950408889634
            row_delta = tl.load(delta + head + token)
            bias = in_rows(next_bias, TILE_TOKENS, STRIP_TOKENS, ROW_WARPS, COLUMN_WARPS)
            next_strip = tl.minimum(strip + 1, strips - 1)
            next_strip *= TILE_TOKENS * STRIP_TOKENS
            next_bias = tl.load(table + head * table_stride + next_strip)

            dots = product(k, tl.trans(q), PRECISION)
            s = masked_scores(dots, scale, bias.to(tl.float32))
            dp = product(v, tl.trans(do), PRECISION)
            p = tl.exp2(s - row_lse[None, :])
            dv = product(p.to(do.dtype), do, PRECISION, dv)
            ds = masked_gradient(p, dp, row_delta[None, :])
            dk = product(ds.to(q.dtype), q, PRECISION, dk)

    wait_for_others(OVERLAPS and WAITS_LAST)  # this kernel's end shall be that of both
    key_offsets = token_offsets(key_token, grad_key_strides, WIDE)
    store_tokens(grad_key, key_offsets, is_key, dk * scale, HEAD_DIM, BLOCK_D)
    value_offsets = token_offsets(key_token, grad_value_strides, WIDE)
    store_tokens(grad_value, value_offsets, is_key, dv, VALUE_DIM, BLOCK_V)
