"""Cases measured in turns, so that a drifting clock shows as spread instead of as a difference."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import nn

from nat_models.benchmark import steps
from nat_models.benchmark.case import GRAPHS, Case
from nat_models.benchmark.components import milliseconds_by_component
from nat_models.benchmark.timing import Timing, synchronize, time_calls

MIB = 2**20


@dataclass(frozen=True)
class Sampling:
    """How often a case is timed.

    Attributes:
        warmup: Calls before the first timed one, and again to find how many make a turn.
        rounds: Turns of each case.
        round_seconds: Length of a turn.
        seed: Of weights and images.
    """

    warmup: int = 5
    rounds: int = 5
    round_seconds: float = 1.0
    seed: int = 0


class Candidate:
    """A case that is prepared once and timed in rounds.

    Args:
        case: What to measure.
        device: Where.
        sampling: How often.
        create_model: From case and device to the model.
    """

    def __init__(
        self,
        case: Case,
        device: torch.device,
        sampling: Sampling,
        create_model: Callable[[Case, torch.device], nn.Module] = steps.create_model,
    ):
        self.case, self.device, self.sampling = case, device, sampling
        self.create_model = create_model
        self.rounds: list[list[float]] = []
        self.latencies: list[list[float]] = []
        self.step: steps.Step | None = None  # None: not prepared, or out of memory
        self.record = case.as_record() | {"status": "ok"}

    def prepare(self) -> None:
        """Build the model, compile it, warm up; note sizes, first call and peak memory."""
        with self._noting_out_of_memory():
            torch.manual_seed(self.sampling.seed)
            before = self._memory_held()
            model = self.create_model(self.case, self.device)
            images = steps.create_images(self.case, self.device)
            self.record["parameters"] = sum(p.numel() for p in model.parameters())
            self.record["flops_per_image"] = steps.count_flops(self.case)
            self.step = steps.create_step(model, images, self.case)

            start = perf_counter()
            self.call_first(self.step)
            self.record["first_call_seconds"] = perf_counter() - start
            if self.device.type == "cuda":  # the first call's tuning is not the model's memory
                torch.cuda.reset_peak_memory_stats(self.device)
            for _ in range(self.sampling.warmup):
                self.step()
            synchronize(self.device)
            if self.device.type == "cuda":
                self.record["peak_memory_mib"] = (self._peak_memory() - before) / MIB

    def _memory_held(self) -> int:
        """Bytes of tensors; of CUDA graphs, whose replays allocate nothing, all that is kept."""
        if self.device.type != "cuda":
            return 0
        if not self._replays:
            return torch.cuda.memory_allocated(self.device)
        release_memory()
        return torch.cuda.memory_reserved(self.device)

    def _peak_memory(self) -> int:
        most = torch.cuda.max_memory_allocated(self.device)
        return self._memory_held() if self._replays else most

    @property
    def _replays(self) -> bool:
        return self.case.execution in GRAPHS

    def call_first(self, step: steps.Step) -> None:
        """The call in which all is compiled."""
        step()
        synchronize(self.device)

    def time_round(self) -> None:
        """Time the calls of one turn: in a row, then some of them one by one."""
        if self.step is not None:
            with self._noting_out_of_memory():
                if not self.rounds:  # while it was prepared, others may have been too
                    warm = Timing([time_calls(self.step, self.device, self.sampling.warmup)])
                    self.calls = max(3, math.ceil(self.sampling.round_seconds / warm.quantile(0.5)))
                self.rounds.append(time_calls(self.step, self.device, self.calls))
                few = max(3, self.calls // 4)
                self.latencies.append(time_calls(self.step, self.device, few, wait=True))

    def profile(self) -> None:
        """Note where a step's time on the GPU goes."""
        if self.step is not None and self.device.type == "cuda":
            with self._noting_out_of_memory():
                components = milliseconds_by_component(self.step, calls=3)
                self.record["component_ms"] = components
                self.record["attention_share"] = components["attention"] / sum(components.values())

    def result(self) -> dict[str, Any]:
        """Everything noted, and the numbers of the rounds."""
        if self.step is None:
            return self.record
        timing, latency = Timing(self.rounds), Timing(self.latencies)
        return self.record | {
            "images_per_second": self.case.batch_size / timing.quantile(0.5),
            "latency_ms": {"p50": 1e3 * latency.quantile(0.5), "p95": 1e3 * latency.quantile(0.95)},
            "spread": timing.spread,
            "round_medians_ms": [1e3 * seconds for seconds in timing.medians],
            "calls_per_round": self.calls,
        }

    @contextmanager
    def _noting_out_of_memory(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.record["status"] = "out of memory"
            self.step = None
        if self.step is None:
            release_memory()


def measure_in_turns(
    candidates: Sequence[Candidate], rounds: int, advance: Callable[[], object]
) -> list[dict[str, Any]]:
    """Measure cases in this process.

    Args:
        candidates: The cases, all on one device.
        rounds: Turns of each.
        advance: Called after each of the `len(candidates) * (1 + rounds)` pieces of work.

    Returns:
        One JSON-ready record a case; of one that ran out of memory, without timings.
    """
    torch.compiler.reset()
    # Models of a class share its code; beyond the limit they would run eagerly.
    torch._dynamo.config.recompile_limit = 8 * len(candidates)
    release_memory()
    allocate_workspaces(candidates[0].device)
    turns = [Candidate.prepare] + [Candidate.time_round] * rounds
    for turn in turns:
        for candidate in candidates:
            turn(candidate)
            advance()
    if len(candidates) > 1:  # compiled models share a pool of memory for their graphs
        for candidate in candidates:
            if candidate.case.execution == "cuda_graphs":
                candidate.record.pop("peak_memory_mib", None)
    return [candidate.result() for candidate in candidates]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device, or the host, had too little memory; libraries have their own errors."""
    texts = "can't allocate memory", "out of memory", "ALLOC_FAILED"
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def release_memory() -> None:
    """Return what no tensor uses, so that one model's remains do not crowd the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def allocate_workspaces(device: torch.device) -> None:
    """Have the libraries allocate what they keep for good, or the first model would pay for it."""
    matrix = torch.ones(8, 8, device=device, requires_grad=True)
    (matrix @ matrix).sum().backward()
