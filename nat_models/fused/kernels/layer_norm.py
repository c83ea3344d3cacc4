"""Triton kernels of a residual addition with the LayerNorm after it, in one pass over the rows.

    sum = x + gamma * keep[sample] * branch          (sum = x where there is no branch)
    standardized = (sum - mean) * rstd
    normalized = standardized * weight + bias

gamma is a layer scale (arXiv:2103.17239), keep the factor of stochastic depth (arXiv:1603.09382).
A program holds several whole rows, in fp32. The backward needs `standardized` and rstd alone, and
gives `normalized` once more, so that neither it nor `sum` need be kept. Its programs walk over the
rows, each adding up its part of the parameters' gradients in registers; the parts are summed
afterwards, in a fixed order.
"""

from functools import lru_cache
from math import ceil
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neighborhood_attention.backends.triton.launch import CACHED_PROBLEMS, Launch

# Channels that a row may have: it is kept in registers.
MAX_CHANNELS = 4096
# Elements that a program holds at a time, and its warps: 16 elements a thread. By measurement on
# an H100 with 64 to 512 channels: the fastest, or within 5 % of it.
ELEMENTS, WARPS = 1024, 2
# Programs of the backward, per multiprocessor.
WAVES = 8


def forward(
    x: Tensor, branch: Tensor | None, gamma: Tensor | None, keep: Tensor | None,
    weight: Tensor, bias: Tensor, eps: float, total: Tensor | None, normalized: Tensor,
    standardized: Tensor | None, rstd: Tensor | None,
) -> None:  # fmt: skip
    """Fill the last four from contiguous tensors [..., C]; `rstd` is [...].

    `total` is None without a branch, the last two where no gradient will be needed.
    """
    rows = x.numel() // x.shape[-1]
    samples = rows // keep.numel() if keep is not None else 1
    _forward_launch(
        rows, x.shape[-1], samples, eps,
        *_kinds(x, branch, gamma, keep, weight, bias, total, normalized, standardized),
    )(x, branch, gamma, keep, weight, bias, total, normalized, standardized, rstd)  # fmt: skip


def backward(
    standardized: Tensor, rstd: Tensor, branch: Tensor | None, gamma: Tensor | None,
    keep: Tensor | None, weight: Tensor, bias: Tensor | None, grad_total: Tensor | None,
    grad_normalized: Tensor, grad_x: Tensor, grad_branch: Tensor | None,
    normalized: Tensor | None, grad_parameters: Tensor,
) -> None:  # fmt: skip
    """Fill the last four from contiguous tensors.

    `grad_parameters` is [2, C] of weight and bias or [3, C] of gamma too, fp32; `normalized` needs
    `bias`.
    """
    channels = standardized.shape[-1]
    rows = standardized.numel() // channels
    samples = rows // keep.numel() if keep is not None else 1
    programs = _backward_programs(rows, channels, standardized.device)
    parts = grad_parameters.new_empty((len(grad_parameters), programs, channels))
    tensors = (
        standardized, rstd, branch, gamma, keep, weight, bias, grad_total, grad_normalized,
        grad_x, grad_branch, normalized,
    )  # fmt: skip
    _backward_launch(rows, channels, samples, programs, *_kinds(*tensors))(*tensors, parts)
    torch.sum(parts, 1, out=grad_parameters)


def _kinds(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """What a compiled kernel depends on, of tensors: their dtypes and device."""
    return first.device, first.dtype, *[x if x is None else x.dtype for x in others]


@lru_cache
def _block(channels: int) -> tuple[int, int]:
    """Rows of a program, and elements of its rows."""
    columns = triton.next_power_of_2(channels)
    return max(1, ELEMENTS // columns), columns


def _backward_programs(rows: int, channels: int, device: torch.device) -> int:
    blocks = ceil(rows / _block(channels)[0])  # at each call, where `triton.cdiv` takes long
    processors = _processors(device) if device.type == "cuda" else 1
    return min(blocks, WAVES * processors)


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(CACHED_PROBLEMS)
def _forward_launch(rows: int, channels: int, samples: int, eps: float, *_: Any) -> Launch:
    block_rows, block_columns = _block(channels)
    arguments = {
        "rows": rows, "rows_per_sample": samples, "EPS": eps, "CHANNELS": channels,
        "ROWS": block_rows, "COLUMNS": block_columns,
    }  # fmt: skip
    programs = triton.cdiv(rows, block_rows)
    return Launch(_layer_norm_forward_kernel, programs, arguments, num_warps=_warps(block_columns))


@lru_cache(CACHED_PROBLEMS)
def _backward_launch(rows: int, channels: int, samples: int, programs: int, *_: Any) -> Launch:
    block_rows, block_columns = _block(channels)
    arguments = {
        "rows": rows, "rows_per_sample": samples, "blocks": triton.cdiv(rows, block_rows),
        "programs": programs, "CHANNELS": channels,
        "ROWS": block_rows, "COLUMNS": block_columns,
    }  # fmt: skip
    return Launch(_layer_norm_backward_kernel, programs, arguments, num_warps=_warps(block_columns))


def _warps(columns: int) -> int:
    return WARPS * max(1, columns // ELEMENTS)


@triton.jit
def _layer_norm_forward_kernel(
    x, branch, gamma, keep, weight, bias, total, normalized, standardized, rstd,
    rows, rows_per_sample,
    EPS: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows. Grid: (ceil(rows / ROWS),)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, is_column = _columns(CHANNELS, COLUMNS)
    offset = row[:, None].to(tl.int64) * CHANNELS + column
    exists = (row < rows)[:, None] & is_column
    values = tl.load(x + offset, exists, 0.0).to(tl.float32)
    if branch is not None:
        added = tl.load(branch + offset, exists, 0.0).to(tl.float32)
        values += added * _factor(gamma, keep, row, rows, rows_per_sample, column, is_column)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + offset, rounded, exists)
        values = rounded.to(tl.float32)
    mean = tl.sum(values, 1) / CHANNELS
    centered = tl.where(is_column, values - mean[:, None], 0.0)
    factor = tl.rsqrt(tl.sum(centered * centered, 1) / CHANNELS + EPS)
    values = centered * factor[:, None]
    if standardized is not None:
        tl.store(standardized + offset, values.to(standardized.dtype.element_ty), exists)
        tl.store(rstd + row, factor, row < rows)
    scale = tl.load(weight + column, is_column, 0.0).to(tl.float32)
    shift = tl.load(bias + column, is_column, 0.0).to(tl.float32)
    result = values * scale + shift
    tl.store(normalized + offset, result.to(normalized.dtype.element_ty), exists)


@triton.jit
def _layer_norm_backward_kernel(
    standardized, rstd, branch, gamma, keep, weight, bias, grad_total, grad_normalized,
    grad_x, grad_branch, normalized, parts, rows, rows_per_sample, blocks, programs,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th block of ROWS rows. Grid: (programs,)."""
    column, is_column = _columns(CHANNELS, COLUMNS)
    scale = tl.load(weight + column, is_column, 0.0).to(tl.float32)
    if normalized is not None:
        shift = tl.load(bias + column, is_column, 0.0).to(tl.float32)
    grad_weight = tl.zeros((ROWS, COLUMNS), tl.float32)
    grad_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    if gamma is not None:
        grad_gamma = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(tl.program_id(0), blocks, programs):
        row = block * ROWS + tl.arange(0, ROWS)
        offset = row[:, None].to(tl.int64) * CHANNELS + column
        exists = (row < rows)[:, None] & is_column
        values = tl.load(standardized + offset, exists, 0.0).to(tl.float32)
        grad = tl.load(grad_normalized + offset, exists, 0.0).to(tl.float32)
        factor = tl.load(rstd + row, row < rows, 0.0)
        if normalized is not None:
            result = values * scale + shift
            tl.store(normalized + offset, result.to(normalized.dtype.element_ty), exists)
        grad_weight += grad * values
        grad_bias += grad
        grad *= scale
        along = tl.sum(grad * values, 1) / CHANNELS
        mean = tl.sum(grad, 1) / CHANNELS
        grad = (grad - mean[:, None] - values * along[:, None]) * factor[:, None]
        if grad_total is not None:
            grad += tl.load(grad_total + offset, exists, 0.0).to(tl.float32)
        tl.store(grad_x + offset, grad.to(grad_x.dtype.element_ty), exists)
        if gamma is not None:
            kept = grad * _factor(None, keep, row, rows, rows_per_sample, column, is_column)
            added = tl.load(branch + offset, exists, 0.0).to(tl.float32)
            grad_gamma += kept * added
        if grad_branch is not None:
            grad *= _factor(gamma, keep, row, rows, rows_per_sample, column, is_column)
            tl.store(grad_branch + offset, grad.to(grad_branch.dtype.element_ty), exists)
    part = parts + tl.program_id(0) * CHANNELS + column
    tl.store(part, tl.sum(grad_weight, 0, True), is_column)
    tl.store(part + programs * CHANNELS, tl.sum(grad_bias, 0, True), is_column)
    if gamma is not None:
        tl.store(part + 2 * programs * CHANNELS, tl.sum(grad_gamma, 0, True), is_column)


@triton.jit
def _columns(CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):
    """Indices of a row's elements, and which exist, [1, COLUMNS]."""
    column = tl.arange(0, COLUMNS)[None, :]
    return column, column < CHANNELS


@triton.jit
def _factor(gamma, keep, row, rows, rows_per_sample, column, is_column):
    """Of the branch, broadcastable to [ROWS, COLUMNS]."""
    factor = tl.full((1, 1), 1.0, tl.float32)
    if gamma is not None:
        factor *= tl.load(gamma + column, is_column, 0.0).to(tl.float32)
    if keep is not None:
        factor *= tl.load(keep + row // rows_per_sample, row < rows, 0.0).to(tl.float32)[:, None]
    return factor
