"""Which tiles the fused kernels use, and how the tiles of an axis lie against its borders."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from neighborhood_attention.backends.triton.tile import Tile, Tiles
from neighborhood_attention.backends.triton.tile_table import Key, table
from neighborhood_attention.geometry import (
    Neighborhood,
    attending_end,
    attending_start,
    group_length,
    window_end,
    window_start,
)

if TYPE_CHECKING:
    from neighborhood_attention.backends.triton.launch import Problem


_log = logging.getLogger("neighborhood_attention")

# A tile takes another shape where that computes at most this share of its scores.
MAX_SHARE = 0.95

# The fastest of those measured on an H100 (the rings: an H200) with head dimension 32 and 16 bits:
# see benchmarks/NOTES.md. Their shapes, of as many tokens, are fitted to a map and a window.
# Small tiles with few warps waste few scores.
WINDOWED = Tiles(
    forward=Tile((1, 4, 8), (1, 2, 16), num_warps=1, max_registers=128),
    query_gradient=Tile((1, 4, 8), (1, 1, 16), num_warps=1, num_stages=3, max_registers=128),
    key_gradient=Tile((1, 4, 8), (1, 2, 16), num_warps=1, max_registers=168),
    bias_gradient=Tile((1, 2, 8), (1, 4, 16), num_warps=1),
    query_bias_gradient=Tile((1, 2, 8), (1, 4, 16), 2, max_registers=168, programs=792),
    ring_forward=Tile((1, 2, 8), (1, 2, 16), 1, 1, walk=7),
)
# Where two rows of a dilation group fit into one tile.
NARROW = Tiles(
    forward=Tile((1, 2, 16), (1, 1, 16), num_warps=1, num_stages=3, max_registers=96),
    query_gradient=Tile((1, 4, 8), (1, 1, 16), num_warps=1, num_stages=3, max_registers=128),
    key_gradient=Tile((1, 2, 16), (1, 2, 16), num_warps=1, max_registers=168),
    bias_gradient=Tile((1, 2, 8), (1, 4, 16), num_warps=1),
    query_bias_gradient=Tile((1, 2, 8), (1, 4, 16), 2, max_registers=168, programs=792),
    ring_forward=Tile((1, 2, 16), (1, 1, 16), 2, 1, max_registers=128, programs=1024, walk=7),
)
# Where a whole dilation group fits into one tile.
WHOLE_GROUP = Tiles(
    forward=Tile((1, 8, 8), (1, 8, 8), num_warps=4, num_stages=3, programs=528),
    query_gradient=Tile((1, 8, 8), (1, 4, 8), num_warps=4),
    key_gradient=Tile((1, 8, 8), (1, 4, 8), num_warps=4, num_stages=1),
    bias_gradient=Tile((1, 8, 8), (1, 4, 8), num_warps=4, max_registers=128),
    whole_group=Tile((1, 8, 8), (1, 8, 8), num_warps=4, programs=264),
)


def _same(*settings: Any) -> Tiles:
    """One tile for all kernels of a problem."""
    return Tiles(*[Tile(*settings)] * 4)


def _heavy(tile: Any, strip: Any, gradient_warps: int = 1) -> Tiles:
    """A warp for 16 queries; the bias's gradient, with sums in registers, would spill."""
    forward, bias_gradient = Tile(tile, strip, 1), Tile(tile, strip, 2, 1)
    return replace(_same(tile, strip, gradient_warps), forward=forward, bias_gradient=bias_gradient)


def _large(tile: Any, short: Any, long: Any) -> Tiles:
    """Of fp32: two warps share 16 queries; the gradients' longer strips need too much memory.

    The bias's gradient would spill all there is: four warps, without a second stage.
    """
    forward, bias_gradient = Tile(tile, long, 2), Tile(tile, long, 4, 1)
    return replace(_same(tile, short, 2), forward=forward, bias_gradient=bias_gradient)


# The others, by the number of axes: measured on an H200 with head dimensions of 32 to 128 and all
# precisions (benchmarks/NOTES.md), but for fp32's bias gradient. A warp's registers hold 32 queries
# with light heads, and 16 with heavy ones; of larger heads of 16 bits, four warps take 64 queries
# from shared memory.
LIGHT = {
    1: _same((1, 1, 32), (1, 1, 32), 1),
    2: _same((1, 4, 8), (1, 2, 16), 1),
    3: _same((2, 4, 4), (1, 4, 8), 1),
}
HEAVY = {
    1: _heavy((1, 1, 16), (1, 1, 32)),
    2: _heavy((1, 2, 8), (1, 2, 16)),
    3: _heavy((1, 4, 4), (1, 4, 8)),
}
# Four parts of 64 channels: the gradients of one warp would spill.
HEAVIEST = {
    1: _heavy((1, 1, 16), (1, 1, 32), 2),
    2: _heavy((1, 2, 8), (1, 2, 16), 2),
    3: _heavy((1, 4, 4), (1, 4, 8), 2),
}
LARGE_HALF = {
    1: _same((1, 1, 64), (1, 1, 32), 4),
    2: _same((1, 8, 8), (1, 2, 16), 4),
    3: _same((4, 4, 4), (1, 4, 8), 4),
}
LARGE_SINGLE = {
    1: _large((1, 1, 16), (1, 1, 16), (1, 1, 32)),
    2: _large((1, 2, 8), (1, 1, 16), (1, 2, 16)),
    3: _large((1, 4, 4), (1, 4, 4), (1, 4, 8)),
}
HUGE = {
    1: _same((1, 1, 16), (1, 1, 16), 4, 1),
    2: _same((1, 4, 4), (1, 2, 8), 4, 1),
    3: _same((1, 4, 4), (1, 2, 8), 4, 1),
}


def choose_tiles(problem: "Problem", window: Neighborhood) -> Tiles:
    """The tiles for a problem: those of the table, else the default ones."""
    key, tiles = Key.of(problem, window), default_tiles(problem, window)
    entry = table().get(key)
    if entry is not None:
        settings: dict[str, Any] = dict(entry)
        return replace(tiles, **settings)
    if key.capability is not None:
        _warn_untuned(key.capability)
    return tiles


@cache
def _warn_untuned(capability: str) -> None:
    """Once, unless other problems are tuned for this GPU."""
    if all(key.capability != capability for key in table()):
        _log.warning(
            "the kernels are not tuned for GPUs of compute capability %s and may be slow there: "
            "see python -m neighborhood_attention.tune --help",
            capability,
        )


def default_tiles(problem: "Problem", window: Neighborhood) -> Tiles:
    """By the rule, in shapes that fit the map and the window."""
    return fitted(tiles_by_rule(problem, window), window, tuple(problem.spatial))


def tiles_by_rule(problem: "Problem", window: Neighborhood) -> Tiles:
    """By the axes and the size of the heads and of the dilation groups."""
    heads = problem.head_arguments
    head_dim = max(heads["BLOCK_D"], heads["BLOCK_V"])
    groups = [ceil(n / d) for n, d in zip(problem.spatial, window.dilation, strict=True)]
    if window.dims == 2 and head_dim <= 32:
        if max(groups) <= 8:
            return WHOLE_GROUP
        if problem.query.dtype.itemsize == 2:
            return NARROW if groups[1] <= 16 else WINDOWED
    if head_dim > 128:
        return HUGE[window.dims]
    is_half = problem.query.dtype.itemsize == 2
    if head_dim > 64:
        return (LARGE_HALF if is_half else LARGE_SINGLE)[window.dims]
    # Three products take each factor in two parts.
    parts = 1 if is_half else 4 if problem.precision == "tf32x3" else 2
    weight = head_dim * parts
    return (LIGHT if weight <= 64 else HEAVY if weight <= 128 else HEAVIEST)[window.dims]


@lru_cache(maxsize=1024)
def fitted(tiles: Tiles, window: Neighborhood, spatial: tuple[int, ...]) -> Tiles:
    """With tiles and strips of as many tokens but another shape, where those compute less."""
    if window.dims == 1:
        return tiles
    changed = {}
    for kernel in ("forward", "query_gradient", "key_gradient", "bias_gradient"):
        tile = getattr(tiles, kernel)
        best = _fitted(tile, window, spatial, of_keys=kernel == "key_gradient")
        if best != tile:
            changed[kernel] = best
    return replace(tiles, **changed) if changed else tiles


def _fitted(tile: Tile, window: Neighborhood, spatial: tuple[int, ...], of_keys: bool) -> Tile:
    # A table grows with the map where a tile is no multiple of the stride.
    uneven = _uneven_axes(tile.tile, window)
    tiles = _shapes(prod(tile.tile), window.dims)
    even_tiles = [shape for shape in tiles if _uneven_axes(shape, window) <= uneven]
    shapes = product(even_tiles, _shapes(prod(tile.strip), window.dims))

    def scores(shape: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
        return count_scores(*shape, window, spatial, of_keys)

    best = min(shapes, key=scores)
    if scores(best) > MAX_SHARE * scores((tile.tile, tile.strip)):
        return tile
    return replace(tile, tile=best[0], strip=best[1])


def _uneven_axes(tile: Sequence[int], window: Neighborhood) -> set[int]:
    """Axes on which neighboring tiles differ, since they are no multiple of the stride."""
    return {axis for axis, n in enumerate(three_axes(window.stride)) if tile[axis] % n}


@cache
def _shapes(tokens: int, dims: int) -> list[tuple[int, int, int]]:
    """Three axes whose sizes are powers of 2, the last axis the longest first."""
    powers = [2**i for i in range(tokens.bit_length())]
    found = [(d, h, tokens // (d * h)) for d in powers for h in powers if d * h <= tokens]
    return sorted(
        (shape for shape in found if all(n == 1 for n in shape[: 3 - dims])),
        key=lambda shape: (-shape[2], -shape[1]),
    )


def count_scores(
    tile: Sequence[int],
    strip: Sequence[int],
    window: Neighborhood,
    spatial: tuple[int, ...],
    of_keys: bool,
) -> int:
    """Scores that the longest dilation group computes, in tiles and strips of these shapes."""
    axes = tile_axes(tile, window, spatial, of_keys)
    return prod(
        axis.tiles * tokens * ceil(axis.extent / keys) * keys
        for axis, tokens, keys in zip(axes, tile, strip, strict=True)
    )


@dataclass(frozen=True)
class TileAxis:
    """How the tiles of one axis lie against its borders.

    Tiles with equal windows, relative to the tile, share one type. The first `front` tiles and the
    last `back` tiles of a dilation group have a type each, those between share one. When the axis
    is not divisible by the dilation, its groups have two lengths, and the types are counted once
    for the long groups and once more for the short ones.
    """

    tiles: int  # of the longest group
    front: int
    back: int
    classes: int  # lengths of groups, 1 or 2
    extent: int  # tokens of the other side that a tile meets, at most

    @property
    def types(self) -> int:
        """Number of types."""
        return self.classes * (self.front + 1 + self.back)


@lru_cache(maxsize=1024)
def tile_axis(
    length: int,
    kernel_size: int,
    stride: int,
    dilation: int,
    is_causal: bool,
    tile: int,
    of_keys: bool,
) -> TileAxis:
    """The tiles of queries, or of keys, of an axis of `length` tokens."""
    lengths = sorted(
        {group_length(group, length, dilation) for group in (0, dilation - 1)}, reverse=True
    )
    ranges = [
        _relative_ranges(size, kernel_size, stride, is_causal, tile, of_keys) for size in lengths
    ]
    interior = ranges[0][len(ranges[0]) // 2]
    # Not the first tile like the interior: single keys at a border may be like it, and others not.
    front = max(_length_to_last_other(tiles[: len(tiles) // 2], interior) for tiles in ranges)
    back = max(_length_to_last_other(tiles[: len(tiles) // 2 : -1], interior) for tiles in ranges)
    between = [r for tiles in ranges for r in tiles[front : len(tiles) - back]]
    if front + back >= len(ranges[-1]) or any(r != interior for r in between):
        front, back = len(ranges[0]) - 1, 0  # a type for each tile
    extent = max(
        max(end for _, end in r) - min(start for start, _ in r) for tiles in ranges for r in tiles
    )
    return TileAxis(len(ranges[0]), front, back, len(lengths), extent)


def _length_to_last_other(values: Sequence[Any], value: Any) -> int:
    """Of the shortest start of a sequence behind which all values are this one."""
    return max((i + 1 for i, other in enumerate(values) if other != value), default=0)


def tile_axes(
    tile: Sequence[int], window: Neighborhood, spatial: Sequence[int], of_keys: bool
) -> list[TileAxis]:
    """The tiles of queries, or of keys, of each of three axes of a map."""
    settings = zip(
        three_axes(spatial), three_axes(window.kernel_size), three_axes(window.stride),
        three_axes(window.dilation), three_axes(window.is_causal, False), tile, strict=True,
    )  # fmt: skip
    return [tile_axis(*values, of_keys) for values in settings]


class TilePlan:
    """The tiles of a map, of queries or of keys, for one kernel.

    Attributes:
        axes: How they lie, an axis.
        strips: Strips that the largest halo takes, an axis.
        positions: Tiles that differ by more than their dilation group.
        programs: Tiles in all, for one head of one image.
    """

    def __init__(
        self, tile: Tile, window: Neighborhood, spatial: tuple[int, ...], of_keys: bool
    ) -> None:
        self.tile = tile
        self.of_keys = of_keys
        self.axes = tile_axes(tile.tile, window, spatial, of_keys)
        self.strips = tuple(
            ceil(axis.extent / strip) for axis, strip in zip(self.axes, tile.strip, strict=True)
        )
        self.positions = prod(axis.classes * axis.tiles for axis in self.axes)
        self.groups = prod(window.dilation)
        self.programs = self.groups * prod(axis.tiles for axis in self.axes)

    @property
    def in_ring(self) -> bool:
        """Whether a program walks over tiles, with the strips that they share in a ring."""
        return self.tile.walk is not None

    @property
    def holds_groups(self) -> bool:
        """Whether each dilation group is one tile, which meets one strip."""
        return self.programs == self.groups and prod(self.strips) == 1

    def shares(self, batch: int, heads: int) -> int:
        """Programs that share the images and dilation groups of a position and head."""
        return max(1, min(batch * self.groups, self.tile.programs // (self.positions * heads)))


@lru_cache(maxsize=1024)
def plan_tiles(
    tile: Tile, window: Neighborhood, spatial: tuple[int, ...], of_keys: bool
) -> TilePlan:
    """The plan, made once for each problem."""
    return TilePlan(tile, window, spatial, of_keys)


def three_axes(values: Sequence[int], filler: int = 1) -> tuple[int, ...]:
    """One entry an axis, filled up in front: a problem of fewer axes is flat in the first."""
    return (filler,) * (3 - len(values)) + tuple(values)


def _relative_ranges(
    length: int, kernel_size: int, stride: int, is_causal: bool, tile: int, of_keys: bool
) -> list[tuple[tuple[int, int], ...]]:
    """For each tile, the range that each of its tokens meets, relative to the first of them."""

    def met(token: int) -> tuple[int, int]:
        if of_keys:
            start = attending_start(token, kernel_size, stride, is_causal)
            return start, attending_end(token, length, kernel_size, stride, is_causal)
        start = window_start(token, length, kernel_size, stride, is_causal)
        return start, window_end(token, start, kernel_size, is_causal)

    met_ranges = [met(token) for token in range(length)]
    return [
        tuple((start - first, end - first) for start, end in met_ranges[first : first + tile])
        for first in range(0, length, tile)
    ]
