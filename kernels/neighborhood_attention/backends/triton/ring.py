"""What the kernels that keep strips in a ring share: layouts, copies, and the bias table's order.

They are written in Gluon, since Triton cannot name a part of shared memory. A warp has 16 rows of a
tile, by mma.m16n8k16. Strips are copied beside the computation, a strip into the place of another.
"""

from math import prod

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere

from neighborhood_attention.backends.triton.launch import Problem
from neighborhood_attention.backends.triton.tiles import TilePlan
from neighborhood_attention.geometry import Neighborhood

HEAD_DIMS = 16, 32, 64, 128
# Elements or bytes: copies are of 16 bytes, and Triton knows of strides no more than that.
ALIGNMENT = 16
MAX_STRIPS = 10  # the registers of a warp hold the scores of no more
MAX_BYTES = 80 * 1024  # the smallest GPUs have 99 KB for a program, results pass through some


def takes(problem: Problem, window: Neighborhood, plan: TilePlan) -> bool:
    """Whether these kernels can compute it with these tiles, if `ALIGNMENT` divides addresses."""
    heads, layout = problem.head_arguments, problem.map_arguments()
    is_plain = max(window.stride) == 1 and not any(window.is_causal)
    return (
        not triton.knobs.runtime.interpret
        and window.dims == 2
        and is_plain
        and problem.additional_keys is None
        and problem.query.dtype.itemsize == 2
        and heads["HEAD_DIM"] == heads["VALUE_DIM"]
        and heads["HEAD_DIM"] in HEAD_DIMS
        and layout["EQUAL_STRIDES"]
        and not layout["WIDE"]
        and all(stride % ALIGNMENT == 0 for stride in problem.query.strides[:-1])
        and plan.strips == (1, plan.strips[1], 1)
        and plan.strips[1] <= MAX_STRIPS
        # On a map of fewer rows the strips that a tile meets are fewer than those of a ring.
        and plan.strips[1] * plan.tile.strip[1] >= window.kernel_size[0] + plan.tile.tile[1] - 1
        and _bytes(problem, plan) <= MAX_BYTES
    )


def _bytes(problem: Problem, plan: TilePlan) -> int:
    """Of shared memory: a tile of queries, and a ring each of keys and values."""
    tokens = prod(plan.tile.tile) + 2 * prod(plan.tile.strip) * prod(plan.strips)
    return tokens * problem.query.shape[-1] * problem.query.dtype.itemsize


@gluon.constexpr_function
def product_layout(warps: int) -> gl.NVMMADistributedLayout:
    """Of a product [16 * warps, columns]."""
    return gl.NVMMADistributedLayout([2, 0], [warps, 1], [16, 8])


@gluon.constexpr_function
def row_layout(head_dim: int, warps: int) -> gl.BlockedLayout:
    """Of tokens [tokens, head_dim] that lie in memory: 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // head_dim, head_dim // 8], [warps, 1], [1, 0])


@gluon.constexpr_function
def shared_layout(head_dim: int) -> gl.SwizzledSharedLayout:
    """Of tokens [tokens, head_dim] in shared memory: 8 rows are read without conflicts."""
    return gl.SwizzledSharedLayout(8, max(1, 64 // head_dim), min(8, head_dim // 8), [1, 0])


@gluon.jit
def copy_strips(
    ring, tensor, first, end, tokens,
    KERNEL_SIZE: gl.constexpr, DILATION: gl.constexpr, ROWS: gl.constexpr,
    RING: gl.constexpr, MOST: gl.constexpr,
):  # fmt: skip
    """Begin to copy strips from `first` on into their places: MOST, or those of them before `end`.

    `tokens` tells of a strip's tokens the row in it and the offset along the other axes, then the
    length, the dilation group and the stride of the axis of rows.
    """
    for i in gl.static_range(MOST):
        if end is None or first + i < end:
            _copy_strip(ring, tensor, first + i, tokens, KERNEL_SIZE, DILATION, ROWS, RING)


@gluon.jit
def _copy_strip(
    ring, tensor, strip, tokens,
    KERNEL_SIZE: gl.constexpr, DILATION: gl.constexpr, ROWS: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Rows outside of the map repeat its first or last."""
    row, offsets, length, group, stride = tokens
    position = strip * ROWS - KERNEL_SIZE // 2 + row
    position = gl.minimum(gl.maximum(position, 0), length - 1)
    pointers = tensor + ((position * DILATION + group) * stride)[:, None] + offsets
    ampere.async_copy.async_copy_global_to_shared(ring.index(strip % RING), pointers)


@gluon.jit
def copy_tile(
    block, tensor, tile, column, length, group, strides, rows: gl.constexpr,
    DILATION: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Begin to copy a tile; what lies outside of the map repeats tokens of its border."""
    place = gl.arange(0, block.shape[0], layout=gl.SliceLayout(1, rows))
    h = gl.minimum(tile * TILE[1] + place // TILE[2], length[1] - 1) * DILATION[1] + group[1]
    w = gl.minimum(column * TILE[2] + place % TILE[2], length[2] - 1) * DILATION[2] + group[2]
    channel = gl.arange(0, block.shape[1], layout=gl.SliceLayout(0, rows))
    pointers = tensor + (h * strides[2] + w * strides[3])[:, None] + channel[None, :]
    ampere.async_copy.async_copy_global_to_shared(block, pointers)


@gluon.jit
def load_bias(table, block, product: gl.constexpr, WARPS: gl.constexpr, KEYS: gl.constexpr):
    """A block of the bias table [16 * WARPS, KEYS]; see `registers.in_rows`."""
    flat: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    table += block.to(gl.int64) * (16 * WARPS * KEYS)
    bias = gl.load(table + gl.arange(0, 16 * WARPS * KEYS, layout=flat))
    bias = bias.reshape([KEYS // 16, WARPS, 8, 4, 4, 2]).permute([0, 4, 1, 2, 3, 5])
    bias = bias.reshape([2, KEYS // 8, WARPS, 8, 4, 2]).permute([2, 0, 3, 1, 4, 5])
    return gl.convert_layout(bias.reshape([16 * WARPS, KEYS]), product, assert_trivial=True)


@gluon.jit
def tile_offsets(
    tile, column, length, group, strides, layout: gl.constexpr,
    DILATION: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Offsets of a tile's tokens within an image, and which of them exist."""
    place = gl.arange(0, TILE[1] * TILE[2], layout=layout)
    h = tile * TILE[1] + place // TILE[2]
    w = column * TILE[2] + place % TILE[2]
    is_token = (h < length[1]) & (w < length[2])
    h = h * DILATION[1] + group[1]
    w = w * DILATION[2] + group[2]
    return h * strides[2] + w * strides[3], is_token
