"""The results as a JSON file."""

import json
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import nat_models
from nat_models.provenance import commit


def describe(device: torch.device) -> dict[str, Any]:
    """What the numbers belong to: device, versions, commit, date."""
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
    }


def write(path: Path, description: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write the JSON file; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(description | {"results": results}, indent=2) + "\n")


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
