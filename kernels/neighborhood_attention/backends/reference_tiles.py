"""Tiles of queries and the keys that they see, for the reference backend.

Queries are cut into tiles within their dilation group. A tile attends to one block of keys, the
union of its windows (its halo), so that scores are small dense matrix products; what lies outside a
query's window is masked.

Shape suffixes: B batch, N heads, G key heads, D head dimension, T tiles, Q queries of a tile, K
keys of its halo. Query heads that share a key head are rows of one product: R = N / G * Q.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor

from neighborhood_attention.geometry import (
    Neighborhood,
    bias_index,
    group_length,
    window_end,
    window_start,
)

# Queries of a tile along an axis, by the number of axes: small halos against large products.
MAX_TILE = {1: 64, 2: 8, 3: 4}


@dataclass(frozen=True)
class AxisTiles:
    """The tiles of one axis, for all of its dilation groups."""

    queries: Tensor  # [T, Q] positions; the last tile of a group repeats its last query
    is_query: Tensor  # [T, Q] False for those repetitions
    keys: Tensor  # [T, K] positions of the halo
    attends: Tensor  # [T, Q, K]
    bias_index: Tensor  # [T, Q, K] into the relative positional bias; 0 outside the window
    first: Tensor  # [T, Q] index into the halo of the window's first key

    def __getitem__(self, tiles: slice) -> "AxisTiles":
        return AxisTiles(*(getattr(self, field)[tiles] for field in self.__dataclass_fields__))


@dataclass(frozen=True)
class Tiles:
    """The tiles of a map: products of those of its axes."""

    axes: list[AxisTiles]

    @property
    def is_query(self) -> Tensor:
        """[T, Q]: False for a query that stands twice."""
        return _outer([axis.is_query for axis in self.axes])

    @property
    def halo_size(self) -> int:
        """K."""
        return prod(axis.keys.shape[1] for axis in self.axes)

    @property
    def attends(self) -> Tensor:
        """[T, Q, K]."""
        return _outer([axis.attends for axis in self.axes])

    def queries(self, tensor: Tensor, key_heads: int) -> Tensor:
        """[B, *spatial, N, D] to [B, G, T, R, D]."""
        return self.by_key_head(_gather(tensor, [axis.queries for axis in self.axes]), key_heads)

    def keys(self, tensor: Tensor) -> Tensor:
        """[B, *spatial, G, D] to [B, G, T, K, D]."""
        return _gather(tensor, [axis.keys for axis in self.axes])

    def bias(self, rpb: Tensor | None, heads: int, key_heads: int, dtype: torch.dtype) -> Tensor:
        """Addend of the scores, [1, G or 1, T, R, K]: the bias, and -inf outside the window."""
        attends = self.attends
        if rpb is None:
            bias = torch.zeros(attends.shape, dtype=dtype, device=attends.device)
            bias = bias.masked_fill_(~attends, -torch.inf).expand(heads // key_heads, -1, -1, -1)
            return self.by_key_head(bias[None], 1)
        index: list[Any] = [
            axis.bias_index.view(_interleaved(axis.bias_index, a, len(self.axes)))
            for a, axis in enumerate(self.axes)
        ]
        bias = rpb.to(dtype)[(slice(None), *index)].reshape(heads, *attends.shape)
        return self.by_key_head(bias.masked_fill_(~attends, -torch.inf)[None], key_heads)

    def to_windows(self, tiles: Tensor, window: Neighborhood, no_key: float) -> Tensor:
        """[B, N, T, Q, K] to [B, N, T, Q, W]: the keys of each window, row by row.

        A causal window may have fewer than W = `window.size`; their places hold `no_key`.
        """
        index, is_key = [], []
        for axis, size in zip(self.axes, window.kernel_size, strict=True):
            last = axis.attends.shape[-1] - 1
            place = axis.first.unsqueeze(-1) + torch.arange(size, device=axis.first.device)
            index.append(place.clamp(max=last))
            is_key.append(axis.attends.gather(-1, index[-1]) & (place <= last))
        flat = _flat_index(index, [axis.attends.shape[-1] for axis in self.axes])
        windows = tiles.gather(-1, flat.expand(*tiles.shape[:2], *flat.shape))
        return windows.masked_fill_(~_outer(is_key), no_key)

    def from_windows(self, windows: Tensor, window: Neighborhood) -> Tensor:
        """[B, N, T, Q, W] to [B, N, T, Q, K]; 0 outside the window and for repeated queries."""
        index = [
            torch.arange(axis.attends.shape[-1], device=axis.first.device)
            - axis.first.unsqueeze(-1)
            for axis in self.axes
        ]
        index = [
            place.clamp(0, size - 1) for place, size in zip(index, window.kernel_size, strict=True)
        ]
        flat = _flat_index(index, list(window.kernel_size))
        tiles = windows.gather(-1, flat.expand(*windows.shape[:2], *flat.shape))
        return tiles.masked_fill_(~(self.attends & self.is_query.unsqueeze(-1)), 0)

    @staticmethod
    def by_key_head(tiles: Tensor, key_heads: int) -> Tensor:
        """[B, N, T, Q, X] to [B, G, T, R, X]."""
        if tiles.shape[1] == key_heads:
            return tiles
        grouped: Tensor = tiles.unflatten(1, (key_heads, -1))
        return grouped.transpose(2, 3).flatten(3, 4)

    @staticmethod
    def by_head(tiles: Tensor, heads: int) -> Tensor:
        """[B, G, T, R, X] to [B, N, T, Q, X]."""
        if tiles.shape[1] == heads:
            return tiles
        grouped: Tensor = tiles.unflatten(3, (heads // tiles.shape[1], -1))
        return grouped.transpose(2, 3).flatten(1, 2)

    def write_queries(self, target: Tensor, tiles: Tensor) -> None:
        """Write [B, G, T, R, D] to the queries' positions in [B, *spatial, N, D]."""
        tiles = self.by_head(tiles, target.shape[-2])
        tiles = _flat_axes(tiles, [axis.queries for axis in self.axes])
        dims, positions = len(self.axes), []
        for a, axis in enumerate(self.axes):
            slots = axis.is_query.flatten().nonzero().squeeze(1)
            if slots.numel() != axis.is_query.numel():
                tiles = tiles.index_select(2 + a, slots)
            position = axis.queries.flatten()[slots]
            positions.append(position.view(-1, *[1] * (dims - 1 - a)))
        # Assigned by slices, one head is written in part: PyTorch 2.11, on a GPU in deterministic
        # mode (as in github.com/pytorch/pytorch/issues/76176).
        tiles = tiles.movedim((0, 1), (dims, dims + 1)).to(target.dtype)
        target.movedim(0, dims).index_put_(tuple(positions), tiles)

    def add_to_keys(self, target: Tensor, tiles: Tensor) -> None:
        """Add [B, G, T, K, D] at the keys' positions in [B, *spatial, G, D]."""
        tiles = _flat_axes(tiles, [axis.keys for axis in self.axes])
        for a, axis in reversed(list(enumerate(self.axes))):
            tiles = _sum_by_index(tiles, 2 + a, axis.keys, target.shape[1 + a])
        target += tiles.movedim(1, -2)

    def add_to_bias(self, target: Tensor, tiles: Tensor) -> None:
        """Add [G, T, R, K] at its entries of the bias [N, 2 * kernel_size - 1, ...]."""
        tiles = self.by_head(tiles[None], target.shape[0])[0]
        sizes = [axis.attends.shape[column] for column in range(3) for axis in self.axes]
        tiles = tiles.reshape(tiles.shape[0], *sizes)
        dims = len(self.axes)
        order = [1 + column * dims + a for a in range(dims) for column in range(3)]
        tiles = tiles.permute(0, *order)
        tiles = tiles.reshape(tiles.shape[0], *(axis.attends.numel() for axis in self.axes))
        for a, axis in reversed(list(enumerate(self.axes))):
            tiles = _sum_by_index(tiles, 1 + a, axis.bias_index, target.shape[1 + a])
        target += tiles


def tiles_of(
    spatial: tuple[int, ...], window: Neighborhood, device: torch.device
) -> list[AxisTiles]:
    """The tiles of each axis of a map."""
    settings = zip(
        spatial, window.kernel_size, window.stride, window.dilation, window.is_causal, strict=True
    )
    return [_axis_tiles(*axis, window.dims, device) for axis in settings]


@lru_cache(maxsize=512)
def _axis_tiles(
    length: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
    dims: int,
    device: torch.device,
) -> AxisTiles:
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
    fields = queries, first + slot <= last, keys, attends, index, start - start[:, :1]
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


def _flat_index(index: list[Tensor], sizes: list[int]) -> Tensor:
    """[T_a, Q_a, X_a] of each axis to [T, Q, X] into the product of the axes, of these sizes."""
    dims = len(index)
    flat = torch.zeros((), dtype=torch.long, device=index[0].device)
    for a, (places, size) in enumerate(zip(index, sizes, strict=True)):
        flat = flat * size + places.view(_interleaved(places, a, dims))
    return flat.reshape([prod(flat.shape[c * dims : (c + 1) * dims]) for c in range(3)])


def _gather(tensor: Tensor, positions: list[Tensor]) -> Tensor:
    """[B, *spatial, N, D] at positions [T_a, X_a] of each axis: [B, N, T, X, D]."""
    index = [
        position.view(_interleaved(position, a, len(positions)))
        for a, position in enumerate(positions)
    ]
    picked = tensor.movedim(-2, 1)[(slice(None),) * 2 + tuple(index)]
    tiles, slots = (prod(p.shape[column] for p in positions) for column in (0, 1))
    return picked.reshape(*picked.shape[:2], tiles, slots, tensor.shape[-1])


def _flat_axes(tiles: Tensor, positions: list[Tensor]) -> Tensor:
    """[B, N, T, X, D] to [B, N, T_0 * X_0, T_1 * X_1, ..., D]."""
    dims = len(positions)
    sizes = [position.shape[column] for column in (0, 1) for position in positions]
    tiles = tiles.reshape(*tiles.shape[:2], *sizes, tiles.shape[-1])
    order = [2 + column * dims + a for a in range(dims) for column in (0, 1)]
    tiles = tiles.permute(0, 1, *order, -1)
    return tiles.reshape(*tiles.shape[:2], *(p.numel() for p in positions), tiles.shape[-1])


def _sum_by_index(source: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """Sums of the slices of `source` that share an index, in a fixed order on every device."""
    target = source.new_zeros(*source.shape[:dim], size, *source.shape[dim + 1 :])
    if not source.is_cuda:
        return target.index_add_(dim, index.flatten(), source)
    # Sorts the index; index_add_ would use atomics.
    rows, source = target.transpose(0, dim), source.transpose(0, dim)
    return rows.index_put_((index.flatten(),), source, accumulate=True).transpose(0, dim)
