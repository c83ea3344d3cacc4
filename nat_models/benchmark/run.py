"""The command nat-bench: print what it measures, and write it down."""

import logging
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from nat_models.benchmark.loading import measure_loading
from nat_models.benchmark.measure import Candidate, measure_in_turns
from nat_models.benchmark.report import describe, write
from nat_models.benchmark.settings import Settings
from nat_models.benchmark.table import table
from nat_models.errors import bad_input

_log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Measure what a composed configs/bench.yaml asks for; print it and write a JSON file.

    With a data set (`data=...`) that is the loader alone, else models.

    Raises:
        ConfigError: A setting is not allowed; raised before any work, and names its key.
    """
    if cfg.get("data") is not None:
        _run_loading(cfg)
        return
    results: list[dict[str, Any]] = []
    with bad_input():
        settings = Settings.from_config(cfg)
        description = _describe(settings)
        try:
            write(settings.output, description, results)  # a path that cannot be written shows now
        except OSError as error:
            raise ValueError(f"output={settings.output}: cannot be written: {error}") from error

    device, groups, sampling = torch.device(settings.device), settings.groups, settings.sampling
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=sum(map(len, groups)) * (1 + sampling.rounds))
        for cases in groups:
            case = cases[0]
            condition = f"{case.kind}, {case.execution}, batch {case.batch_size}"
            progress.update(bar, description=condition)
            candidates = [Candidate(case, device, sampling) for case in cases]
            results += measure_in_turns(candidates, sampling.rounds, lambda: progress.advance(bar))
            write(settings.output, description, results)

    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table(description, results))
    _log.info("results: %s", settings.output)


def _run_loading(cfg: DictConfig) -> None:
    with bad_input():
        settings = Settings.from_config(cfg)
        result = measure_loading(cfg)
        write(settings.output, _describe(settings), [result])
    speed, workers = result["images_per_second"], result["num_workers"]
    _log.info("%s: %.0f images/s, %d loading processes", result["data"], speed, workers)
    _log.info("results: %s", settings.output)


def _describe(settings: Settings) -> dict[str, Any]:
    values = asdict(settings) | {"output": str(settings.output)}
    return describe(torch.device(settings.device)) | {"settings": values}
