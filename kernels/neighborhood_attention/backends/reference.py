"""Neighborhood attention in plain PyTorch, for any device, floating dtype and number of axes.

Queries are cut into tiles within their dilation group. A tile attends to one block of keys, the
union of its windows (its halo), so that scores are small dense matrix products; what lies outside a
query's window is masked. Nothing of size tokens x tokens exists, and scores are computed in pieces
of bounded size.

Shape suffixes: B batch, N heads, D head dimension, T query tiles, Q queries of a tile, K keys of
its halo.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, wraps
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from neighborhood_attention.backends import Inputs
from neighborhood_attention.geometry import (
    Neighborhood,
    bias_index,
    group_length,
    window_end,
    window_start,
)

# Queries of a tile along an axis, by the number of axes: small halos against large products.
MAX_TILE = {1: 64, 2: 8, 3: 4}
# Scores computed at a time; bounds the memory.
MAX_SCORES = 2**24


@dataclass(frozen=True)
class AxisTiles:
    """The tiles of one axis, for all of its dilation groups."""

    queries: Tensor  # [T, Q] positions; the last tile of a group repeats its last query
    is_query: Tensor  # [T, Q] False for those repetitions
    keys: Tensor  # [T, K] positions of the halo
    attends: Tensor  # [T, Q, K]
    bias_index: Tensor  # [T, Q, K] into the relative positional bias; 0 outside the window

    def __getitem__(self, tiles: slice) -> "AxisTiles":
        return AxisTiles(*(getattr(self, field)[tiles] for field in self.__dataclass_fields__))


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would round the scores."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        inputs = next(x for x in arguments if isinstance(x, Inputs))
        with torch.autocast(inputs.query.device.type, enabled=False):
            return function(*arguments)

    return call


def supports(inputs: Inputs, window: Neighborhood) -> str | None:
    """Runs everything."""
    return None


@_without_autocast
def forward(inputs: Inputs, window: Neighborhood, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; computes in fp32, or fp64 for fp64."""
    query, key, value, rpb, *_ = inputs
    dtype = _compute_dtype(query)
    output = torch.empty(value.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:-1], dtype=dtype, device=query.device)
    for axes, bias, batch in _pieces(query, rpb, window):
        scores = _scores(query[batch], key[batch], axes, bias, scale)
        lse_piece = scores.logsumexp(-1, keepdim=True)
        probabilities = scores.sub_(lse_piece).exp_()
        values = _gather(value[batch], [axis.keys for axis in axes]).to(dtype)
        _scatter_queries(output[batch], probabilities @ values, axes)
        _scatter_queries(lse[batch].unsqueeze(-1), lse_piece, axes)
    return output, lse


@_without_autocast
def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    inputs: Inputs,
    output: Tensor,
    lse: Tensor,
    window: Neighborhood,
    scale: float,
    gradients: Inputs,
) -> None:
    """Fills the gradient buffers."""
    query, key, value, rpb, *_ = inputs
    dtype = _compute_dtype(query)
    key_sum, value_sum = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (key, value))
    bias_sum = None
    if gradients.rpb is not None:
        bias_sum = torch.zeros(gradients.rpb.shape, dtype=dtype, device=query.device)
    for axes, bias, batch in _pieces(query, rpb, window):
        queries, keys = [axis.queries for axis in axes], [axis.keys for axis in axes]
        is_query = _outer([axis.is_query for axis in axes]).unsqueeze(-1)
        attends = bias != -torch.inf
        scores = _scores(query[batch], key[batch], axes, bias, scale)
        probabilities = scores.sub_(_gather(lse[batch].unsqueeze(-1), queries)).exp_()
        # Repeated queries must not count twice.
        grad = _gather(grad_output[batch], queries).to(dtype).masked_fill(~is_query, 0)
        _add_at_keys(value_sum[batch], probabilities.mT @ grad, axes)
        # Masked, since an overflow outside the window times a zero probability is NaN.
        grad_scores = (grad @ _gather(value[batch], keys).to(dtype).mT).masked_fill(~attends, 0)
        delta = (probabilities * grad_scores).sum(-1, keepdim=True)
        if grad_lse is not None:
            grad = _gather(grad_lse[batch].unsqueeze(-1), queries).to(dtype)
            delta -= grad.masked_fill(~is_query, 0)
        grad_scores.sub_(delta).mul_(probabilities)
        if bias_sum is not None:
            _add_at_bias(bias_sum, grad_scores.sum(0), axes)
        grad = grad_scores @ _gather(key[batch], keys).to(dtype)
        _scatter_queries(gradients.query[batch], grad.mul_(scale), axes)
        grad = grad_scores.mT @ _gather(query[batch], queries).to(dtype)
        _add_at_keys(key_sum[batch], grad.mul_(scale), axes)
    gradients.key.copy_(key_sum)
    gradients.value.copy_(value_sum)
    if gradients.rpb is not None and bias_sum is not None:
        gradients.rpb.copy_(bias_sum)


def _compute_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def _pieces(
    query: Tensor, rpb: Tensor | None, window: Neighborhood
) -> Iterator[tuple[list[AxisTiles], Tensor, slice]]:
    """The work, in pieces of bounded size: some tiles of the first axis, for some images."""
    batch, spatial, heads = query.shape[0], query.shape[1:-2], query.shape[-2]
    settings = zip(
        spatial, window.kernel_size, window.stride, window.dilation, window.is_causal, strict=True
    )
    axes = [axis_tiles(*axis, window.dims, query.device) for axis in settings]
    all_tiles = axes[0].attends.shape[0]
    per_tile = heads * prod(axis.attends.numel() for axis in axes) // all_tiles
    tiles = max(1, MAX_SCORES // per_tile)
    images = max(1, MAX_SCORES // (per_tile * min(tiles, all_tiles)))
    for tile in range(0, all_tiles, tiles):
        piece = [axes[0][tile : tile + tiles], *axes[1:]]
        bias = _bias(rpb, piece, _compute_dtype(query))
        for image in range(0, batch, images):
            yield piece, bias, slice(image, image + images)


@lru_cache(maxsize=512)
def axis_tiles(
    length: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
    dims: int,
    device: torch.device,
) -> AxisTiles:
    """The tiles of an axis of `length` tokens in a problem of `dims` axes."""
    longest = group_length(0, length, dilation)
    size = min(longest, max(4, min(kernel_size, MAX_TILE[dims])))
    size = ceil(longest / ceil(longest / size))
    tiles = [
        (group, first, min(first + size, group_length(group, length, dilation)) - 1)
        for group in range(dilation)
        for first in range(0, group_length(group, length, dilation), size)
    ]
    group, first, last = torch.tensor(tiles).T[:, :, None].unbind()
    slot = torch.arange(size)
    query = torch.minimum(first + slot, last)
    start, end = _windows(length, kernel_size, stride, dilation, is_causal)
    start, end = start[query * dilation + group], end[query * dilation + group]
    halo = start[:, :1] + torch.arange(int((end[:, -1] - start[:, 0]).max()))
    attends = (halo[:, None] >= start[..., None]) & (halo[:, None] < end[..., None])
    offset: Any = bias_index  # of ints by its annotations
    index = offset(query[..., None], halo[:, None], kernel_size).masked_fill(~attends, 0)
    key = torch.minimum(halo, end[:, -1:] - 1)
    queries, keys = query * dilation + group, key * dilation + group
    fields = queries, first + slot <= last, keys, attends, index
    return AxisTiles(*(field.to(device) for field in fields))


def _windows(
    length: int, kernel_size: int, stride: int, dilation: int, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Start and end of the window of every position of an axis, in its group's coordinates."""
    bounds = []
    for position in range(length):
        query, members = position // dilation, group_length(position % dilation, length, dilation)
        start = window_start(query, members, kernel_size, stride, is_causal)
        bounds.append((start, window_end(query, start, kernel_size, is_causal)))
    start, end = torch.tensor(bounds).T
    return start, end


def _outer(tables: list[Tensor]) -> Tensor:
    """Booleans [T_a, X_a, ...] of each axis to [T, X, ...] of all axes: all must be true."""
    dims, columns = len(tables), tables[0].dim()
    result = torch.ones((), dtype=torch.bool, device=tables[0].device)
    for a, table in enumerate(tables):
        result = result & table.view(_interleaved(table, a, dims))
    return result.reshape([prod(result.shape[c * dims : (c + 1) * dims]) for c in range(columns)])


def _interleaved(table: Tensor, axis: int, dims: int) -> list[int]:
    """Shape that spreads an axis's [T, X, ...] over (T_0, T_1, ..., X_0, X_1, ...)."""
    shape = [1] * (dims * table.dim())
    shape[axis::dims] = table.shape
    return shape


def _bias(rpb: Tensor | None, axes: list[AxisTiles], dtype: torch.dtype) -> Tensor:
    """Addend of the scores [1 or N, T, Q, K]: the bias, and -inf outside the window."""
    attends = _outer([axis.attends for axis in axes])
    if rpb is None:
        bias = torch.zeros(1, *attends.shape, dtype=dtype, device=attends.device)
    else:
        index: list[Any] = [
            axis.bias_index.view(_interleaved(axis.bias_index, a, len(axes)))
            for a, axis in enumerate(axes)
        ]
        bias = rpb.to(dtype)[(slice(None), *index)].reshape(rpb.shape[0], *attends.shape)
    return bias.masked_fill_(~attends, -torch.inf)


def _scores(
    query: Tensor, key: Tensor, axes: list[AxisTiles], bias: Tensor, scale: float
) -> Tensor:
    """Biased and masked logits [B, N, T, Q, K]."""
    queries = _gather(query, [axis.queries for axis in axes]).to(bias.dtype)
    keys = _gather(key, [axis.keys for axis in axes]).to(bias.dtype)
    scores = (queries * scale) @ keys.mT
    # Not a plain addition: an overflow outside the window must not meet the -inf.
    return scores.add_(bias).masked_fill_(bias == -torch.inf, -torch.inf)


def _gather(tensor: Tensor, positions: list[Tensor]) -> Tensor:
    """[B, *spatial, N, D] at positions [T_a, X_a] of each axis: [B, N, T, X, D]."""
    index = [
        position.view(_interleaved(position, a, len(positions)))
        for a, position in enumerate(positions)
    ]
    picked = tensor.movedim(-2, 1)[(slice(None),) * 2 + tuple(index)]
    tiles, slots = (prod(p.shape[column] for p in positions) for column in (0, 1))
    return picked.reshape(*picked.shape[:2], tiles, slots, tensor.shape[-1])


def _scatter_queries(target: Tensor, tiles: Tensor, axes: list[AxisTiles]) -> None:
    """Write [B, N, T, Q, D] to the queries' positions in [B, *spatial, N, D]."""
    tiles = _flat_axes(tiles, [axis.queries for axis in axes])
    positions = []
    for a, axis in enumerate(axes):
        slots = axis.is_query.flatten().nonzero().squeeze(1)
        if slots.numel() != axis.is_query.numel():
            tiles = tiles.index_select(2 + a, slots)
        position = axis.queries.flatten()[slots]
        positions.append(position.view(-1, *[1] * (len(axes) - 1 - a)))
    target.movedim(-2, 1)[(slice(None),) * 2 + tuple(positions)] = tiles.to(target.dtype)


def _add_at_keys(target: Tensor, tiles: Tensor, axes: list[AxisTiles]) -> None:
    """Add [B, N, T, K, D] at the keys' positions in [B, *spatial, N, D]."""
    tiles = _flat_axes(tiles, [axis.keys for axis in axes])
    for a, axis in reversed(list(enumerate(axes))):
        shape = list(tiles.shape)
        shape[2 + a] = target.shape[1 + a]
        tiles = _accumulate(tiles.new_zeros(shape), 2 + a, axis.keys.flatten(), tiles)
    target += tiles.movedim(1, -2)


def _add_at_bias(target: Tensor, tiles: Tensor, axes: list[AxisTiles]) -> None:
    """Add [N, T, Q, K] at its entries of the bias [N, 2 * kernel_size - 1, ...]."""
    sizes = [axis.attends.shape[column] for column in range(3) for axis in axes]
    tiles = tiles.reshape(tiles.shape[0], *sizes)
    order = [1 + column * len(axes) + a for a in range(len(axes)) for column in range(3)]
    tiles = tiles.permute(0, *order)
    tiles = tiles.reshape(tiles.shape[0], *(axis.attends.numel() for axis in axes))
    for a, axis in reversed(list(enumerate(axes))):
        shape = list(tiles.shape)
        shape[1 + a] = target.shape[1 + a]
        tiles = _accumulate(tiles.new_zeros(shape), 1 + a, axis.bias_index.flatten(), tiles)
    target += tiles


def _flat_axes(tiles: Tensor, positions: list[Tensor]) -> Tensor:
    """[B, N, T, X, D] to [B, N, T_0 * X_0, T_1 * X_1, ..., D]."""
    dims = len(positions)
    sizes = [position.shape[column] for column in (0, 1) for position in positions]
    tiles = tiles.reshape(*tiles.shape[:2], *sizes, tiles.shape[-1])
    order = [2 + column * dims + a for a in range(dims) for column in (0, 1)]
    tiles = tiles.permute(0, 1, *order, -1)
    return tiles.reshape(*tiles.shape[:2], *(p.numel() for p in positions), tiles.shape[-1])


def _accumulate(target: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    """`target.index_add_(dim, index, source)` in a fixed order on every device."""
    if not target.is_cuda:
        return target.index_add_(dim, index, source)
    # Sorts the index; index_add_ would use atomics.
    rows = target.transpose(0, dim).index_put_((index,), source.transpose(0, dim), accumulate=True)
    return rows.transpose(0, dim)
