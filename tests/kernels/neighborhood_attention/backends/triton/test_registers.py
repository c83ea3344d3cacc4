"""The order of the tensor cores' registers, against NVIDIA's description of them."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from neighborhood_attention.backends.triton.registers import in_registers, in_rows  # noqa: E402

pytestmark = pytest.mark.interpreter


@triton.jit
def _reorder(
    block, flat, back, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ROW_WARPS: tl.constexpr, COLUMN_WARPS: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    ordered = in_registers(tl.load(block + i), ROWS, COLUMNS, ROW_WARPS, COLUMN_WARPS)
    tl.store(flat + tl.arange(0, ROWS * COLUMNS), ordered)
    tl.store(back + i, in_rows(ordered, ROWS, COLUMNS, ROW_WARPS, COLUMN_WARPS))


def reorder(rows, columns, warps, device):
    block = torch.arange(rows * columns, device=device, dtype=torch.int32).view(rows, columns)
    flat, back = torch.full_like(block, -1).flatten(), torch.full_like(block, -1)
    _reorder[(1,)](block, flat, back, rows, columns, *warps)
    assert torch.equal(back, block)
    return flat


@pytest.mark.parametrize(
    ("rows", "columns", "warps"),
    [(32, 32, (1, 1)), (16, 64, (1, 2)), (64, 64, (4, 1)), (32, 64, (2, 2)), (16, 16, (1, 1))],
)
def test_a_thread_holds_what_mma_gives_it(rows, columns, warps, device):
    flat = reorder(rows, columns, warps, device).view(-1, *warps, 8, 4, 4, 2)
    row, column = flat // columns, flat % columns
    for warp_row in range(warps[0]):
        for group in range(8):  # threads 4 * group ... 4 * group + 3 hold rows group and group + 8
            mine = row[:, warp_row, :, group]
            assert ((mine % 8) == group).all()
            assert ((mine // 16 % warps[0]) == warp_row).all()
    for thread in range(4):
        for number in range(2):
            assert ((column[..., thread, :, number] % 8) == 2 * thread + number).all()
    for warp_column in range(warps[1]):
        assert ((column[:, :, warp_column] // 8 % warps[1]) == warp_column).all()


def test_a_block_smaller_than_the_registers_stays_in_rows(device):
    assert torch.equal(reorder(16, 16, (2, 2), device).cpu(), torch.arange(256, dtype=torch.int32))
