"""The forward of two-dimensional windows by a walk down the map, with the keys in a ring.

A program owns tiles of queries that lie one below the other. Neighbors share most of their strips
of keys, so that strips stay in shared memory: what the next tile lacks takes the place of what it
no longer needs, while this one is computed. All strips of a tile are there at once, and so its
softmax is done at once:

    s = (scale * q k^T + bias) log2 e ; m = max s ; p = 2^(s - m) ; o = p v / sum p

Table and forward overlap: a program fetches its first strips while the table is made.
"""

from math import ceil
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere

from neighborhood_attention.backends.triton.launch import (
    Launch,
    Problem,
    plan_arguments,
    reading_launch,
)
from neighborhood_attention.backends.triton.ring import (
    copy_strips,
    copy_tile,
    load_bias,
    product_layout,
    row_layout,
    shared_layout,
    tile_offsets,
)
from neighborhood_attention.backends.triton.tiles import TilePlan
from neighborhood_attention.backends.triton.window import (
    count_tiles,
    group_lengths,
    is_overflow,
    masked_scores,
    ring_strip,
    table_entry,
    tile_range,
    wait_for_others,
    with_sign,
)


def is_worth_it(problem: Problem, plan: TilePlan) -> bool:
    """Whether there is work for programs that walk; else the plain forward is left to do it."""
    return _tiles_of_a_program(problem, plan) >= min(2, plan.tile.walk or 0)


def ring_forward(problem: Problem, plan: TilePlan, settings: dict[str, Any]) -> Launch:
    """Its tensors are query, key, value, table, output and lse."""
    batch, heads = problem.query.shape[0], problem.query.shape[-2]
    _, rows, columns = plan.axes
    assert plan.tile.walk is not None
    walk = min(plan.tile.walk, _tiles_of_a_program(problem, plan))
    parts = ceil(rows.tiles / walk)
    programs = batch * plan.groups * parts * columns.tiles * heads
    arguments = {
        **settings, **plan_arguments(plan), "walk": ceil(rows.tiles / parts), "parts": parts,
    }  # fmt: skip
    return reading_launch(_ring_forward_kernel, programs, problem, plan.tile, arguments)


def _tiles_of_a_program(problem: Problem, plan: TilePlan) -> int:
    return problem.query.shape[0] * plan.programs * problem.query.shape[-2] // plan.tile.programs


@gluon.jit(do_not_specialize=["walk", "parts"])
def _ring_forward_kernel(
    query, key, value, table, output, lse,
    query_strides, table_stride, size, heads, heads_per_key, scale, front, back, walk, parts,
    KERNEL_SIZE: gl.constexpr, DILATION: gl.constexpr,
    TILE: gl.constexpr, STRIP: gl.constexpr, STRIPS: gl.constexpr, ROW_WARPS: gl.constexpr,
    HEAD_DIM: gl.constexpr, SIGN: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """Tiles of a column. Grid: (images * dilation groups * parts * columns of tiles * heads,)."""
    RING: gl.constexpr = STRIPS[1]
    STEP: gl.constexpr = TILE[1] // STRIP[1]
    QUERIES: gl.constexpr = TILE[1] * TILE[2]
    KEYS: gl.constexpr = STRIP[1] * STRIP[2]
    dtype: gl.constexpr = query.dtype.element_ty
    product: gl.constexpr = product_layout(ROW_WARPS)
    left: gl.constexpr = gl.DotOperandLayout(0, product, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, product, 2)
    rows: gl.constexpr = row_layout(HEAD_DIM, ROW_WARPS)
    shared: gl.constexpr = shared_layout(HEAD_DIM)

    # Where it is. The head runs fastest: heads lie side by side in memory.
    tiles = count_tiles(size, DILATION, TILE)
    program = gl.program_id(0)
    head = (program % heads).to(gl.int64)
    program //= heads
    column = program % tiles[2]
    program //= tiles[2]
    part = program % parts
    program //= parts
    group_w = program % DILATION[2]
    program //= DILATION[2]
    group = (program * 0, program % DILATION[1], group_w)
    image = (program // DILATION[1]).to(gl.int64)
    length = group_lengths(group, size, DILATION)
    first = part * walk
    last = gl.minimum(first + walk, (length[1] + TILE[1] - 1) // TILE[1])
    start, end = tile_range(column, length[2], KERNEL_SIZE[2], 1, False, TILE[2], False)

    offset = image * query_strides[0]
    query += offset + head * query_strides[4]
    key += offset + head // heads_per_key * query_strides[4]
    value += offset + head // heads_per_key * query_strides[4]
    first_token = image * size[0] * size[1] * size[2] * heads + head
    output += first_token * HEAD_DIM
    lse += first_token
    table += head * table_stride

    place = gl.arange(0, KEYS, layout=gl.SliceLayout(1, rows))
    key_column = gl.minimum(start + place % STRIP[2], gl.maximum(end, 1) - 1)
    offsets = (key_column * DILATION[2] + group[2]) * query_strides[3]
    offsets = offsets[:, None] + gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, rows))[None, :]
    tokens = (place // STRIP[2], offsets, length[1], group[1], query_strides[2])
    queries = gl.allocate_shared_memory(dtype, [QUERIES, HEAD_DIM], shared)
    keys = gl.allocate_shared_memory(dtype, [RING, KEYS, HEAD_DIM], shared)
    values = gl.allocate_shared_memory(dtype, [RING, KEYS, HEAD_DIM], shared)

    copy_tile(queries, query, first, column, length, group, query_strides, rows, DILATION, TILE)
    strip = ring_strip(first, length[1], KERNEL_SIZE[1], TILE[1], STRIP[1], RING)
    copy_strips(keys, key, strip, None, tokens, KERNEL_SIZE[1], DILATION[1], STRIP[1], RING, RING)
    ampere.async_copy.commit_group()
    copy_strips(
        values, value, strip, None, tokens, KERNEL_SIZE[1], DILATION[1], STRIP[1], RING, RING
    )
    ampere.async_copy.commit_group()

    wait_for_others(OVERLAPS)
    zeros = gl.zeros([QUERIES, KEYS], gl.float32, product)
    for tile in range(first, last):
        next_strip = strip
        if tile + 1 < last:
            next_strip = ring_strip(tile + 1, length[1], KERNEL_SIZE[1], TILE[1], STRIP[1], RING)
        entry = table_entry((0, tile, column), group, size, length, front, back, DILATION, TILE)
        ampere.async_copy.wait_group(1)
        q = with_sign(queries.load(left), SIGN)
        scores = ()
        for i in gl.static_range(RING):
            bias = load_bias(table, entry * RING + i, product, ROW_WARPS, KEYS)
            k = keys.index((strip + i) % RING).permute((1, 0)).load(right)
            dots = ampere.mma_v2(q, k, zeros)
            s = masked_scores(dots, scale, bias.to(gl.float32))
            scores = scores + (s,)  # type: ignore[assignment]  # noqa: RUF005
        copy_strips(
            keys, key, strip + RING, next_strip + RING, tokens,
            KERNEL_SIZE[1], DILATION[1], STRIP[1], RING, STEP,
        )  # fmt: skip
        # Behind the last tile too: without a condition it takes fewer registers.
        copy_tile(
            queries, query, tile + 1, column, length, group, query_strides, rows, DILATION, TILE
        )
        ampere.async_copy.commit_group()

        largest = scores[0]  # type: ignore[misc]
        for i in gl.static_range(1, RING):
            largest = gl.maximum(largest, scores[i])
        row_max = gl.maximum(gl.max(largest, 1), -3.4e38)  # of a token that is none: -inf
        ampere.async_copy.wait_group(1)
        result = gl.zeros([QUERIES, HEAD_DIM], gl.float32, product)
        sums = zeros
        for i in gl.static_range(RING):
            p = gl.exp2(scores[i] - row_max[:, None])
            v = values.index((strip + i) % RING).load(right)
            sums += p
            result = ampere.mma_v2(gl.convert_layout(p.to(dtype), left), v, result)
        copy_strips(
            values, value, strip + RING, next_strip + RING, tokens,
            KERNEL_SIZE[1], DILATION[1], STRIP[1], RING, STEP,
        )  # fmt: skip
        ampere.async_copy.commit_group()
        strip = next_strip

        row_sum = gl.sum(sums, 1)
        row_sum = gl.where(is_overflow(row_max, scale), float("nan"), row_sum)
        strides = (0, 0, size[2] * heads, heads)
        token, is_query = tile_offsets(
            tile, column, length, group, strides, gl.SliceLayout(1, product), DILATION, TILE
        )
        row_lse = (row_max + gl.log2(row_sum)) * 0.6931471805599453
        gl.store(lse + token, row_lse, mask=is_query)
        result = (result * (1.0 / row_sum)[:, None]).to(output.dtype.element_ty)
        token, is_query = tile_offsets(
            tile, column, length, group, strides, gl.SliceLayout(1, rows), DILATION, TILE
        )
        channel = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, rows))
        pointers = output + token[:, None] * HEAD_DIM + channel[None, :]
        gl.store(pointers, gl.convert_layout(result, rows), mask=is_query[:, None])
