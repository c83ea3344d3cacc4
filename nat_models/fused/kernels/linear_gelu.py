"""Triton kernels of a linear layer with the GELU after it, and of the latter's gradient.

    hidden = x @ weight.T + bias          x [M, K], weight [N, K], bias [N]
    output = gelu(hidden)

The sum stays in registers until the GELU has been taken; `hidden` is written only where a gradient
will need it. With few channels such a product is a matter of memory, not of tensor cores: `x`
should be read once and the results written once. So there are several ways through the matrix:

    rows        a program keeps its rows of `x`, all K channels, and walks over the columns
    tiles       a program computes one tile, walking over K
    persistent  a program computes many tiles

Tensors are moved as blocks by tensor descriptors (Hopper's TMA): they start at multiples of 16
bytes, as do their rows.
"""

from functools import lru_cache
from math import ceil
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nat_models.fused.kernels.gelu import gelu, gelu_with_derivative
from neighborhood_attention.backends.triton.launch import CACHED_PROBLEMS


class Tile(NamedTuple):
    """Sizes of a program's block, and how it is computed."""

    way: str
    rows: int
    columns: int
    channels: int  # of a step
    warps: int
    stages: int
    resident: int = 0  # programs of a multiprocessor, for "persistent"


def choose_tile(channels: int, is_gradient: bool) -> Tile:
    """By measurement on an H100: the fastest at K = 64 to 512, or within 7 % of it."""
    if channels <= 64:
        return Tile("rows", 128, 64, 64, 8, 2)
    if is_gradient:
        return Tile("tiles", 64, 128, 64, 4, 3)
    return Tile("persistent", 128, 64, 64, 4, 3, 2)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, hidden: Tensor | None, output: Tensor,
    tile: Tile | None = None,
) -> None:  # fmt: skip
    """Fill `output` [..., N] and, unless None, `hidden` [..., N]; all tensors are contiguous."""
    width, channels = weight.shape
    rows = x.numel() // channels
    kinds = x.dtype, bias.dtype, hidden is not None
    launch = _launch(rows, channels, width, tile, False, x.device, *kinds)
    launch(x, weight, bias, hidden, output, None, None)


def backward(
    grad: Tensor, weight: Tensor, hidden: Tensor, grad_hidden: Tensor, activated: Tensor,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """Fill `grad_hidden` [..., N] through the GELU and the linear layer after it, all contiguous.

    The GELU's result is computed once more: so it need not be kept for the gradient of the weight.

    Args:
        grad: Gradient of that layer's result, [..., K].
        weight: Weight of that layer, [K, N].
        hidden: What the GELU was taken of, [..., N].
        grad_hidden: Its gradient, to be filled.
        activated: Its GELU, to be filled.
        tile: As chosen if None.

    Returns:
        The sum of `grad_hidden` over rows, [N], fp32.
    """
    channels, width = weight.shape
    rows = grad.numel() // channels
    strips = ceil(rows / (tile or choose_tile(channels, True)).rows)
    parts = torch.empty((strips, width), dtype=torch.float32, device=grad.device)
    launch = _launch(rows, channels, width, tile, True, grad.device, grad.dtype)
    launch(grad, weight, None, hidden, grad_hidden, activated, parts)
    return parts.sum(0)


@lru_cache(CACHED_PROBLEMS)
def _launch(
    rows: int,
    channels: int,
    width: int,
    tile: Tile | None,
    is_gradient: bool,
    device: torch.device,
    *_: Any,
) -> "BlockLaunch":
    tile = tile or choose_tile(channels, is_gradient)
    m, n, k = tile.rows, tile.columns, tile.channels
    tiles = triton.cdiv(rows, m) * triton.cdiv(width, n)
    arguments = {"WIDTH": width, "CHANNELS": channels, "M": m, "N": n, "K": k}
    kernel, programs = _gemm_gelu_tile_kernel, tiles
    if tile.way == "rows":
        kernel, programs = _gemm_gelu_rows_kernel, triton.cdiv(rows, m)
    elif tile.way == "persistent":
        kernel, programs = (
            _gemm_gelu_persistent_kernel,
            min(tiles, tile.resident * _processors(device)),
        )
        arguments |= {"tiles": tiles, "programs": programs}
    whole = (rows, width), (m, n)
    weight = ((channels, width), (k, n)) if is_gradient else ((width, channels), (n, k))
    blocks = ((rows, channels), (m, k)), weight, None, whole, whole, whole, None
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return BlockLaunch(kernel, programs, blocks, arguments, options)


@lru_cache
def _processors(device: torch.device) -> int:
    is_gpu = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if is_gpu else 1


class BlockLaunch:
    """As `Launch`, of a kernel that takes tensors as descriptors of blocks."""

    def __init__(
        self, kernel: Any, programs: int, blocks: Any, arguments: dict[str, Any], options: Any
    ) -> None:
        self._grid = (programs, 1, 1)
        self._kernel = kernel[self._grid]
        # Of each tensor: its sizes, and those of a block.
        self._blocks = blocks
        self._arguments = [arguments[name] for name in kernel.arg_names if name in arguments]
        self._options = options
        self._compiled: dict[int, tuple[Any, list[Any]]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current GPU and stream."""
        bias = tensors[2]
        alignment = 0 if bias is None else bias.data_ptr() % 16
        if alignment in self._compiled:
            launch, described = self._compiled[alignment]
            launch(*map(_address, tensors, described), *self._arguments)
            return
        described = [
            tensor if tensor is None or block is None
            else TensorDescriptor(tensor, list(block[0]), [block[0][1], 1], list(block[1]))
            for tensor, block in zip(tensors, self._blocks, strict=True)
        ]  # fmt: skip
        compiled = self._kernel(*described, *self._arguments, **self._options)
        if compiled is not None:  # not interpreted
            fields = [
                vars(d) | {"base": None} if isinstance(d, TensorDescriptor) else None
                for d in described
            ]
            self._compiled[alignment] = compiled[self._grid], fields


def _address(tensor: Tensor | None, fields: dict[str, Any] | None) -> Any:
    """A tensor as an argument: what has been checked is not checked again."""
    if tensor is None:
        return None
    if fields is None:
        return tensor.data_ptr()
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    vars(descriptor).update(fields)
    descriptor.base = tensor
    return descriptor


@triton.jit
def _gemm_gelu_rows_kernel(
    x, weight, bias, hidden, output, activated, parts,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """M rows, all columns; K >= CHANNELS. Grid: (ceil(rows / M),)."""
    first = tl.program_id(0) * M
    left = x.load([first, 0])
    for column in range(0, WIDTH, N):
        products = tl.dot(left, _load_weight(weight, column, 0, parts is not None))
        _finish(products, bias, hidden, output, activated, parts, first, column, WIDTH, M, N)


@triton.jit
def _gemm_gelu_tile_kernel(
    x, weight, bias, hidden, output, activated, parts,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One tile; tiles of the same rows follow one another. Grid: (row tiles * column tiles,)."""
    COLUMN_TILES: tl.constexpr = (WIDTH + N - 1) // N
    first = tl.program_id(0) // COLUMN_TILES * M
    column = tl.program_id(0) % COLUMN_TILES * N
    products = tl.zeros((M, N), tl.float32)
    for channel in range(0, CHANNELS, K):
        right = _load_weight(weight, column, channel, parts is not None)
        products = tl.dot(x.load([first, channel]), right, products)
    _finish(products, bias, hidden, output, activated, parts, first, column, WIDTH, M, N)


@triton.jit
def _gemm_gelu_persistent_kernel(
    x, weight, bias, hidden, output, activated, parts, tiles, programs,
    WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th tile, the next fetched while one is finished. Grid: (programs,)."""
    COLUMN_TILES: tl.constexpr = (WIDTH + N - 1) // N
    for tile in tl.range(tl.program_id(0), tiles, programs, flatten=True):
        first = tile // COLUMN_TILES * M
        column = tile % COLUMN_TILES * N
        products = tl.zeros((M, N), tl.float32)
        for channel in range(0, CHANNELS, K):
            right = _load_weight(weight, column, channel, parts is not None)
            products = tl.dot(x.load([first, channel]), right, products)
        _finish(products, bias, hidden, output, activated, parts, first, column, WIDTH, M, N)


@triton.jit
def _load_weight(weight, column, channel, IS_GRADIENT: tl.constexpr):
    """A block [K, N] of the right factor: of weight.T, or of weight [CHANNELS, WIDTH]."""
    return weight.load([channel, column]) if IS_GRADIENT else weight.load([column, channel]).T


@triton.jit
def _finish(
    products, bias, hidden, output, activated, parts, first, column,
    WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A tile [M, N]: bias and GELU, or with `parts` the GELU's derivative and the rows' sum."""
    columns = column + tl.arange(0, N)
    if parts is not None:
        value, derivative = gelu_with_derivative(hidden.load([first, column]).to(tl.float32))
        activated.store([first, column], value.to(activated.dtype))
        grad = products * derivative
        output.store([first, column], grad.to(output.dtype))
        tl.store(parts + first // M * WIDTH + columns, tl.sum(grad, 0), columns < WIDTH)
    else:
        shift = tl.load(bias + columns, columns < WIDTH, 0.0)
        values = products + shift.to(tl.float32)[None, :]
        if hidden is not None:
            hidden.store([first, column], values.to(hidden.dtype))
        output.store([first, column], gelu(values).to(output.dtype))
