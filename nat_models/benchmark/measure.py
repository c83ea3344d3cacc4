"""Models measured in turns, so that a drifting clock shows as spread instead of as a difference."""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

from nat_models.benchmark.settings import Settings
from nat_models.benchmark.steps import create_images, create_model, create_step
from nat_models.benchmark.timing import Timing, synchronize, time_calls
from neighborhood_attention import resolve_backend

MIB = 2**20


class Candidate:
    """One model under one condition: prepared once, timed in rounds."""

    def __init__(self, name: str, kind: str, execution: str, batch_size: int, settings: Settings):
        self.settings = settings
        self.device = torch.device(settings.device)
        self.rounds: list[list[float]] = []
        self.step: Callable[[], object] | None = None  # None: not prepared, or out of memory
        self.record: dict[str, Any] = {
            "model": name,
            "pass": kind,
            "execution": execution,
            "batch_size": batch_size,
            "status": "ok",
        }

    def prepare(self) -> None:
        """Build the model, compile it, warm up; note sizes, first call and peak memory."""
        with self._noting_out_of_memory():
            torch.manual_seed(self.settings.seed)
            before = _allocated(self.device)
            model = create_model(self.record["model"], self.settings)
            images = create_images(model, self.record["batch_size"], self.settings)
            self.record["input_size"] = list(images.shape[1:])
            self.record["parameters"] = sum(p.numel() for p in model.parameters())
            if hasattr(model, "set_attention_backend"):
                chosen = self.settings.attention_backend or resolve_backend(self.device.type)
                self.record["attention_backend"] = chosen
            self.step = create_step(
                model,
                images,
                self.record["pass"],
                self.record["execution"],
                self.settings.precision,
            )

            start = perf_counter()
            self.step()
            synchronize(self.device)
            self.record["first_call_seconds"] = perf_counter() - start
            if self.device.type == "cuda":  # the first call's tuning is not the model's memory
                torch.cuda.reset_peak_memory_stats(self.device)
            warm = Timing([time_calls(self.step, self.device, self.settings.warmup)])
            self.calls = max(3, math.ceil(self.settings.round_seconds / warm.quantile(0.5)))
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device) - before
                self.record["peak_memory_mib"] = peak / MIB

    def time_round(self) -> None:
        """Time the calls of one turn."""
        if self.step is not None:
            with self._noting_out_of_memory():
                self.rounds.append(time_calls(self.step, self.device, self.calls))

    def result(self) -> dict[str, Any]:
        """Everything noted, and the numbers of the rounds."""
        if self.step is None:
            return self.record
        timing = Timing(self.rounds)
        return self.record | {
            "images_per_second": self.record["batch_size"] / timing.quantile(0.5),
            "latency_ms": {"p50": 1e3 * timing.quantile(0.5), "p95": 1e3 * timing.quantile(0.95)},
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
    kind: str, execution: str, batch_size: int, settings: Settings, advance: Callable[[], object]
) -> list[dict[str, Any]]:
    """Measure all models of the settings under one condition.

    Args:
        kind: "inference" or "training".
        execution: "eager", "compiled" or "cuda_graphs".
        batch_size: Images of a step.
        settings: Everything else.
        advance: Called after each of the `len(models) * (1 + rounds)` pieces of work.

    Returns:
        One JSON-ready record a model; of one that ran out of memory, without timings.
    """
    torch.compiler.reset()
    release_memory()
    _allocate_workspaces(torch.device(settings.device))
    candidates = [
        Candidate(name, kind, execution, batch_size, settings) for name in settings.models
    ]
    turns = [Candidate.prepare] + [Candidate.time_round] * settings.rounds
    for turn in turns:
        for candidate in candidates:
            turn(candidate)
            advance()
    return [candidate.result() for candidate in candidates]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device, or the host, had too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def release_memory() -> None:
    """Return what no tensor uses, so that one model's remains do not crowd the next."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _allocate_workspaces(device: torch.device) -> None:
    """Have the libraries allocate what they keep for good, or the first model would pay for it."""
    matrix = torch.ones(8, 8, device=device, requires_grad=True)
    (matrix @ matrix).sum().backward()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
