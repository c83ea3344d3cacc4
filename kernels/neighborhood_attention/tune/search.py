"""The search for the fastest tiles of a pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any, NamedTuple

from neighborhood_attention.backends.triton.launch import Problem
from neighborhood_attention.backends.triton.tile import Tile, Tiles
from neighborhood_attention.backends.triton.tile_table import OPTIONAL
from neighborhood_attention.tune.candidates import can_run, candidates
from neighborhood_attention.tune.passes import Timing, Work

MIN_GAIN = 0.02


class Route(NamedTuple):
    """Tiles to start from, and the tiles to try for some of the kernels, in order."""

    start: Tiles
    options: Mapping[str, Sequence[Tile]]

    @property
    def trials(self) -> Iterator[Tiles]:
        """The start, and each option in place of its kernel's tile alone."""
        yield self.start
        for kernel, tiles in self.options.items():
            for tile in tiles:
                yield replace(self.start, **{kernel: tile})


def find_routes(work: Work, problem: Problem, present: Tiles, multiprocessors: int) -> list[Route]:
    """From the present tiles, and for the best way that can run, where it is another.

    Of a forward for all ways that can run: with few candidates each, they are close to each other.

    Args:
        work: What to tune.
        problem: That of its shape.
        present: The tiles in use.
        multiprocessors: Of the GPU.
    """
    window = work.shape.window
    options = {
        kernel: candidates(kernel, problem, window, multiprocessors)
        for kernel in dict.fromkeys(kernel for way in work.ways for kernel in way)
    }

    def runs(kernel: str) -> bool:
        tile = getattr(present, kernel)
        return tile is not None and can_run(kernel, tile, problem, window)

    present_way = next(way for way in work.ways if runs(way[0]))
    best_way = next(way for way in work.ways if options[way[0]])
    ways = [present_way, best_way]
    if work.name == "forward":
        ways += [way for way in work.ways if options[way[0]]]
    routes = []
    for way in dict.fromkeys(ways):
        first = way[0]
        unused: dict[str, Any] = {kernel: None for kernel in OPTIONAL if kernel != first}
        start = replace(present, **unused)
        if way != present_way:
            if first not in work.kernels:
                continue
            if not runs(first):
                start = replace(start, **{first: options[first][0]})
        chosen = {kernel: options[kernel] for kernel in way if kernel in work.kernels}
        routes.append(Route(start, chosen))
    return routes


def fastest(
    routes: Iterable[Route], time: Callable[[Tiles, Tiles, float], float]
) -> tuple[Tiles, float]:
    """The fastest tiles and their time: a kernel after the other, the best of each kept.

    A kernel of several routes is settled by the first: its neighbors do not change its time.

    Args:
        routes: Where to start, and what to try.
        time: The time of a pass, infinite for wrong results. It gets the tiles, the one of the
            route's `trials` with the new kernel, and the time below which results must be right.
    """
    found = []
    settled: dict[str, Tile] = {}
    for route in routes:
        best, tiles = time(route.start, route.start, inf), route.start
        for kernel, options in route.options.items():
            for tile in [settled[kernel]] if kernel in settled else options:
                trial = replace(tiles, **{kernel: tile})
                needed = time(trial, replace(route.start, **{kernel: tile}), best)
                if needed < best:
                    best, tiles = needed, trial
            if best < inf:
                settled[kernel] = getattr(tiles, kernel)
        found.append((tiles, best))
    return min(found, key=lambda pair: pair[1])


def is_clearly_faster(new: Timing, old: Timing) -> bool:
    """By more than 2 %, and by more than half of what either spreads."""
    spread = max(timing.high - timing.low for timing in (new, old)) / 2
    return old.median - new.median > max(MIN_GAIN * old.median, spread)
