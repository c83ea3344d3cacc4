"""Throughput, latency and memory of models: `nat-bench`, or `python -m nat_models.benchmark`."""

import logging
from itertools import product
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

from nat_models.benchmark.measure import measure_in_turns
from nat_models.benchmark.report import describe, table, write
from nat_models.benchmark.settings import Settings

_log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Measure what a composed configs/bench.yaml asks for; print a table and write a JSON file.

    Raises:
        ValueError: A setting is not allowed.
    """
    settings = Settings.from_config(cfg)
    description = describe(settings)
    results: list[dict[str, Any]] = []
    write(settings.output, description, results)  # a path that cannot be written shows now

    conditions = [*product(settings.passes, settings.execution, settings.batch_size)]
    total = len(conditions) * len(settings.models) * (1 + settings.rounds)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=total)
        for condition in conditions:
            kind, execution, batch_size = condition
            progress.update(bar, description=f"{kind}, {execution}, batch {batch_size}")
            results += measure_in_turns(*condition, settings, lambda: progress.advance(bar))
            write(settings.output, description, results)

    console = Console()
    if not console.is_terminal:
        console.width = 120
    console.print(table(description, results))
    _log.info("results: %s", settings.output)
