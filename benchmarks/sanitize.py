"""Every fused kernel under NVIDIA's compute-sanitizer: no access out of bounds, no race.

    PYTHONPATH=kernels python benchmarks/sanitize.py results.json --commit COMMIT

Needs a GPU, PyTorch, Triton and compute-sanitizer, on the PATH or in the CUDA toolkit. Exits with 1
where a tool found something; the file holds its summary and the end of its output.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch

from neighborhood_attention import na1d, na2d, na3d

TOOLS = "memcheck", "racecheck"
FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
HEADS = 4
# Shape of the map, kernel size, dilation, key heads, head dimensions, additional keys: each choice
# of tiles and each kernel, with groups of two lengths and tiles that are not full.
Problem = tuple[tuple[int, ...], int, int, int, int, int, int | None]
PROBLEMS: list[Problem] = [
    ((19, 21), 5, 2, 2, 32, 32, None),
    ((19, 18), 5, 1, 2, 32, 32, None),
    ((14, 15), 7, 2, 4, 32, 32, None),
    ((7, 7), 7, 1, 2, 32, 32, None),
    ((11, 13), 3, 1, 2, 40, 24, 5),
    ((70,), 9, 3, 2, 32, 32, 40),
    ((5, 6, 7), 3, 1, 2, 16, 16, 3),
    ((9, 11), 3, 1, 2, 256, 256, 5),
    ((40,), 5, 1, 2, 256, 64, None),
]
CASES = list(itertools.product(PROBLEMS, (torch.bfloat16, torch.float32)))


def main() -> None:
    """Run this file once under each tool, or the problems."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--commit", help="of the code that is checked")
    parser.add_argument("--problems", action="store_true", help="only run the problems")
    arguments = parser.parse_args()
    if arguments.problems:
        for case in CASES:
            run_problem(*case)
        return
    if arguments.output is None or arguments.commit is None:
        parser.error("the output and --commit are required")
    path = sanitizer()
    with multiprocessing.get_context("spawn").Pool(min(len(CASES), os.cpu_count() or 1)) as pool:
        pool.starmap(run_problem, CASES)  # compiles the kernels: the tools slow that down
    with ThreadPool(len(TOOLS)) as threads:
        results = threads.starmap(check, [(path, tool) for tool in TOOLS])
    description = {"device": torch.cuda.get_device_name(), "commit": arguments.commit}
    arguments.output.write_text(json.dumps({**description, "results": results}, indent=1) + "\n")
    print(*(f"{result['tool']}: {result['summary']}" for result in results), sep="\n")
    sys.exit(any(result["exit_code"] for result in results))


def sanitizer() -> str:
    """Path of compute-sanitizer."""
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
    path = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}{os.pathsep}{toolkit}")
    if path is None:
        raise SystemExit(f"compute-sanitizer: found neither on the PATH nor in {toolkit}")
    return path


def check(path: str, tool: str) -> dict[str, object]:
    """One tool's findings."""
    command = [
        path,
        "--tool",
        tool,
        "--error-exitcode",
        "1",
        sys.executable,
        __file__,
        "--problems",
    ]
    # Without PyTorch's cache of memory, the end of a tensor is the end of an allocation.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.time()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    output = done.stdout + done.stderr
    summaries = re.findall(r"=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", output)
    return {
        "tool": tool,
        "exit_code": done.returncode,
        "summary": "; ".join(summaries) or "none",
        "seconds": round(time.time() - start),
        "output": "" if done.returncode == 0 else output[-5000:],
    }


def run_problem(problem: Problem, dtype: torch.dtype) -> None:
    """Forward and backward."""
    spatial, kernel_size, dilation, key_heads, head_dim, value_dim, additional = problem
    tensors = {
        "query": (2, *spatial, HEADS, head_dim),
        "key": (2, *spatial, key_heads, head_dim),
        "value": (2, *spatial, key_heads, value_dim),
        "rpb": (HEADS, *(2 * kernel_size - 1 for _ in spatial)),
    }
    if additional is not None:
        tensors["additional_keys"] = (2, additional, key_heads, head_dim)
        tensors["additional_values"] = (2, additional, key_heads, value_dim)
    leaves = {
        name: torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True)
        for name, shape in tensors.items()
    }
    output, lse = FUNCTIONS[len(spatial)](
        **leaves, kernel_size=kernel_size, dilation=dilation, return_lse=True, backend="fused"
    )
    (output.float().square().sum() + lse.sum()).backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
