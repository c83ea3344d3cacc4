"""The relative positional bias and the mask, tabulated for each type of tile.

The scores of a tile against a strip are `scale * query . key + table`, in powers of 2: the table
holds `rpb * log2(e)` where the query attends to the key and -inf elsewhere. Tiles of one type share
an entry, so the table stays small whatever the map's size, and it is read with whole vectors;
fetching the bias score by score costs as much as the attention itself.

Shape: [heads (1 without a bias), types of all axes, strips, tile tokens, strip tokens].
"""

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from neighborhood_attention.backends.triton.launch import (
    Launch,
    Problem,
    can_overlap,
    plan_arguments,
    window_arguments,
)
from neighborhood_attention.backends.triton.registers import in_registers
from neighborhood_attention.backends.triton.tiles import TilePlan, three_axes
from neighborhood_attention.backends.triton.window import (
    attending_pairs,
    block_positions,
    flat_block,
    group_length,
    pairs_bias,
    ring_strip,
    rounded_bias,
    strip_start,
    tile_range,
)
from neighborhood_attention.geometry import Neighborhood


class BiasTable:
    """Builds the table of a problem in the dtype of its query."""

    def __init__(self, problem: Problem, window: Neighborhood, plan: TilePlan) -> None:
        heads = 1 if problem.rpb is None else problem.rpb.shape[0]
        types, strips = tuple(axis.types for axis in plan.axes), prod(plan.strips)
        self.entry = prod(types) * strips * prod(plan.tile.tile) * prod(plan.tile.strip)
        self._elements = heads * self.entry
        self._dtype, self._device = problem.query.dtype, problem.device
        self._launch = Launch(
            _build_kernel,
            (prod(types) * strips * heads),
            {
                "heads": heads, "size": three_axes(problem.spatial), "types": types,
                "OF_KEYS": plan.of_keys, "IN_RING": plan.in_ring,
                "OVERLAPS": can_overlap(problem.device),
                **window_arguments(window), **plan_arguments(plan),
            },
        )  # fmt: skip

    def build(self, rpb: Tensor | None) -> Tensor:
        """The table, flat."""
        table = torch.empty(self._elements, dtype=self._dtype, device=self._device)
        self._launch(None if rpb is None else rpb.contiguous(), table)
        return table

    @property
    def head_stride(self) -> int:
        """From one head's table to the next's; 0 where all share one."""
        return 0 if self._elements == self.entry else self.entry


@triton.jit
def _build_kernel(
    rpb, table, heads, size, types, front, back,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
    ROW_WARPS: tl.constexpr, COLUMN_WARPS: tl.constexpr,
    OF_KEYS: tl.constexpr, IN_RING: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One strip of one entry. Grid: (heads * types * strips,)."""
    if OVERLAPS:
        gdc_launch_dependents()  # the kernel that reads the table waits for it
    ALL_STRIPS: tl.constexpr = STRIPS[0] * STRIPS[1] * STRIPS[2]
    block = tl.program_id(0)
    first = strip_start(block % ALL_STRIPS, (0, 0, 0), STRIP, STRIPS)
    entry = block // ALL_STRIPS % (types[0] * types[1] * types[2])
    head = block // ALL_STRIPS // (types[0] * types[1] * types[2])
    inner = block_positions(TILE, tl.arange(0, TILE[0] * TILE[1] * TILE[2]))
    outer = block_positions(STRIP, tl.arange(0, STRIP[0] * STRIP[1] * STRIP[2]))
    attends_d, index_d = _axis_block(
        entry // (types[1] * types[2]), inner[0], first[0] + outer[0], size[0], front[0], back[0],
        KERNEL_SIZE[0], STRIDE[0], DILATION[0], IS_CAUSAL[0], TILE[0], OF_KEYS,
        0, 0,
    )  # fmt: skip
    attends_h, index_h = _axis_block(
        entry // types[2] % types[1], inner[1], first[1] + outer[1], size[1], front[1], back[1],
        KERNEL_SIZE[1], STRIDE[1], DILATION[1], IS_CAUSAL[1], TILE[1], OF_KEYS,
        STRIP[1] if IN_RING else 0, STRIPS[1],
    )  # fmt: skip
    attends_w, index_w = _axis_block(
        entry % types[2], inner[2], first[2] + outer[2], size[2], front[2], back[2],
        KERNEL_SIZE[2], STRIDE[2], DILATION[2], IS_CAUSAL[2], TILE[2], OF_KEYS,
        0, 0,
    )  # fmt: skip
    attends = attends_d & attends_h & attends_w
    bias = pairs_bias(rpb, head, attends, index_d, index_h, index_w, KERNEL_SIZE)
    bias = rounded_bias(bias, table.dtype.element_ty)
    ROWS: tl.constexpr = attends.shape[0]
    COLUMNS: tl.constexpr = attends.shape[1]
    bias = in_registers(bias, ROWS, COLUMNS, ROW_WARPS, COLUMN_WARPS)
    tl.store(flat_block(table, block, ROWS * COLUMNS), bias)


@triton.jit
def _axis_block(
    entry, tile_token, strip_token, size, front, back,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TILE: tl.constexpr, OF_KEYS: tl.constexpr, STRIP: tl.constexpr, STRIPS: tl.constexpr,
):  # fmt: skip
    """Along one axis: which pairs of tokens attend, and their index into the bias."""
    is_short = entry // (front + 1 + back)
    entry = entry % (front + 1 + back)
    length = group_length(is_short * (DILATION - 1), size, DILATION)
    tiles = (length + TILE - 1) // TILE
    tile = entry + (entry > front) * (tiles - back - front - 1)  # a tile of this type
    if STRIP > 0:
        strip = ring_strip(tile, length, KERNEL_SIZE, TILE, STRIP, STRIPS)
        start = strip * STRIP - KERNEL_SIZE // 2
    else:
        start, _ = tile_range(tile, length, KERNEL_SIZE, STRIDE, IS_CAUSAL, TILE, OF_KEYS)
    inner = (tile * TILE + tile_token)[:, None]
    outer = (start + strip_token)[None, :]
    return attending_pairs(inner, outer, length, KERNEL_SIZE, STRIDE, IS_CAUSAL, OF_KEYS)
