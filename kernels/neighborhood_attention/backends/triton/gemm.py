"""The batched-GEMM backend: the unfused steps with their products on tensor cores.

See `unfused` for the steps. A program owns a tile of tokens of one dilation group and walks over
strips of the tokens that they meet, their halo, one matrix product a strip. Only the slots of each
query's window are written or read: a weight that no query of the tile has is computed and dropped,
or enters as zero.

How that maps to the threadblock-level formulation of "Faster Neighborhood Attention" (arXiv
2403.04690). Its batched GEMM runs over images, heads and dilation groups, and a threadblock's tile
is a spatial one, M tokens of a box in place of M neighboring rows:

    paper                                          here
    M: tile of queries (of keys for dv, dk)        TILE, prod(TILE) tokens
    haloed tile of keys (of queries for dv, dk)    STRIPS of STRIP tokens, TILE + window - 1 an axis
    PN (q k^T, dO v^T): N the halo, K head dim     one product a strip, its N; K the whole head dim
    NN (p v, ds k): N head dim, K the halo         an accumulating product a strip, its K
    IN (p^T dO, ds^T q): as NN, inverse halo       the same, tiles of keys; p is read transposed
    predicated scatter of weights, gather          pointers by slot, masked
"""

from functools import partial
from typing import Any

import triton
import triton.language as tl

from neighborhood_attention.backends.triton import unfused
from neighborhood_attention.backends.triton.launch import Launch, Problem, plan_arguments
from neighborhood_attention.backends.triton.products import product
from neighborhood_attention.backends.triton.slots import (
    in_columns,
    in_group,
    in_rows,
    pair_slots,
    weights_of,
)
from neighborhood_attention.backends.triton.tile import Tile
from neighborhood_attention.backends.triton.tiles import plan_tiles
from neighborhood_attention.backends.triton.window import (
    block_tokens,
    count_strips,
    count_tiles,
    group_lengths,
    load_tokens,
    locate_tile,
    store_tokens,
    strip_start,
    tile_ranges,
    tile_tokens,
    token_index,
    token_offsets,
)
from neighborhood_attention.geometry import Neighborhood

# By the number of axes; the fastest, over all, of those measured on an H200 (benchmarks/NOTES.md).
TILES = {
    1: Tile((1, 1, 32), (1, 1, 32), num_warps=2),
    2: Tile((1, 4, 8), (1, 4, 8), num_warps=2),
    3: Tile((2, 2, 4), (2, 4, 4), num_warps=1),
}
# For heads of more than 256 bytes, within the shared memory of small GPUs.
HUGE_HEADS = {
    1: Tile((1, 1, 32), (1, 1, 16), num_warps=4, num_stages=1),
    2: Tile((1, 4, 8), (1, 4, 4), num_warps=4, num_stages=1),
    3: Tile((2, 4, 4), (1, 4, 4), num_warps=4, num_stages=1),
}


def launch(
    kernel: Any, problem: Problem, window: Neighborhood, of_keys: bool, arguments: dict[str, Any]
) -> Launch:
    """A launch of one of the kernels below."""
    batch, *spatial, heads, _ = problem.query.shape
    is_huge = arguments["BLOCK_D"] * problem.query.dtype.itemsize > 256
    tile = (HUGE_HEADS if is_huge else TILES)[window.dims]
    plan = plan_tiles(tile, window, tuple(spatial), of_keys)
    arguments = arguments | plan_arguments(plan)
    return Launch(kernel, batch * plan.programs * heads, arguments, **tile.options)


@triton.jit
def _products_kernel(
    rows, columns, rpb, lse, weights,
    row_strides, column_strides, size, heads, scale,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of queries. Grid: (images * dilation groups * tiles * heads,)."""
    WINDOW: tl.constexpr = KERNEL_SIZE[0] * KERNEL_SIZE[1] * KERNEL_SIZE[2]
    tiles = count_tiles(size, DILATION, TILE)
    image, head, group, tile = locate_tile(heads, tiles, DILATION)
    length = group_lengths(group, size, DILATION)
    start, end = tile_ranges(tile, length, KERNEL_SIZE, STRIDE, IS_CAUSAL, TILE, False)
    query_token, is_query = tile_tokens(tile, length, group, DILATION, TILE)
    query = in_rows(in_group(query_token, DILATION))
    first_token = image * size[0] * size[1] * size[2] * heads + head
    rows += image * row_strides[0] + head * row_strides[4]
    columns += image * column_strides[0] + head * column_strides[4]
    q = load_tokens(
        rows, token_offsets(query_token, row_strides, WIDE), is_query, HEAD_DIM, BLOCK_D
    )
    row_lse = None
    if lse is not None:
        index = first_token + token_index(query_token, size, heads, WIDE)
        row_lse = tl.load(lse + index, mask=is_query, other=0.0)[:, None]
    weights += first_token * WINDOW
    row_index = token_index(query_token, size, heads * WINDOW, WIDE)[:, None]

    for strip in range(count_strips(start, end, STRIP, STRIPS)):
        first = strip_start(strip, start, STRIP, STRIPS)
        key_token, is_key = block_tokens(first, length, group, DILATION, STRIP)
        offsets = token_offsets(key_token, column_strides, WIDE)
        k = load_tokens(columns, offsets, is_key, HEAD_DIM, BLOCK_D)
        dots = product(q, tl.trans(k), PRECISION)
        key = in_columns(in_group(key_token, DILATION))
        slot, attends = pair_slots(query, key, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        attends &= is_query[:, None]
        result = weights_of(dots, scale, rpb, row_lse, head, query, key, attends, KERNEL_SIZE)
        tl.store(weights + row_index + slot, result.to(weights.dtype.element_ty), mask=attends)


@triton.jit
def _sums_kernel(
    weights, columns, sums,
    column_strides, sum_strides, size, heads, scale,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of queries. Grid: (images * dilation groups * tiles * heads,)."""
    WINDOW: tl.constexpr = KERNEL_SIZE[0] * KERNEL_SIZE[1] * KERNEL_SIZE[2]
    tiles = count_tiles(size, DILATION, TILE)
    image, head, group, tile = locate_tile(heads, tiles, DILATION)
    length = group_lengths(group, size, DILATION)
    start, end = tile_ranges(tile, length, KERNEL_SIZE, STRIDE, IS_CAUSAL, TILE, False)
    query_token, is_query = tile_tokens(tile, length, group, DILATION, TILE)
    query = in_rows(in_group(query_token, DILATION))
    columns += image * column_strides[0] + head * column_strides[4]
    sums += image * sum_strides[0] + head * sum_strides[4]
    weights += (image * size[0] * size[1] * size[2] * heads + head) * WINDOW
    row_index = token_index(query_token, size, heads * WINDOW, WIDE)[:, None]
    total = tl.zeros((TILE[0] * TILE[1] * TILE[2], BLOCK_D), tl.float32)

    for strip in range(count_strips(start, end, STRIP, STRIPS)):
        first = strip_start(strip, start, STRIP, STRIPS)
        key_token, is_key = block_tokens(first, length, group, DILATION, STRIP)
        key = in_columns(in_group(key_token, DILATION))
        slot, attends = pair_slots(query, key, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        p = tl.load(weights + row_index + slot, mask=attends & is_query[:, None], other=0.0)
        offsets = token_offsets(key_token, column_strides, WIDE)
        v = load_tokens(columns, offsets, is_key, HEAD_DIM, BLOCK_D)
        total = product(p, v, PRECISION, total)

    offsets = token_offsets(query_token, sum_strides, WIDE)
    store_tokens(sums, offsets, is_query, total * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_sums_kernel(
    weights, rows, sums,
    row_strides, sum_strides, size, heads, scale,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of keys. Grid: (images * dilation groups * tiles * heads,)."""
    WINDOW: tl.constexpr = KERNEL_SIZE[0] * KERNEL_SIZE[1] * KERNEL_SIZE[2]
    tiles = count_tiles(size, DILATION, TILE)
    image, head, group, tile = locate_tile(heads, tiles, DILATION)
    length = group_lengths(group, size, DILATION)
    start, end = tile_ranges(tile, length, KERNEL_SIZE, STRIDE, IS_CAUSAL, TILE, True)
    key_token, is_key = tile_tokens(tile, length, group, DILATION, TILE)
    key = in_rows(in_group(key_token, DILATION))
    rows += image * row_strides[0] + head * row_strides[4]
    sums += image * sum_strides[0] + head * sum_strides[4]
    weights += (image * size[0] * size[1] * size[2] * heads + head) * WINDOW
    total = tl.zeros((TILE[0] * TILE[1] * TILE[2], BLOCK_D), tl.float32)

    for strip in range(count_strips(start, end, STRIP, STRIPS)):
        first = strip_start(strip, start, STRIP, STRIPS)
        query_token, is_query = block_tokens(first, length, group, DILATION, STRIP)
        query = in_columns(in_group(query_token, DILATION))
        slot, attends = pair_slots(query, key, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        attends &= is_query[None, :] & is_key[:, None]
        index = token_index(query_token, size, heads * WINDOW, WIDE)[None, :] + slot
        p = tl.load(weights + index, mask=attends, other=0.0)
        offsets = token_offsets(query_token, row_strides, WIDE)
        q = load_tokens(rows, offsets, is_query, HEAD_DIM, BLOCK_D)
        total = product(p, q, PRECISION, total)

    offsets = token_offsets(key_token, sum_strides, WIDE)
    store_tokens(sums, offsets, is_key, total * scale, HEAD_DIM, BLOCK_D)


METHOD = unfused.Method(_products_kernel, _sums_kernel, _key_sums_kernel, launch)
supports = unfused.supports
forward = partial(unfused.forward, METHOD)
backward = partial(unfused.backward, METHOD)
