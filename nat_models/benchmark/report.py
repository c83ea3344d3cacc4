"""The results as a JSON file and as a table."""

import json
import platform
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import nat_models
from nat_models.benchmark.settings import Settings
from nat_models.provenance import commit


def describe(settings: Settings) -> dict[str, Any]:
    """What the numbers belong to: device, versions, commit, date, settings."""
    device = torch.device(settings.device)
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda if on_gpu else None,
            "nat-models": nat_models.__version__,
            "torch": torch.__version__,
            "timm": _version("timm"),
            "triton": _version("triton"),
        },
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": asdict(settings) | {"output": str(settings.output)},
    }


def write(path: Path, description: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write the JSON file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(description | {"results": results}, indent=2) + "\n")


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


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; Linux alone tells it in a file."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
