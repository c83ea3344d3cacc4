"""The order in which the registers of the tensor cores hold a product.

A table in this order is loaded, 16 bytes a thread, to where the product's numbers lie: rows and
columns need not pass through shared memory. In a tile of 16x8 a thread holds two neighbors of a row
and the two that lie 8 rows below (PTX ISA, matrix fragments of mma.m16n8k16); a warp of wgmma holds
16 rows in the same way.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def in_registers(
    block, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROW_WARPS: tl.constexpr, COLUMN_WARPS: tl.constexpr,
):  # fmt: skip
    """A block [ROWS, COLUMNS], flat, in runs of 8 numbers, 4 pairs of neighbors, for each thread.

    A block too small for that stays in rows. So it is a matter of speed, never of the result.
    """
    if _fills_registers(ROWS, COLUMNS, ROW_WARPS, COLUMN_WARPS):
        M: tl.constexpr = ROWS // 16 // ROW_WARPS
        N: tl.constexpr = COLUMNS // 8 // COLUMN_WARPS
        block = tl.reshape(block, (M, ROW_WARPS, 2, 8, N, COLUMN_WARPS, 4, 2))
        block = tl.permute(block, (0, 2, 4, 1, 5, 3, 6, 7))
        block = tl.reshape(block, (M * N // 2, 4, ROW_WARPS, COLUMN_WARPS, 8, 4, 2))
        block = tl.permute(block, (0, 2, 3, 4, 5, 1, 6))
    return tl.reshape(block, (ROWS * COLUMNS,))


@triton.jit
def in_rows(
    block, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROW_WARPS: tl.constexpr, COLUMN_WARPS: tl.constexpr,
):  # fmt: skip
    """The block [ROWS, COLUMNS] that `in_registers` made flat; no number changes its thread."""
    if _fills_registers(ROWS, COLUMNS, ROW_WARPS, COLUMN_WARPS):
        M: tl.constexpr = ROWS // 16 // ROW_WARPS
        N: tl.constexpr = COLUMNS // 8 // COLUMN_WARPS
        block = tl.reshape(block, (M * N // 2, ROW_WARPS, COLUMN_WARPS, 8, 4, 4, 2))
        block = tl.permute(block, (0, 5, 1, 2, 3, 4, 6))
        block = tl.reshape(block, (M, 2, N, ROW_WARPS, COLUMN_WARPS, 8, 4, 2))
        block = tl.permute(block, (0, 3, 1, 5, 2, 4, 6, 7))
    return tl.reshape(block, (ROWS, COLUMNS))


@triton.constexpr_function
def _fills_registers(rows: int, columns: int, row_warps: int, column_warps: int) -> Any:
    return rows * columns >= 256 * row_warps * column_warps and columns >= 8 * column_warps
