"""How long calls take."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise
from time import perf_counter

import numpy as np
import torch


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    function: Callable[[], object], device: torch.device, calls: int, wait: bool = False
) -> list[float]:
    """Seconds of each of `calls` successive calls, after one call that is not timed.

    On a GPU: the time between the ends of successive calls, by events in its stream. The host
    runs ahead as in real use, and where it cannot keep up, its time counts.

    Args:
        function: What to call.
        device: Where it works.
        calls: How often.
        wait: Start each call when the one before it has ended: what one who waits for it sees.
    """
    function()
    if wait or device.type != "cuda":
        synchronize(device)
        times = [perf_counter()]
        for _ in range(calls):
            function()
            synchronize(device)
            times.append(perf_counter())
        return [end - start for start, end in pairwise(times)]

    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        events[-1].synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]


@dataclass(frozen=True)
class Timing:
    """Seconds of single calls, in rounds that other measurements may have come between."""

    rounds: list[list[float]]

    def quantile(self, q: float) -> float:
        """Seconds that the fraction `q` of all calls stayed below."""
        return float(np.quantile([*chain(*self.rounds)], q))

    @property
    def medians(self) -> list[float]:
        """The median call of each round."""
        return [float(np.median(calls)) for calls in self.rounds]

    @property
    def spread(self) -> float:
        """Distance of the slowest round from the fastest, as a fraction of the median round."""
        medians = self.medians
        return float((max(medians) - min(medians)) / np.median(medians))
