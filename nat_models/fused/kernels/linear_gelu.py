"""Triton kernels of a linear layer with the GELU after it, and of the latter's gradient.

    hidden = x @ weight.T + bias          x [M, K], weight [N, K], bias [N]
    output = gelu(hidden)

The sum stays in registers until the GELU has been taken; `hidden` is written only where a gradient
will need it. With few channels such a product is a matter of memory, not of tensor cores: `x`
should be read once and the results written once. So there are several ways through the matrix:

    rows        a program keeps its rows of `x`, all K channels, and walks over the columns
    tiles       a program computes one tile, walking over K
    persistent  a program computes many tiles

Tensors are moved as blocks by tensor descriptors (Hopper's TMA) or through pointers.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nat_models.fused.kernels.gelu import gelu, gelu_with_derivative
from nat_models.fused.kernels.tiles import Tile, choose_tile
from neighborhood_attention.backends.triton.launch import CACHED_PROBLEMS, Launch

# Elements of the gradient's blocks, its warps, and its programs per multiprocessor.
GRADIENT_BLOCK, GRADIENT_WARPS, GRADIENT_WAVES = (16, 128), 4, 8


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor | None, output: Tensor,
    tile: Tile | None = None,
) -> None:  # fmt: skip
    """Fill `output` [..., N] and, unless None, `hidden` [..., N]; all tensors are contiguous."""
    width, channels = weight.shape
    rows = x.numel() // channels
    tile = tile or choose_tile(channels, width)
    kinds = x.dtype, bias.dtype, hidden is not None
    launch = _launch(rows, channels, width, tile, False, x.device, *kinds)
    launch(x, weight, bias, hidden, output, None)


def backward_of_two(
    grad: Tensor, weight: Tensor, hidden: Tensor, grad_hidden: Tensor, tile: Tile | None = None
) -> Tensor:
    """Fill `grad_hidden` [..., N] through the GELU and the linear layer after it, all contiguous.

    Args:
        grad: Gradient of that layer's result, [..., K].
        weight: Weight of that layer, [K, N].
        hidden: What the GELU was taken of, [..., N].
        grad_hidden: Its gradient, to be filled.
        tile: As chosen if None.

    Returns:
        The sum of `grad_hidden` over rows, [N], fp32.
    """
    channels, width = weight.shape
    rows = grad.numel() // channels
    tile = tile or choose_tile(channels, width)
    strips = triton.cdiv(rows, tile.rows)
    parts = torch.empty((strips, width), dtype=torch.float32, device=grad.device)
    launch = _launch(rows, channels, width, tile, True, grad.device, grad.dtype)
    launch(grad, weight, None, hidden, grad_hidden, parts)
    return parts.sum(0)


def backward(hidden: Tensor, grad_output: Tensor, grad_hidden: Tensor) -> Tensor:
    """Fill `grad_hidden` [..., N]; returns its sum over rows, [N], fp32."""
    width = hidden.shape[-1]
    rows = hidden.numel() // width
    block_rows, block_columns = GRADIENT_BLOCK
    columns = triton.cdiv(width, block_columns)
    wanted = GRADIENT_WAVES * _processors(hidden.device)
    strips = min(triton.cdiv(rows, block_rows), triton.cdiv(wanted, columns))
    parts = torch.empty((strips, width), dtype=torch.float32, device=hidden.device)
    launch = _gradient_launch(rows, width, strips, hidden.dtype, hidden.device)
    launch(hidden, grad_output, grad_hidden, parts)
    return parts.sum(0)


@lru_cache
def _processors(device: torch.device) -> int:
    is_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else 1


@lru_cache(CACHED_PROBLEMS)
def _gradient_launch(rows: int, width: int, strips: int, *_: Any) -> Launch:
    block_rows, block_columns = GRADIENT_BLOCK
    columns = triton.cdiv(width, block_columns)
    arguments = {
        "rows": rows, "strips": strips, "blocks": triton.cdiv(rows, block_rows),
        "WIDTH": width, "ROWS": block_rows, "COLUMNS": block_columns,
    }  # fmt: skip
    return Launch(_gelu_gradient_kernel, strips * columns, arguments, num_warps=GRADIENT_WARPS)


@lru_cache(CACHED_PROBLEMS)
def _launch(
    rows: int,
    channels: int,
    width: int,
    tile: Tile,
    is_gradient: bool,
    device: torch.device,
    *_: Any,
) -> "Launch | DescriptorLaunch":
    m, n, k = tile.rows, tile.columns, tile.channels
    row_tiles, column_tiles = triton.cdiv(rows, m), triton.cdiv(width, n)
    arguments = {
        "rows": rows, "WIDTH": width, "CHANNELS": channels,
        "M": m, "N": n, "K": k, "TMA": tile.descriptors,
    }  # fmt: skip
    kernel, programs = _gemm_gelu_tile_kernel, row_tiles * column_tiles
    if tile.way == "rows":
        kernel, programs = _gemm_gelu_rows_kernel, row_tiles
    elif tile.way == "persistent":
        kernel = _gemm_gelu_persistent_kernel
        programs = arguments["programs"] = min(programs, tile.resident * _processors(device))
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if not tile.descriptors:
        return Launch(kernel, programs, arguments, **options)
    whole, block = (rows, width), (m, n)
    weight = ((channels, width), (k, n)) if is_gradient else ((width, channels), (n, k))
    layouts = ((rows, channels), (m, k)), weight, None, (whole, block), (whole, block), None
    return DescriptorLaunch(kernel, programs, layouts, arguments, options)


class DescriptorLaunch:
    """As `Launch`, of a kernel that takes tensors as descriptors of blocks."""

    def __init__(
        self, kernel: Any, programs: int, layouts: Any, arguments: dict[str, Any], options: Any
    ) -> None:
        self._grid = (programs, 1, 1)
        self._kernel = kernel[self._grid]
        self._layouts = layouts
        self._arguments = [arguments[name] for name in kernel.arg_names[-len(arguments) :]]
        self._options = options
        self._compiled: dict[int, Any] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current GPU and stream."""
        described = [
            tensor if tensor is None or layout is None
            else TensorDescriptor(tensor, list(layout[0]), [layout[0][1], 1], list(layout[1]))
            for tensor, layout in zip(tensors, self._layouts, strict=True)
        ]  # fmt: skip
        bias = tensors[2]
        alignment = 0 if bias is None else bias.data_ptr() % 16
        launch = self._compiled.get(alignment)
        if launch is not None:
            launch(*described, *self._arguments)
            return
        compiled = self._kernel(*described, *self._arguments, **self._options)
        if compiled is not None:  # not interpreted
            self._compiled[alignment] = compiled[self._grid]


@triton.jit
def _gemm_gelu_rows_kernel(
    x, weight, bias, hidden, output, parts, rows,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """M rows, all columns; K >= CHANNELS. Grid: (ceil(rows / M),)."""
    first = tl.program_id(0) * M
    left = _load(x, first, 0, rows, CHANNELS, M, K, TMA)
    for column in range(0, WIDTH, N):
        right = _load_weight(weight, column, 0, WIDTH, CHANNELS, N, K, TMA, parts is not None)
        products = tl.dot(left, right)
        _finish(products, bias, hidden, output, parts, first, column, rows, WIDTH, M, N, TMA)


@triton.jit
def _gemm_gelu_tile_kernel(
    x, weight, bias, hidden, output, parts, rows,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile; tiles of the same rows follow one another. Grid: (row tiles * column tiles,)."""
    COLUMN_TILES: tl.constexpr = (WIDTH + N - 1) // N
    first = tl.program_id(0) // COLUMN_TILES * M
    column = tl.program_id(0) % COLUMN_TILES * N
    products = tl.zeros((M, N), tl.float32)
    for channel in range(0, CHANNELS, K):
        left = _load(x, first, channel, rows, CHANNELS, M, K, TMA)
        right = _load_weight(weight, column, channel, WIDTH, CHANNELS, N, K, TMA, parts is not None)
        products = tl.dot(left, right, products)
    _finish(products, bias, hidden, output, parts, first, column, rows, WIDTH, M, N, TMA)


@triton.jit
def _gemm_gelu_persistent_kernel(
    x, weight, bias, hidden, output, parts, rows, programs,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th tile, the next fetched while one is finished. Grid: (programs,)."""
    COLUMN_TILES: tl.constexpr = (WIDTH + N - 1) // N
    tiles = (rows + M - 1) // M * COLUMN_TILES
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        first = tile // COLUMN_TILES * M
        column = tile % COLUMN_TILES * N
        products = tl.zeros((M, N), tl.float32)
        for channel in range(0, CHANNELS, K):
            left = _load(x, first, channel, rows, CHANNELS, M, K, TMA)
            right = _load_weight(
                weight, column, channel, WIDTH, CHANNELS, N, K, TMA, parts is not None
            )
            products = tl.dot(left, right, products)
        _finish(products, bias, hidden, output, parts, first, column, rows, WIDTH, M, N, TMA)


@triton.jit
def _finish(
    products, bias, hidden, output, parts, first, column, rows,
    WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile [M, N]: bias and GELU, or with `parts` the GELU's derivative and the rows' sum."""
    columns = column + tl.arange(0, N)
    if parts is not None:
        values = _load(hidden, first, column, rows, WIDTH, M, N, TMA).to(tl.float32)
        _, derivative = gelu_with_derivative(values)
        grad = products * derivative
        _store(output, grad, first, column, rows, WIDTH, M, N, TMA)
        tl.store(parts + first // M * WIDTH + columns, tl.sum(grad, 0), columns < WIDTH)
    else:
        shift = tl.load(bias + columns, columns < WIDTH, 0.0)
        values = products + shift.to(tl.float32)[None, :]
        if hidden is not None:
            _store(hidden, values, first, column, rows, WIDTH, M, N, TMA)
        _store(output, gelu(values), first, column, rows, WIDTH, M, N, TMA)


@triton.jit
def _load_weight(
    weight, column, channel, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr, IS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """A block [K, N] of the right factor: of weight.T, or of weight [CHANNELS, WIDTH]."""
    if IS_GRADIENT:
        block = _load(weight, channel, column, CHANNELS, WIDTH, K, N, TMA)
    else:
        block = _load(weight, column, channel, WIDTH, CHANNELS, N, K, TMA).T
    return block


@triton.jit
def _load(
    source, row, column, rows, COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A block [HEIGHT, WIDTH] of [rows, COLUMNS], zero beyond it."""
    if TMA:
        block = source.load([row, column])
    else:
        pointers, exists = _block(source, row, column, rows, COLUMNS, HEIGHT, WIDTH)
        block = tl.load(pointers, exists, 0.0)
    return block


@triton.jit
def _store(
    target, values, row, column, rows, COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """What lies in [rows, COLUMNS] of a block."""
    if TMA:
        target.store([row, column], values.to(target.dtype))
    else:
        pointers, exists = _block(target, row, column, rows, COLUMNS, HEIGHT, WIDTH)
        tl.store(pointers, values.to(target.dtype.element_ty), exists)


@triton.jit
def _block(
    tensor, row, column, rows,
    COLUMNS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Pointers to a block, and which elements exist."""
    row = row + tl.arange(0, HEIGHT)[:, None]
    column = column + tl.arange(0, WIDTH)[None, :]
    exists = row < rows
    if COLUMNS % WIDTH != 0:
        exists = exists & (column < COLUMNS)
    return tensor + row.to(tl.int64) * COLUMNS + column, exists


@triton.jit
def _gelu_gradient_kernel(
    hidden, grad_output, grad_hidden, parts, rows, strips, blocks,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of every `strips`-th block of rows. Grid: (strips * column blocks,)."""
    COLUMN_BLOCKS: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    strip = tl.program_id(0) // COLUMN_BLOCKS
    first = tl.program_id(0) % COLUMN_BLOCKS * COLUMNS
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(strip, blocks, strips):
        source, exists = _block(hidden, block * ROWS, first, rows, WIDTH, ROWS, COLUMNS)
        values = tl.load(source, exists, 0.0).to(tl.float32)
        source, _ = _block(grad_output, block * ROWS, first, rows, WIDTH, ROWS, COLUMNS)
        grad = tl.load(source, exists, 0.0).to(tl.float32)
        _, derivative = gelu_with_derivative(values)
        grad *= derivative
        target, _ = _block(grad_hidden, block * ROWS, first, rows, WIDTH, ROWS, COLUMNS)
        rounded = grad.to(grad_hidden.dtype.element_ty)
        tl.store(target, rounded, exists)
        total += grad
    column = first + tl.arange(0, COLUMNS)
    tl.store(parts + strip * WIDTH + column, tl.sum(total, 0), column < WIDTH)
