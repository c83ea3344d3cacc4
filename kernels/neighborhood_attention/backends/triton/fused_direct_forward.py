"""The forward of few tokens, where a launch costs more than its work: no table of biases.

A program holds all keys that its queries attend to, fetches their biases score by score, and does
the softmax at once: s = (scale * q k^T + bias) log2 e ; m = max s ; p = 2^(s - m) ;
o = p v / sum p. It may begin while the kernel before it runs (programmatic dependent launch), and
reads nothing before that has ended. Then it lets the one behind it begin, and not before: programs
of several kernels that wait take the room in which those of one should run.
"""

from math import prod
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from neighborhood_attention.backends.triton import tile_table
from neighborhood_attention.backends.triton.launch import (
    Launch,
    Problem,
    plan_arguments,
    reading_launch,
)
from neighborhood_attention.backends.triton.products import product
from neighborhood_attention.backends.triton.tile import Tile
from neighborhood_attention.backends.triton.tiles import TilePlan, plan_tiles, tile_axes
from neighborhood_attention.backends.triton.window import (
    attending_pairs,
    block_positions,
    count_tiles,
    group_lengths,
    is_overflow,
    load_tokens,
    locate_tile,
    masked_scores,
    pairs_bias,
    rounded_bias,
    store_tokens,
    strip_tokens,
    tile_ranges,
    tile_tokens,
    token_index,
    token_offsets,
    with_sign,
)
from neighborhood_attention.geometry import Neighborhood

# Queries of a program, by the number of axes.
TILES = {1: (1, 1, 16), 2: (1, 2, 8), 3: (1, 4, 4)}
MAX_KEYS = 256  # of a program, in whole powers of 2 an axis
MAX_HEAD_DIM = 64
# Elements of the query, of one image at 56x56 with two heads of 32 the most that was measured.
MAX_ELEMENTS = 2**18


def is_worth_it(problem: Problem) -> bool:
    """Whether launches count more than work, as measured: maps, heads of up to 32, Hopper."""
    return (
        len(problem.spatial) == 2
        and problem.head_arguments["BLOCK_D"] <= 32
        and prod(problem.query.shape) <= MAX_ELEMENTS
        and tile_table.capability(problem.device) == "9.0"
    )


def direct_plan(problem: Problem, window: Neighborhood) -> TilePlan | None:
    """The tiles, and the strip that holds all keys of one; None where another kernel must do it."""
    arguments = problem.head_arguments
    is_light = max(arguments["BLOCK_D"], arguments["BLOCK_V"]) <= MAX_HEAD_DIM
    is_half = problem.query.dtype.itemsize == 2
    if not (is_half and is_light and problem.additional_keys is None and is_worth_it(problem)):
        return None
    tile, spatial = TILES[window.dims], tuple(problem.spatial)
    axes = tile_axes(tile, window, spatial, of_keys=False)
    extents = [triton.next_power_of_2(axis.extent) for axis in axes]
    extents[-1] = max(extents[-1], 16 // prod(extents[:-1]))  # tensor cores take no less
    if prod(extents) > MAX_KEYS:
        return None
    strip = extents[0], extents[1], extents[2]
    return plan_tiles(Tile(tile, strip, num_warps=4, num_stages=1), window, spatial, of_keys=False)


def direct_forward(problem: Problem, plan: TilePlan, settings: dict[str, Any]) -> Launch:
    """Its tensors are query, key, value, bias, output and lse."""
    programs = problem.query.shape[0] * plan.programs * problem.query.shape[-2]
    arguments = settings | plan_arguments(plan)
    return reading_launch(_direct_forward_kernel, programs, problem, plan.tile, arguments)


class NoTable:
    """The bias itself, in place of a table made of it."""

    def build(self, rpb: Tensor | None) -> Tensor | None:
        """What the kernel reads."""
        return None if rpb is None else rpb.contiguous()


@triton.jit
def _direct_forward_kernel(
    query, key, value, rpb, output, lse,
    query_strides, key_strides, value_strides, size, heads, heads_per_key, scale,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr, TILE: tl.constexpr, STRIP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, SIGN: tl.constexpr,
    WIDE: tl.constexpr, EQUAL_STRIDES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One tile of queries. Grid: (images * dilation groups * tiles * heads,)."""
    tiles = count_tiles(size, DILATION, TILE)
    image, head, group, tile = locate_tile(heads, tiles, DILATION)
    length = group_lengths(group, size, DILATION)
    start, end = tile_ranges(tile, length, KERNEL_SIZE, STRIDE, IS_CAUSAL, TILE, False)
    inner = block_positions(TILE, tl.arange(0, TILE[0] * TILE[1] * TILE[2]))
    outer = block_positions(STRIP, tl.arange(0, STRIP[0] * STRIP[1] * STRIP[2]))
    attends_d, index_d = attending_pairs(
        (tile[0] * TILE[0] + inner[0])[:, None], (start[0] + outer[0])[None, :], length[0],
        KERNEL_SIZE[0], STRIDE[0], IS_CAUSAL[0], False,
    )  # fmt: skip
    attends_h, index_h = attending_pairs(
        (tile[1] * TILE[1] + inner[1])[:, None], (start[1] + outer[1])[None, :], length[1],
        KERNEL_SIZE[1], STRIDE[1], IS_CAUSAL[1], False,
    )  # fmt: skip
    attends_w, index_w = attending_pairs(
        (tile[2] * TILE[2] + inner[2])[:, None], (start[2] + outer[2])[None, :], length[2],
        KERNEL_SIZE[2], STRIDE[2], IS_CAUSAL[2], False,
    )  # fmt: skip
    token, is_query = tile_tokens(tile, length, group, DILATION, TILE)
    key_token = strip_tokens(start, end, group, DILATION, STRIP)
    offsets = token_offsets(key_token, key_strides, WIDE)
    value_offsets = offsets
    if not EQUAL_STRIDES:
        value_offsets = token_offsets(key_token, value_strides, WIDE)
    key_head = head // heads_per_key
    query += image * query_strides[0] + head * query_strides[4]
    key += image * key_strides[0] + key_head * key_strides[4]
    value += image * value_strides[0] + key_head * value_strides[4]
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    q = load_tokens(query, token_offsets(token, query_strides, WIDE), is_query, HEAD_DIM, BLOCK_D)
    k = load_tokens(key, offsets, None, HEAD_DIM, BLOCK_D)
    v = load_tokens(value, value_offsets, None, VALUE_DIM, BLOCK_V)
    attends = attends_d & attends_h & attends_w
    bias = pairs_bias(rpb, head, attends, index_d, index_h, index_w, KERNEL_SIZE)
    bias = rounded_bias(bias, query.dtype.element_ty).to(tl.float32)
    dots = product(with_sign(q, SIGN), tl.trans(k), PRECISION)
    s = masked_scores(dots, scale, bias)
    row_max = tl.maximum(tl.max(s, 1), -3.4e38)  # of a token that is none: -inf
    p = tl.exp2(s - row_max[:, None])
    row_sum = tl.sum(p, 1)
    row_sum = tl.where(is_overflow(row_max, scale), float("nan"), row_sum)
    result = product(p.to(v.dtype), v, PRECISION) * (1.0 / row_sum)[:, None]
    first_token = image * size[0] * size[1] * size[2] * heads + head
    index = token_index(token, size, heads, WIDE)
    store_tokens(
        output + first_token * VALUE_DIM, index * VALUE_DIM, is_query, result, VALUE_DIM, BLOCK_V
    )
    row_lse = (row_max + tl.log2(row_sum)) / 1.4426950408889634
    tl.store(lse + first_token + index, row_lse, mask=is_query)
