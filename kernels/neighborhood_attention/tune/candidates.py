"""Tiles that are worth a measurement: those of the list that waste few scores on a problem."""

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import TYPE_CHECKING

from neighborhood_attention.backends.triton.fused_query_bias_gradient import MAX_STRIPS
from neighborhood_attention.backends.triton.ring import takes
from neighborhood_attention.backends.triton.tile import Tile
from neighborhood_attention.backends.triton.tiles import (
    NARROW,
    WHOLE_GROUP,
    WINDOWED,
    count_scores,
    default_tiles,
    plan_tiles,
    tiles_by_rule,
)
from neighborhood_attention.geometry import Neighborhood

if TYPE_CHECKING:
    from neighborhood_attention.backends.triton.launch import Problem

# By the number of axes.
_TILES = {
    1: [(1, 1, 16), (1, 1, 32), (1, 1, 64)],
    2: [(1, 4, 4), (1, 2, 8), (1, 4, 8), (1, 8, 4), (1, 2, 16), (1, 8, 8), (1, 4, 16)],
    3: [(1, 4, 4), (2, 2, 4), (2, 4, 4), (2, 4, 8), (4, 4, 4)],
}
_STRIPS = {
    1: [(1, 1, 16), (1, 1, 32), (1, 1, 64), (1, 1, 128)],
    2: [
        (1, 1, 16),
        (1, 2, 16),
        (1, 4, 16),
        (1, 8, 16),
        (1, 4, 8),
        (1, 8, 4),
        (1, 8, 8),
        (1, 16, 2),
    ],
    3: [(1, 2, 8), (1, 4, 8), (2, 4, 8), (1, 2, 16), (1, 4, 4), (2, 4, 4)],
}
# With the keys in a ring: tile, strip and warps, and the tiles that a program walks down.
_RINGS = [
    ((1, 2, 8), (1, 2, 16), 1),
    ((1, 2, 16), (1, 1, 16), 2),
    ((1, 1, 16), (1, 1, 16), 1),
    ((1, 4, 8), (1, 2, 16), 2),
]
_WALKS = 4, 7, 14
# Stages, and registers of a thread.
_OPTIONS: dict[str, list[tuple[int, int | None]]] = {
    "forward": [(2, 128), (3, 96)],
    "query_gradient": [(3, 128), (2, 168)],
    "key_gradient": [(2, 168), (2, 128)],
    "bias_gradient": [(2, None), (2, 128)],
    "query_bias_gradient": [(2, 168), (2, 128)],
    "whole_group": [(2, None), (1, None), (2, 168)],
    "ring_forward": [(1, None), (1, 128)],
}
# Of heads of more than 64 bytes, which would spill.
_UNCAPPED: list[tuple[int, int | None]] = [(2, None), (3, None), (1, None)]
# Programs of a multiprocessor, where they always walk over images.
_PROGRAMS = {"query_bias_gradient": (6, 8), "whole_group": (2, 3)}
# Their tiles are tried wherever the rule has one of them.
_PROVEN = WINDOWED, NARROW, WHOLE_GROUP
_OF_KEYS = "key_gradient", "whole_group"
# Of scores computed, over those of the tile that computes the fewest.
MAX_WASTE = 1.4


def candidates(
    kernel: str, problem: "Problem", window: Neighborhood, multiprocessors: int
) -> list[Tile]:
    """For one kernel, named as in `Tiles`; none where it cannot run the problem."""
    listed = [*_listed(kernel, problem, window, multiprocessors)]
    by_rule = tiles_by_rule(problem, window)
    proven = (*(_PROVEN if by_rule in _PROVEN else (by_rule,)), default_tiles(problem, window))
    known = [tile for tiles in proven if (tile := getattr(tiles, kernel)) is not None]
    wastes = {
        tile: scores_of_a_token(kernel, tile, window, problem.spatial) for tile in listed + known
    }
    limit = MAX_WASTE * min(wastes.values())
    return [
        tile
        for tile, waste in wastes.items()
        if waste <= limit and can_run(kernel, tile, problem, window)
    ]


def can_run(kernel: str, tile: Tile, problem: "Problem", window: Neighborhood) -> bool:
    """Whether the kernel takes these tiles for this problem."""
    plan = plan_tiles(tile, window, tuple(problem.spatial), kernel in _OF_KEYS)
    if kernel == "ring_forward":
        return takes(problem, window, plan)
    if kernel == "whole_group":
        return plan.holds_groups and tile.tile == tile.strip
    return kernel != "query_bias_gradient" or prod(plan.strips) <= MAX_STRIPS


def scores_of_a_token(
    kernel: str, tile: Tile, window: Neighborhood, spatial: tuple[int, ...]
) -> float:
    """Scores computed for each token of the map; the window has fewer."""
    scores = count_scores(tile.tile, tile.strip, window, tuple(spatial), kernel in _OF_KEYS)
    return prod(window.dilation) * scores / prod(spatial)


def _listed(
    kernel: str, problem: "Problem", window: Neighborhood, multiprocessors: int
) -> Iterator[Tile]:
    if kernel == "ring_forward":
        for shape, options, walk in product(_RINGS, _OPTIONS[kernel], _WALKS):
            yield Tile(*shape, *options, walk=walk)
        return
    head_bytes = problem.query.dtype.itemsize * problem.head_arguments["BLOCK_D"]
    most = 1024 if head_bytes <= 128 else 512  # scores of a warp, for its registers
    settings = _OPTIONS[kernel] if head_bytes <= 64 else _UNCAPPED
    waves = _PROGRAMS.get(kernel)
    counts = [n * multiprocessors for n in waves] if waves else [Tile.programs]
    shapes = [
        (tile, strip, warps)
        for tile, strip in product(_TILES[window.dims], _STRIPS[window.dims])
        for warps in (1, 2, 4, 8)
        if most // 2 <= prod(tile) * prod(strip) // warps <= most
    ]
    for (stages, registers), programs in product(settings, counts):
        for shape in shapes:
            yield Tile(*shape, stages, registers, programs)
    if kernel == "forward":  # it walks over images where a tile is a whole dilation group
        whole = [s for s in shapes if can_run("whole_group", Tile(*s), problem, window)]
        for shape, stages, count in product(whole, (1, 2, 3), (2, 4, 8)):
            yield Tile(*shape, stages, None, count * multiprocessors)
