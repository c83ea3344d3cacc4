"""Triton kernel of a linear layer of few rows, with what comes before and after it, in one launch.

    output = [residual + gamma *] [gelu]([layer_norm](x) @ weight.T + bias)

Brackets are optional: x [M, K], weight [N, K], bias and gamma [N], residual and output [M, N].
With few rows nothing but latency counts: of launches, and of loads that wait for one another. So a
program computes a small tile, and where K fits into one block it loads all that it needs before it
computes.

A launch may overlap with the kernel before it in the stream (programmatic dependent launch): only
the weight, the bias and gamma are read before that has ended. It lets the next launch begin no
earlier: programs of several kernels that wait take the room in which those of one should run.
"""

from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nat_models.fused.kernels.gelu import gelu
from neighborhood_attention.backends.triton.launch import CACHED_PROBLEMS, Launch, can_overlap

# Channels that a normalized row may have: a program holds its rows.
MAX_NORM_CHANNELS = 1024
COLUMNS = 64, 32, 16  # of a program
MIN_PROGRAMS, MAX_PROGRAMS = 64, 400  # where blocks can be so small, or so large
MAX_ROWS, MAX_WEIGHTS = 2**14, 2**15  # elements that a program's registers hold


class Tile(NamedTuple):
    """Sizes of a program's block, and how it is computed."""

    rows: int
    columns: int
    channels: int  # of a step
    warps: int
    stages: int
    overlaps: bool = True  # with the kernel before


def choose_tile(rows: int, channels: int, width: int, has_norm: bool) -> Tile:
    """Few rows, and as many columns as leave enough programs; more rows for fewer programs.

    By a search within NAT-Tiny for one image on an H200 (benchmarks/NOTES.md).
    """
    whole = max(16, triton.next_power_of_2(channels))
    step = whole if has_norm or whole <= 256 else min(512, whole // 4)
    fitting = [n for n in COLUMNS if n * step <= MAX_WEIGHTS]
    enough = (n for n in fitting if _programs(rows, width, 16, n) >= MIN_PROGRAMS)
    m, n = 16, next(enough, COLUMNS[-1])
    while m < 64 and 2 * m * step <= MAX_ROWS and _programs(rows, width, m, n) > MAX_PROGRAMS:
        m *= 2
    return Tile(m, n, step, 4 if m * step <= 2**13 else 8, 1 if step == whole else 3)


def _programs(rows: int, width: int, m: int, n: int) -> int:
    return ceil(rows / m) * ceil(width / n)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None,
    norm_bias: Tensor | None, eps: float, has_gelu: bool, gamma: Tensor | None,
    residual: Tensor | None, output: Tensor, tile: Tile | None = None,
) -> None:  # fmt: skip
    """Fill `output` [..., N]; all tensors are contiguous.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].
        norm_weight: Scale of the norm, [K]; None for no norm.
        norm_bias: Shift of the norm, [K].
        eps: Added to the variance.
        has_gelu: Whether the GELU is taken.
        gamma: Layer scale, [N].
        residual: What the result is added to, [..., N].
        output: To be filled.
        tile: As chosen if None.
    """
    width, channels = weight.shape
    rows = x.numel() // channels
    tensors = x, weight, bias, norm_weight, norm_bias, gamma, residual, output
    dtypes = [tensor if tensor is None else tensor.dtype for tensor in tensors]
    _launch(rows, channels, width, eps, has_gelu, tile, x.device, *dtypes)(*tensors)


@lru_cache(CACHED_PROBLEMS)
def _launch(
    rows: int, channels: int, width: int, eps: float, has_gelu: bool, tile: Tile | None,
    device: torch.device, *dtypes: Any,
) -> Launch:  # fmt: skip
    tile = tile or choose_tile(rows, channels, width, dtypes[3] is not None)
    overlaps = tile.overlaps and can_overlap(device)
    arguments = {
        "rows": rows, "EPS": eps, "CHANNELS": channels, "WIDTH": width, "HAS_GELU": has_gelu,
        "M": tile.rows, "N": tile.columns, "K": tile.channels, "OVERLAPS": overlaps,
    }  # fmt: skip
    programs = _programs(rows, width, tile.rows, tile.columns)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "launch_pdl": overlaps}
    return Launch(_small_linear_kernel, programs, arguments, **options)


@triton.jit(do_not_specialize=["rows"])
def _small_linear_kernel(
    x, weight, bias, norm_weight, norm_bias, gamma, residual, output, rows,
    EPS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, HAS_GELU: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One tile; tiles of the same columns follow one another. Grid: (tiles,)."""
    row_tiles = tl.cdiv(rows, M)
    row = tl.program_id(0) % row_tiles * M + tl.arange(0, M)
    column = tl.program_id(0) // row_tiles * N + tl.arange(0, N)
    channel = tl.arange(0, K)
    right = weight + column[None, :] * CHANNELS + channel[:, None]
    if K >= CHANNELS:
        weights = _load(right, channel[:, None], column[None, :], CHANNELS, WIDTH)
    if norm_weight is not None:
        norm_scale = tl.load(norm_weight + channel, channel < CHANNELS, 0.0).to(tl.float32)
        norm_shift = tl.load(norm_bias + channel, channel < CHANNELS, 0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + column, column < WIDTH, 0.0).to(tl.float32)
    if gamma is not None:
        scale = tl.load(gamma + column, column < WIDTH, 0.0).to(tl.float32)
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    offset = row[:, None].to(tl.int64) * WIDTH + column[None, :]
    exists = (row < rows)[:, None] & (column < WIDTH)[None, :]
    if residual is not None:
        added = tl.load(residual + offset, exists, 0.0).to(tl.float32)
    left = x + row[:, None].to(tl.int64) * CHANNELS + channel[None, :]
    if K >= CHANNELS:
        values = _load(left, row[:, None], channel[None, :], rows, CHANNELS)
        if norm_weight is not None:
            values = _normalize(
                values, (channel < CHANNELS)[None, :], norm_scale, norm_shift, EPS, CHANNELS
            )
        result = tl.dot(values.to(weights.dtype), weights)
    else:
        result = tl.zeros((M, N), tl.float32)
        for start in range(0, CHANNELS, K):
            values = _load(left + start, row[:, None], channel[None, :], rows, CHANNELS - start)
            weights = _load(
                right + start, channel[:, None], column[None, :], CHANNELS - start, WIDTH
            )
            result = tl.dot(values, weights, result)
    if bias is not None:
        result += shift[None, :]
    if HAS_GELU:
        result = gelu(result)
    if gamma is not None:
        result *= scale[None, :]
    if residual is not None:
        result += added
    tl.store(output + offset, result.to(output.dtype.element_ty), exists)


@triton.jit
def _load(pointers, i, j, count_i, count_j):
    """A block, 0 where an index is none."""
    return tl.load(pointers, (i < count_i) & (j < count_j), 0.0)


@triton.jit
def _normalize(values, exists, scale, shift, EPS: tl.constexpr, CHANNELS: tl.constexpr):
    """LayerNorm of rows, in fp32."""
    values = values.to(tl.float32)
    mean = tl.sum(values, 1, True) / CHANNELS
    centered = tl.where(exists, values - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 1, True) / CHANNELS + EPS)
    return centered * rstd * scale[None, :] + shift[None, :]
