"""What the kernels share: the geometry, compiled from `geometry.py`, and addresses of tokens.

Sizes, windows, tiles and positions are tuples of three axes; tuples in capitals are constants.
"""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from neighborhood_attention import geometry
from neighborhood_attention.backends.triton.products import product


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = triton.jit(function)
    # The interpreter wants `tl` among a function's globals, but runs plain functions as they are.
    return compiled if isinstance(compiled, triton.JITFunction) else function


group_length = _compiled(geometry.group_length)
window_start = _compiled(geometry.window_start)
window_end = _compiled(geometry.window_end)
attending_start = _compiled(geometry.attending_start)
attending_end = _compiled(geometry.attending_end)
bias_index = _compiled(geometry.bias_index)


@triton.jit
def wait_for_others(OVERLAPS: tl.constexpr):
    """Until the kernel before this one has ended, and what it made is there; all programs wait."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def count_tiles(size, DILATION: tl.constexpr, TILE: tl.constexpr):
    """Tiles of the longest dilation group, an axis."""
    return (
        tl.cdiv(tl.cdiv(size[0], DILATION[0]), TILE[0]),
        tl.cdiv(tl.cdiv(size[1], DILATION[1]), TILE[1]),
        tl.cdiv(tl.cdiv(size[2], DILATION[2]), TILE[2]),
    )


@triton.jit
def locate_tile(heads, tiles, DILATION: tl.constexpr):
    """Image, head, dilation group and tile of this program.

    The head runs fastest: heads lie side by side in memory. Image and head are 64-bit, since they
    are multiplied by the largest strides.
    """
    program = tl.program_id(0)
    head = (program % heads).to(tl.int64)
    program //= heads
    tile_w = program % tiles[2]
    program //= tiles[2]
    tile_h = program % tiles[1]
    program //= tiles[1]
    tile_d = program % tiles[0]
    program //= tiles[0]
    group_w = program % DILATION[2]
    program //= DILATION[2]
    group_h = program % DILATION[1]
    program //= DILATION[1]
    image = (program // DILATION[0]).to(tl.int64)
    return image, head, (program % DILATION[0], group_h, group_w), (tile_d, tile_h, tile_w)


@triton.jit
def locate_position(position, size, tiles, DILATION: tl.constexpr):
    """Tile, and the first dilation group of its kind (0, or the first short one), of a position."""
    kind = position // (tiles[0] * tiles[1] * tiles[2])
    rest_d, rest_h, rest_w = size[0] % DILATION[0], size[1] % DILATION[1], size[2] % DILATION[2]
    kinds_h, kinds_w = 1 + (rest_h > 0), 1 + (rest_w > 0)
    tile = (
        position // (tiles[1] * tiles[2]) % tiles[0],
        position // tiles[2] % tiles[1],
        position % tiles[2],
    )
    group = (
        kind // (kinds_h * kinds_w) * rest_d,
        kind // kinds_w % kinds_h * rest_h,
        kind % kinds_w * rest_w,
    )
    return tile, group


@triton.jit
def count_alike(group, size, DILATION: tl.constexpr):
    """On one axis, the number of dilation groups as long as `group`, the first of them."""
    rest = size % DILATION
    return tl.where((group > 0) | (rest == 0), DILATION - group, rest)


@triton.jit
def groups_alike(group, size, DILATION: tl.constexpr):
    """`count_alike` of all axes."""
    return (
        count_alike(group[0], size[0], DILATION[0]),
        count_alike(group[1], size[1], DILATION[1]),
        count_alike(group[2], size[2], DILATION[2]),
    )


@triton.jit
def locate_item(item, first_group, groups):
    """Image and dilation group of an item: one of `groups`, from `first_group` on, of an image."""
    group = (
        first_group[0] + item // (groups[1] * groups[2]) % groups[0],
        first_group[1] + item // groups[2] % groups[1],
        first_group[2] + item % groups[2],
    )
    return (item // (groups[0] * groups[1] * groups[2])).to(tl.int64), group


@triton.jit
def count_items(batch, groups, tile, length, TILE: tl.constexpr):
    """Items that have this tile; a short dilation group may end before it."""
    is_tile = (tile[0] * TILE[0] < length[0]) & (tile[1] * TILE[1] < length[1])
    is_tile &= tile[2] * TILE[2] < length[2]
    return tl.where(is_tile, batch * groups[0] * groups[1] * groups[2], 0)


@triton.jit
def group_lengths(group, size, DILATION: tl.constexpr):
    """Number of tokens of a dilation group, an axis."""
    return (
        group_length(group[0], size[0], DILATION[0]),
        group_length(group[1], size[1], DILATION[1]),
        group_length(group[2], size[2], DILATION[2]),
    )


@triton.jit
def tile_range(
    tile, length,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """On one axis, the keys [start, end) that a tile of queries meets, or the other way round."""
    first = tile * TILE
    last = tl.minimum(first + TILE, length) - 1
    if OF_KEYS:
        start = attending_start(first, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        end = attending_end(last, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
    else:
        start = window_start(first, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        end = window_start(last, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        end = window_end(last, end, KERNEL_SIZE, IS_CAUSAL)
    return start, end


@triton.jit
def tile_ranges(
    tile, length,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """`tile_range` of all axes: the starts and the ends."""
    start_d, end_d = tile_range(
        tile[0], length[0], KERNEL_SIZE[0], STRIDE[0], IS_CAUSAL[0], TILE[0], OF_KEYS
    )
    start_h, end_h = tile_range(
        tile[1], length[1], KERNEL_SIZE[1], STRIDE[1], IS_CAUSAL[1], TILE[1], OF_KEYS
    )
    start_w, end_w = tile_range(
        tile[2], length[2], KERNEL_SIZE[2], STRIDE[2], IS_CAUSAL[2], TILE[2], OF_KEYS
    )
    return (start_d, start_h, start_w), (end_d, end_h, end_w)


@triton.jit
def count_strips(start, end, STRIP: tl.constexpr, STRIPS: tl.constexpr):
    """Strips that cover [start, end): no more than needed on the first axis that has several."""
    if STRIPS[0] > 1:
        return tl.cdiv(end[0] - start[0], STRIP[0]) * STRIPS[1] * STRIPS[2]
    elif STRIPS[1] > 1:
        return tl.cdiv(end[1] - start[1], STRIP[1]) * STRIPS[2]
    else:
        return tl.cdiv(end[2] - start[2], STRIP[2])


@triton.jit
def strip_start(strip, start, STRIP: tl.constexpr, STRIPS: tl.constexpr):
    """First token of a strip. An axis of one strip starts where it starts: that frees registers."""
    d, h, w = start
    if STRIPS[0] > 1:
        d += strip // (STRIPS[1] * STRIPS[2]) * STRIP[0]
        strip %= STRIPS[1] * STRIPS[2]
    if STRIPS[1] > 1:
        h += strip // STRIPS[2] * STRIP[1]
        strip %= STRIPS[2]
    if STRIPS[2] > 1:
        w += strip * STRIP[2]
    return d, h, w


@triton.jit
def ring_strip(
    tile, length,
    KERNEL_SIZE: tl.constexpr, TILE: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """On one axis, the first of the strips that hold a tile's keys, where tiles share strips.

    A tile is as long as some strips. The first strip starts KERNEL_SIZE // 2 before the axis: then
    the keys of a tile that lies far from the borders start with a strip, and lie in STRIPS of them.
    """
    low = KERNEL_SIZE // 2 // STRIP
    high = (length - 1 + KERNEL_SIZE // 2) // STRIP - (STRIPS - 1)
    high = tl.maximum(high, 0)  # a short dilation group may have less than one tile
    return tl.minimum(tl.maximum(tile * (TILE // STRIP), low), high)


@triton.jit
def block_positions(SHAPE: tl.constexpr, i):
    """Position, in a block of this shape, of its `i`-th token."""
    d = i * 0
    h = i * 0
    if SHAPE[0] > 1:
        d = i // (SHAPE[1] * SHAPE[2])
    if SHAPE[1] > 1:
        h = i // SHAPE[2] % SHAPE[1]
    return d, h, i % SHAPE[2]


@triton.jit
def block_tokens(first, length, group, DILATION: tl.constexpr, SHAPE: tl.constexpr):
    """Positions on the map of a block of a dilation group, and which of them exist."""
    d, h, w = block_positions(SHAPE, tl.arange(0, SHAPE[0] * SHAPE[1] * SHAPE[2]))
    d += first[0]
    h += first[1]
    w += first[2]
    exists = (d < length[0]) & (h < length[1]) & (w < length[2])
    d = d * DILATION[0] + group[0]
    h = h * DILATION[1] + group[1]
    return (d, h, w * DILATION[2] + group[2]), exists


@triton.jit
def strip_tokens(first, end, group, DILATION: tl.constexpr, STRIP: tl.constexpr):
    """Positions on the map of a strip of the tokens before `end`.

    What is left of it repeats the last token: masked by the bias, it costs neither memory traffic
    nor predicates.
    """
    d, h, w = block_positions(STRIP, tl.arange(0, STRIP[0] * STRIP[1] * STRIP[2]))
    d = tl.minimum(first[0] + d, tl.maximum(end[0], 1) - 1) * DILATION[0] + group[0]
    h = tl.minimum(first[1] + h, tl.maximum(end[1], 1) - 1) * DILATION[1] + group[1]
    w = tl.minimum(first[2] + w, tl.maximum(end[2], 1) - 1) * DILATION[2] + group[2]
    return d, h, w


@triton.jit
def tile_tokens(tile, length, group, DILATION: tl.constexpr, TILE: tl.constexpr):
    """`block_tokens` of a tile."""
    first = (tile[0] * TILE[0], tile[1] * TILE[1], tile[2] * TILE[2])
    return block_tokens(first, length, group, DILATION, TILE)


@triton.jit
def token_offsets(token, strides, WIDE: tl.constexpr):
    """Offsets of tokens within an image; 64-bit where an image may exceed 2^31 elements."""
    d, h, w = token
    if WIDE:
        d = d.to(tl.int64)
        h = h.to(tl.int64)
        w = w.to(tl.int64)
    return d * strides[1] + h * strides[2] + w * strides[3]


@triton.jit
def token_index(token, size, heads, WIDE: tl.constexpr):
    """Offsets of tokens within an image of a contiguous [B, *spatial, heads]."""
    if WIDE:  # a plane of a map may exceed 2^31 elements, too
        heads = tl.full((), heads, tl.int64)
    return token_offsets(token, (0, size[1] * size[2] * heads, size[2] * heads, heads), WIDE)


@triton.jit
def load_tokens(tensor, offsets, is_token, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[tokens, BLOCK_D] of a heads-last tensor; zeros where there is no element.

    All tokens exist if `is_token` is None.
    """
    d = tl.arange(0, BLOCK_D)
    pointers = tensor + offsets[:, None] + d[None, :]
    if is_token is None and HEAD_DIM == BLOCK_D:
        block = tl.load(pointers)
    elif is_token is None:
        block = tl.load(pointers, mask=(d < HEAD_DIM)[None, :], other=0.0)
    elif HEAD_DIM == BLOCK_D:
        block = tl.load(pointers, mask=is_token[:, None], other=0.0)
    else:
        block = tl.load(pointers, mask=is_token[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    return block


@triton.jit
def store_tokens(tensor, offsets, is_token, block, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store [tokens, BLOCK_D], leaving out what `load_tokens` fills with zeros."""
    d = tl.arange(0, BLOCK_D)
    mask = is_token[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    tl.store(tensor + offsets[:, None] + d[None, :], block.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def load_additional(
    tensor, strides, image, head, first, count,
    TOKENS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[TOKENS, BLOCK] of additional keys or values [B, S, heads, DIM], from `first` on."""
    index = first + tl.arange(0, TOKENS)
    tensor += image * strides[0] + head * strides[2]
    return load_tokens(tensor, index.to(tl.int64) * strides[1], index < count, DIM, BLOCK)


@triton.jit
def additional_scores(dots, scale, first, count, TOKENS: tl.constexpr):
    """Logits of additional keys [queries, TOKENS], in powers of 2; -inf behind the last of them."""
    is_key = first + tl.arange(0, TOKENS) < count
    return tl.where(is_key[None, :], dots * _log2_scale(scale), float("-inf"))


@triton.jit
def tile_type(tile, group, size, length, front, back, DILATION: tl.constexpr, TILE: tl.constexpr):
    """On one axis, a tile's type, and how many types there are: see `tiles.TileAxis`."""
    behind = tile - (length + TILE - 1) // TILE + back + 1
    behind = tl.minimum(tl.maximum(behind, 0), back)  # a short group may end before the tile
    has_short = size % DILATION > 0
    is_short = (group >= size % DILATION) & has_short
    types = front + 1 + back
    return tl.minimum(tile, front) + behind + is_short * types, types * (1 + has_short)


@triton.jit
def table_entry(tile, group, size, length, front, back, DILATION: tl.constexpr, TILE: tl.constexpr):
    """Entry of the bias table for a tile."""
    type_d, _ = tile_type(
        tile[0], group[0], size[0], length[0], front[0], back[0], DILATION[0], TILE[0]
    )
    type_h, types_h = tile_type(
        tile[1], group[1], size[1], length[1], front[1], back[1], DILATION[1], TILE[1]
    )
    type_w, types_w = tile_type(
        tile[2], group[2], size[2], length[2], front[2], back[2], DILATION[2], TILE[2]
    )
    return (type_d * types_h + type_h) * types_w + type_w


@triton.jit
def flat_block(table, index, SIZE: tl.constexpr):
    """Pointers [SIZE] to a block of a table."""
    return table + index.to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit
def table_block(table, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers [ROWS, COLUMNS] to a block of a table."""
    m = tl.arange(0, ROWS)[:, None]
    n = tl.arange(0, COLUMNS)[None, :]
    return table + index.to(tl.int64) * (ROWS * COLUMNS) + m * COLUMNS + n


@triton.jit
def _log2_scale(scale):
    """|scale| log2 e; not 0, so that no infinity times it is NaN: see `with_sign`."""
    return tl.where(scale == 0.0, 1.0, tl.maximum(tl.abs(scale) * 1.4426950408889634, 1.0e-30))


@triton.jit
def with_sign(x, SIGN: tl.constexpr):
    """`x`, which gives the products with it the sign of the scale: logits take only its size."""
    if SIGN == 0:
        x = x * 0  # NaN stays
    elif SIGN < 0:
        x = -x
    return x


@triton.jit
def masked_scores(dots, scale, bias):
    """Logits in powers of 2; -inf outside the window, whatever overflowed there.

    A NaN or an infinity inside the window becomes a large number, see `is_overflow`: the minimum of
    NaN and a number is the number. To select by the bias costs more, since that crosses layouts.
    """
    factor = _log2_scale(scale)
    return tl.minimum(dots, 3.0e38 / tl.maximum(factor, 1.0)) * factor + bias


@triton.jit
def is_overflow(row_max, scale):
    """Whether the maximum of `masked_scores` is NaN or an infinity that became a large number."""
    return row_max >= 2.9e38 * tl.minimum(_log2_scale(scale), 1.0)


@triton.jit
def masked_gradient(p, dp, delta):
    """Gradient of the logits; exactly zero outside the window, whatever `dp` overflowed to."""
    return tl.where(p == 0.0, 0.0, p * (dp - delta))


@triton.jit
def add_strip(running_max, running_sum, running_output, s, v, PRECISION: tl.constexpr):
    """One step of the online softmax: the new maximum, sum and output."""
    new_max = tl.maximum(running_max, tl.max(s, 1))
    p = tl.exp2(s - new_max[:, None])
    decay = tl.exp2(running_max - new_max)
    new_sum = running_sum * decay + tl.sum(p, 1)
    output = running_output * decay[:, None]
    return new_max, new_sum, product(p.to(v.dtype), v, PRECISION, output)


@triton.jit
def attending_pairs(
    inner, outer, length,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, IS_CAUSAL: tl.constexpr,
    OF_KEYS: tl.constexpr,
):  # fmt: skip
    """On one axis, which queries `inner` attend to which keys `outer`, or the other way round.

    And the indices of the pairs into the bias.
    """
    if OF_KEYS:
        first = attending_start(inner, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        end = attending_end(inner, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        index = bias_index(outer, inner, KERNEL_SIZE)
    else:
        first = window_start(inner, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        end = window_end(inner, first, KERNEL_SIZE, IS_CAUSAL)
        index = bias_index(inner, outer, KERNEL_SIZE)
    return (inner < length) & (outer >= first) & (outer < end), index


@triton.jit
def pairs_bias(rpb, head, attends, index_d, index_h, index_w, KERNEL_SIZE: tl.constexpr):
    """Bias of pairs in powers of 2, fp32: 0 without one, -inf where they do not attend."""
    bias = tl.zeros(attends.shape, tl.float32)
    if rpb is not None:
        index = head * (2 * KERNEL_SIZE[0] - 1) + index_d
        index = index * (2 * KERNEL_SIZE[1] - 1) + index_h
        index = index * (2 * KERNEL_SIZE[2] - 1) + index_w
        bias += tl.load(rpb + index, mask=attends, other=0.0).to(tl.float32) * 1.4426950408889634
    return tl.where(attends, bias, float("-inf"))


@triton.jit
def rounded_bias(bias, dtype: tl.constexpr):
    """In the dtype of the query, in which every kernel reads it; what is finite stays so."""
    if dtype == tl.float16:
        limited = tl.minimum(tl.maximum(bias, -65504.0), 65504.0)
        bias = tl.where(tl.abs(bias) < float("inf"), limited, bias)
    return bias.to(dtype)
