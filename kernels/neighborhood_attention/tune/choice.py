"""The choice of a pass's tiles by measurements, those of earlier runs included."""

import json
from collections.abc import Callable, Sequence
from math import inf
from typing import Protocol

import torch

from neighborhood_attention.backends.triton.tile import Tiles
from neighborhood_attention.backends.triton.tile_table import Entry, as_record
from neighborhood_attention.tune.passes import Timing, Work
from neighborhood_attention.tune.records import Record, Records
from neighborhood_attention.tune.search import Route, fastest, is_clearly_faster

LONG = 100  # milliseconds of the last comparison


class NoTiles(RuntimeError):
    """All tiles of a pass fail."""


class Bench(Protocol):
    """What times a pass, and checks it: `Pass`."""

    def time(self, tiles: Tiles, milliseconds: int = ...) -> Timing:
        """In microseconds."""

    def check(self, tiles: Tiles) -> float:
        """The relative error; raises if it is too large."""


class Chooser:
    """Chooses the tiles of one pass.

    Args:
        work: The pass.
        bench: What times it.
        records: Holds the measurements, and gets the new ones.
        wait: Called before a measurement with one of a route's trials, whose kernels the
            measurement needs; raises TimeoutError where there is no time left, and what the
            compiler raised.
        tell: Called for each trial, with what it is of.
    """

    def __init__(
        self,
        work: Work,
        bench: Bench,
        records: Records,
        wait: Callable[[Tiles], None],
        tell: Callable[[str], None],
    ) -> None:
        self._work, self._bench, self._records = work, bench, records
        self._wait, self._tell = wait, tell

    def choose(self, routes: Sequence[Route]) -> Tiles:
        """The fastest tiles, but the old ones if those are not clearly slower.

        Raises:
            NoTiles: All fail.
        """

        def time(tiles: Tiles, trial: Tiles, limit: float) -> float:
            self._tell(str(self._work))
            return self._time(tiles, trial, limit)

        old = routes[0].start
        new, new_time = fastest(routes, time)
        old_time = self._time(old, old, 0.0)
        if new_time == inf:
            raise NoTiles(f"{self._work}: all tiles fail: see the records")
        times: Record
        if new == old:
            times = {"old_us": old_time, "new_us": old_time}
        elif old_time == inf:  # its results were wrong
            times = {"old_us": None, "new_us": new_time}
        else:
            before, after = (self._bench.time(tiles, LONG) for tiles in (old, new))
            times = {"old_us": before.median, "new_us": after.median}
            if not is_clearly_faster(after, before):
                new, times["new_us"] = old, before.median
        records = {"old": self._record(old), "new": self._record(new)}
        kernels = {"kernels": self._work.kernels}
        self._records.choices.append(self._work.record | kernels | records | times)
        return new

    def entry(self, tiles: Tiles, by_rule: Tiles, routes: Sequence[Route]) -> Entry:
        """What a table needs to say of these tiles: those in use, and which better way is not.

        A way that none of the routes began with cannot run here; others of the key may run it.
        """
        lost = [
            way[0]
            for way in self._work.ways
            if getattr(tiles, way[0]) is None
            and any(getattr(route.start, way[0]) is not None for route in routes)
        ]
        return {name: getattr(tiles, name) for name in self._in_use(tiles)} | {
            name: None for name in lost if getattr(by_rule, name) is not None
        }

    def _in_use(self, tiles: Tiles) -> tuple[str, ...]:
        return next(way for way in self._work.ways if getattr(tiles, way[0]) is not None)

    def _record(self, tiles: Tiles) -> Record:
        return {name: as_record(getattr(tiles, name)) for name in self._in_use(tiles)}

    def _time(self, tiles: Tiles, trial: Tiles, limit: float) -> float:
        """Microseconds; infinite for a failure. Below `limit`, the results have been checked."""
        identity = self._work.record | {"tiles": self._record(tiles)}
        record = self._records.find(identity)
        if record is None or (record.get("us", inf) < limit and "error" not in record):
            record = self._records.add(identity | self._measure(tiles, trial, limit))
            if "failure" in record and torch.cuda.is_initialized():
                torch.cuda.synchronize()  # raises if the GPU is lost to this process
        us: float = record.get("us", inf)
        return us

    def _measure(self, tiles: Tiles, trial: Tiles, limit: float) -> Record:
        try:
            self._wait(trial)
            timing = self._bench.time(tiles)
            error = {"error": self._bench.check(tiles)} if timing.median < limit else {}
        except TimeoutError:
            raise
        except Exception as failure:  # of the compiler, of the launch, or wrong results
            return {"failure": f"{type(failure).__name__}: {str(failure)[:200]}"}
        return {"us": timing.median, "low": timing.low, "high": timing.high} | error


def is_of(choice: Record, work: Work) -> bool:
    """Whether a choice was made among the tiles of all these kernels."""
    same = all(json.dumps(choice[name]) == json.dumps(value) for name, value in work.record.items())
    return same and set(work.kernels) <= set(choice["kernels"])
