"""The relative positional bias and the mask, tabulated for each type of tile.

The scores of a tile against a strip are `scale * query . key + table`, in powers of 2: the table
holds `rpb * log2(e)` where the query attends to the key and -inf elsewhere. Tiles of one type share
an entry, so the table stays small whatever the map's size, and it is read with whole vectors;
fetching the bias score by score costs as much as the attention itself.

Shape: [heads (1 without a bias), row types, column types, strips, tile tokens, strip tokens].
"""

import triton
import triton.language as tl
from torch import Tensor

from neighborhood_attention.backends.triton.launch import window_arguments
from neighborhood_attention.backends.triton.tiles import TilePlan
from neighborhood_attention.backends.triton.window import (
    attending_end,
    attending_start,
    bias_index,
    group_length,
    table_block,
    tile_range,
    window_end,
    window_start,
)
from neighborhood_attention.geometry import Neighborhood


def build_bias_table(
    rpb: Tensor | None, window: Neighborhood, spatial: tuple[int, ...], plan: TilePlan, like: Tensor
) -> Tensor:
    """The table in the dtype and on the device of `like`."""
    heads = 1 if rpb is None else rpb.shape[0]
    types = plan.rows.types, plan.columns.types
    table = like.new_empty(heads, *types, plan.strips, plan.tile_tokens, plan.strip_tokens)
    _build_kernel[(plan.strips, types[0] * types[1], heads)](
        table if rpb is None else rpb.contiguous(), table, *spatial, types[1],
        HAS_BIAS=rpb is not None, OF_KEYS=plan.of_keys,
        **window_arguments(window), **plan.arguments(),
    )  # fmt: skip
    return table


@triton.jit
def _build_kernel(
    rpb, table, height, width, column_types,
    row_tiles, column_tiles, front_h, back_h, front_w, back_w,
    KERNEL_SIZE_H: tl.constexpr, KERNEL_SIZE_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    IS_CAUSAL_H: tl.constexpr, IS_CAUSAL_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STRIP_H: tl.constexpr, STRIP_W: tl.constexpr,
    COLUMN_STRIPS: tl.constexpr, STRIPS: tl.constexpr,
    HAS_BIAS: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """One strip of one entry. Grid: (strips, row types * column types, heads)."""
    strip, entry, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = tl.arange(0, TILE_H * TILE_W)[:, None]
    n = tl.arange(0, STRIP_H * STRIP_W)[None, :]
    attends_h, index_h = _axis_block(
        entry // column_types, m // TILE_W, strip // COLUMN_STRIPS * STRIP_H + n // STRIP_W,
        height, front_h, back_h,
        KERNEL_SIZE_H, STRIDE_H, DILATION_H, IS_CAUSAL_H, TILE_H, OF_KEYS,
    )  # fmt: skip
    attends_w, index_w = _axis_block(
        entry % column_types, m % TILE_W, strip % COLUMN_STRIPS * STRIP_W + n % STRIP_W,
        width, front_w, back_w,
        KERNEL_SIZE_W, STRIDE_W, DILATION_W, IS_CAUSAL_W, TILE_W, OF_KEYS,
    )  # fmt: skip
    attends = attends_h & attends_w
    bias = tl.zeros((TILE_H * TILE_W, STRIP_H * STRIP_W), tl.float32)
    if HAS_BIAS:
        index = (head * (2 * KERNEL_SIZE_H - 1) + index_h) * (2 * KERNEL_SIZE_W - 1) + index_w
        bias += tl.load(rpb + index, mask=attends, other=0.0).to(tl.float32) * 1.4426950408889634
    bias = tl.where(attends, bias, float("-inf")).to(table.dtype.element_ty)
    block = ((head * tl.num_programs(1) + entry) * tl.num_programs(0) + strip).to(tl.int64)
    tl.store(table_block(table, block, 1, TILE_H * TILE_W, STRIP_H * STRIP_W), bias)


@triton.jit
def _axis_block(
    entry, tile_token, strip_token, size, front, back,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """Along one axis: which pairs of tokens attend, and their index into the bias."""
    is_short = entry // (front + 1 + back)
    entry = entry % (front + 1 + back)
    length = group_length(is_short * (DILATION - 1), size, DILATION)
    tiles = (length + TILE - 1) // TILE
    tile = entry + (entry > front) * (tiles - back - front - 1)  # a tile of this type
    start, _ = tile_range(tile, length, KERNEL_SIZE, STRIDE, IS_CAUSAL, TILE, OF_KEYS)
    inner = tile * TILE + tile_token
    outer = start + strip_token
    if OF_KEYS:
        first = attending_start(inner, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        end = attending_end(inner, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        index = bias_index(outer, inner, KERNEL_SIZE)
    else:
        first = window_start(inner, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        end = window_end(inner, first, KERNEL_SIZE, IS_CAUSAL)
        index = bias_index(inner, outer, KERNEL_SIZE)
    return (inner < length) & (outer >= first) & (outer < end), index
