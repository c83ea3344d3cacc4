"""The results as a table."""

from typing import Any

from rich.table import Table


def table(description: dict[str, Any], results: list[dict[str, Any]]) -> Table:
    """The results, one row each."""
    precision = description["settings"]["precision"]
    table = Table(
        title=f"{description['device']}, torch {description['versions']['torch']}, {precision}"
    )
    table.add_column("model", overflow="fold")
    for column in ("pass", "execution", "input"):
        table.add_column(column, no_wrap=True)
    for column in ("images/s", "spread", "p50 ms", "p95 ms", "MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(result["model"], result["pass"], result["execution"], *_numbers(result))
    return table


def _numbers(result: dict[str, Any]) -> list[str]:
    if result["status"] != "ok":
        return [str(result["batch_size"]), result["status"]]
    peak = result.get("peak_memory_mib")
    return [
        "x".join(map(str, [result["batch_size"], *result["input_size"]])),
        f"{result['images_per_second']:.1f}",
        f"{result['spread']:.1%}",
        f"{result['latency_ms']['p50']:.2f}",
        f"{result['latency_ms']['p95']:.2f}",
        "-" if peak is None else f"{peak:.0f}",
    ]
