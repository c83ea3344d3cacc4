"""Hardware counters of kernels, by Nsight Compute's command ncu."""

import csv
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from measuring import Record

# As ncu names them for Hopper; the last four are shares of the most in active cycles.
METRICS = {
    "us": "gpu__time_duration.sum",
    "read_bytes": "dram__bytes_read.sum",
    "written_bytes": "dram__bytes_write.sum",
    "l2_bytes": "lts__t_bytes.sum",
    "instructions": "smsp__inst_executed.sum",  # of warps
    "occupancy": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "tensor_pipe": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "fma_pipe": "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
}
PREFIXES = {"": 1, "n": 1e-9, "u": 1e-6, "m": 1e-3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
UNITS = {"byte": 1, "inst": 1, "%": 0.01, "second": 1e6, "s": 1e6}  # to microseconds and shares


def find() -> str:
    """Path of ncu.

    Raises:
        SystemExit: There is none.
    """
    path = shutil.which("ncu")
    if path is None:
        raise SystemExit("ncu: not found on the PATH; it is part of Nsight Compute")
    return path


def profile(path: str, command: Sequence[str], log: Path) -> str:
    """What ncu prints, into `log`, of what a command runs between start and stop of its profiler.

    Each kernel has cold caches and runs by itself, at the clocks that the GPU chooses.

    Raises:
        SystemExit: ncu or the command failed, or counters may not be read.
    """
    log.unlink(missing_ok=True)
    done = subprocess.run([
        *(path, "--csv", "--page", "raw", "--log-file", str(log)),
        *("--target-processes", "application-only", "--profile-from-start", "off"),
        *("--clock-control", "none", "--cache-control", "all"),
        *("--print-kernel-base", "function", "--metrics", ",".join(METRICS.values()), *command),
    ])  # fmt: skip
    text = log.read_text() if log.exists() else ""
    errors = re.findall(r"^==ERROR== (.*)", text, re.MULTILINE)
    if errors or done.returncode:
        reason = errors[0] if errors else f"exit code {done.returncode}"
        raise SystemExit(f"ncu: {reason} (what it printed: {log})")
    return text


def read(text: str) -> list[Record]:
    """Name and metrics of each kernel, in order; none where ncu printed no table.

    Raises:
        KeyError: A metric is missing.
        ValueError: So is a number, or its unit is unknown.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    units, *kernels = list(csv.DictReader(lines)) or [{}]
    return [
        {"name": kernel["Kernel Name"]}
        | {name: number(kernel[metric], units[metric]) for name, metric in METRICS.items()}
        for kernel in kernels
    ]


def number(text: str, unit: str) -> float:
    """As microseconds, bytes, instructions or a share.

    Raises:
        ValueError: There is no number, or the unit is unknown.
    """
    found = re.fullmatch(f"([{''.join(PREFIXES)}]?)({'|'.join(UNITS)})", unit)
    if found is None:
        raise ValueError(f"ncu's unit {unit!r}: expected one of {', '.join(UNITS)}")
    return float(text.replace(",", "")) * PREFIXES[found[1]] * UNITS[found[2]]
