"""Softmax of attention weights [B, *spatial, heads, window] in place, and its gradient."""

import triton
import triton.language as tl
from torch import Tensor

from neighborhood_attention.backends.triton.launch import Launch, Problem
from neighborhood_attention.geometry import Neighborhood

# Of a warp. A program has one, where it holds a row: then no sum crosses warps.
WARP_ELEMENTS = 512


class Softmax:
    """The softmax of a problem's weights; a program holds some whole rows."""

    def __init__(self, problem: Problem, window: Neighborhood) -> None:
        rows = problem.query.shape[:-1].numel()
        columns = triton.next_power_of_2(window.size)
        block_rows = max(1, WARP_ELEMENTS // columns)
        arguments = {"rows": rows, "WINDOW": window.size, "ROWS": block_rows, "COLUMNS": columns}
        programs = triton.cdiv(rows, block_rows)
        num_warps = min(16, max(1, columns // WARP_ELEMENTS))
        self._normalize = Launch(_softmax_kernel, programs, arguments, num_warps=num_warps)
        self._gradient = Launch(_gradient_kernel, programs, arguments, num_warps=num_warps)

    def normalize(self, weights: Tensor, lse: Tensor) -> None:
        """Logits become probabilities; fills lse."""
        self._normalize(weights, lse)

    def gradient(self, weights: Tensor, grad_weights: Tensor, grad_lse: Tensor | None) -> None:
        """The gradient of probabilities, given them, becomes that of logits."""
        self._gradient(weights, grad_lse, grad_weights)


@triton.jit
def _locate(rows, WINDOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's first row; of its rows, which exist; offsets of weights, which exist."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    is_row = first + row < rows
    return first, is_row, row[:, None] * WINDOW + column, is_row[:, None] & (column < WINDOW)


@triton.jit
def _softmax_kernel(
    weights, lse, rows, WINDOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Some rows. Grid: (rows / ROWS,)."""
    first, is_row, index, is_weight = _locate(rows, WINDOW, ROWS, COLUMNS)
    weights += first * WINDOW
    s = tl.load(weights + index, mask=is_weight, other=float("-inf")).to(tl.float32)
    row_max = tl.max(s, 1)
    p = tl.exp(s - row_max[:, None])
    total = tl.sum(p, 1)
    p = (p / total[:, None]).to(weights.dtype.element_ty)
    tl.store(weights + index, p, mask=is_weight)
    tl.store(lse + first + tl.arange(0, ROWS), row_max + tl.log(total), mask=is_row)


@triton.jit
def _gradient_kernel(
    weights, grad_lse, grad_weights,
    rows, WINDOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows. Grid: (rows / ROWS,)."""
    first, is_row, index, is_weight = _locate(rows, WINDOW, ROWS, COLUMNS)
    weights += first * WINDOW
    grad_weights += first * WINDOW
    p = tl.load(weights + index, mask=is_weight, other=0.0).to(tl.float32)
    dp = tl.load(grad_weights + index, mask=is_weight, other=0.0).to(tl.float32)
    delta = tl.sum(p * dp, 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + first + tl.arange(0, ROWS), mask=is_row, other=0.0)
    ds = (p * (dp - delta[:, None])).to(grad_weights.dtype.element_ty)
    tl.store(grad_weights + index, ds, mask=is_weight)
