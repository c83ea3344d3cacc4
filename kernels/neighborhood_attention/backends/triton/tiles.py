"""Which tiles the fused kernels use, and how the tiles of an axis lie against its borders."""

from dataclasses import dataclass
from functools import lru_cache
from math import ceil, prod

from torch import Tensor

from neighborhood_attention.geometry import (
    Neighborhood,
    attending_end,
    attending_start,
    group_length,
    window_end,
    window_start,
)


@dataclass(frozen=True)
class Tile:
    """A program's tile of tokens, and the strips of the tokens that they meet: (rows, columns)."""

    tile: tuple[int, int]
    strip: tuple[int, int]
    num_warps: int
    num_stages: int = 2
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, int | None]:
        """Triton's options for a launch."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.max_registers,
        }


@dataclass(frozen=True)
class Tiles:
    """The tiles of the four fused kernels."""

    forward: Tile
    query_gradient: Tile
    key_gradient: Tile
    bias_gradient: Tile


# The fastest of those measured on an H100 with head dimension 32 and 16 bits: benchmarks/NOTES.md.
# Small tiles with few warps waste few scores.
WINDOWED = Tiles(
    forward=Tile((4, 8), (2, 16), num_warps=1, max_registers=128),
    query_gradient=Tile((4, 8), (1, 16), num_warps=1, num_stages=3, max_registers=128),
    key_gradient=Tile((2, 8), (2, 16), num_warps=1, max_registers=128),
    bias_gradient=Tile((2, 8), (4, 16), num_warps=1),
)
# Where a whole dilation group fits into one tile.
WHOLE_GROUP = Tiles(
    forward=Tile((8, 8), (4, 8), num_warps=4),
    query_gradient=Tile((8, 8), (4, 8), num_warps=4),
    key_gradient=Tile((8, 8), (4, 8), num_warps=4, num_stages=1),
    bias_gradient=Tile((8, 8), (4, 8), num_warps=4, max_registers=128),
)
# Larger heads and fp32: untuned, but without spills and within the shared memory of small GPUs.
LARGE_HEADS = Tiles(*[Tile((4, 8), (2, 16), num_warps=4, num_stages=1)] * 4)


def choose_tiles(query: Tensor, window: Neighborhood) -> Tiles:
    """The tiles for a problem, by the size of its heads and of its dilation groups."""
    if query.shape[-1] * query.element_size() > 64:
        return LARGE_HEADS
    if all(size <= 8 * step for size, step in zip(query.shape[1:3], window.dilation, strict=True)):
        return WHOLE_GROUP
    return WINDOWED


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
    front = max(
        next((t for t, r in enumerate(tiles) if r == interior), len(tiles)) for tiles in ranges
    )
    back = max(
        next((t for t, r in enumerate(tiles[::-1]) if r == interior), len(tiles))
        for tiles in ranges
    )
    between = [r for tiles in ranges for r in tiles[front : len(tiles) - back]]
    if front + back >= len(ranges[-1]) or any(r != interior for r in between):
        front, back = len(ranges[0]) - 1, 0  # a type for each tile
    extent = max(
        max(end for _, end in r) - min(start for start, _ in r) for tiles in ranges for r in tiles
    )
    return TileAxis(len(ranges[0]), front, back, len(lengths), extent)


class TilePlan:
    """The tiles of a map, of queries or of keys, for one kernel."""

    def __init__(
        self, tile: Tile, window: Neighborhood, spatial: tuple[int, ...], of_keys: bool
    ) -> None:
        self.tile = tile
        self.of_keys = of_keys
        self.rows, self.columns = (
            tile_axis(
                spatial[a], window.kernel_size[a], window.stride[a], window.dilation[a],
                window.is_causal[a], tile.tile[a], of_keys,
            )
            for a in (0, 1)
        )  # fmt: skip
        self.column_strips = ceil(self.columns.extent / tile.strip[1])
        self.strips = ceil(self.rows.extent / tile.strip[0]) * self.column_strips
        # For each head of each image.
        self.programs = prod(window.dilation) * self.rows.tiles * self.columns.tiles
        self.tile_tokens = tile.tile[0] * tile.tile[1]
        self.strip_tokens = tile.strip[0] * tile.strip[1]

    def arguments(self) -> dict[str, int]:
        """The plan, as the kernels take it."""
        return {
            "row_tiles": self.rows.tiles, "column_tiles": self.columns.tiles,
            "front_h": self.rows.front, "back_h": self.rows.back,
            "front_w": self.columns.front, "back_w": self.columns.back,
            "TILE_H": self.tile.tile[0], "TILE_W": self.tile.tile[1],
            "STRIP_H": self.tile.strip[0], "STRIP_W": self.tile.strip[1],
            "COLUMN_STRIPS": self.column_strips, "STRIPS": self.strips,
        }  # fmt: skip


@lru_cache(maxsize=1024)
def plan_tiles(
    tile: Tile, window: Neighborhood, spatial: tuple[int, ...], of_keys: bool
) -> TilePlan:
    """The plan, made once for each problem."""
    return TilePlan(tile, window, spatial, of_keys)


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
