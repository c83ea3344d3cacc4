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
from typing import NamedTuple

import torch
from measuring import today

from neighborhood_attention import na1d, na2d, na3d
from neighborhood_attention.backends.triton import fused_direct_forward, fused_forward

IS_WORTH_IT = fused_direct_forward.is_worth_it
TOOLS = "memcheck", "racecheck"
FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
HEADS = 4


class Problem(NamedTuple):
    """Sizes of a call with a bias."""

    spatial: tuple[int, ...]
    kernel_size: int
    dilation: int = 1
    stride: int = 1
    is_causal: bool = False  # on the first axis
    key_heads: int = 2
    head_dim: int = 32
    value_dim: int = 32
    additional: int | None = None  # keys


# Each choice of tiles and each kernel, with groups of two lengths and tiles that are not full.
PROBLEMS = [
    Problem((19, 21), 5, dilation=2),
    Problem((19, 18), 5),
    Problem((19, 18), 5, stride=2, is_causal=True),
    Problem((14, 15), 7, dilation=2, key_heads=4),
    Problem((7, 7), 7),
    Problem((7, 7), 7, is_causal=True),
    Problem((11, 13), 3, head_dim=40, value_dim=24, additional=5),
    Problem((70,), 9, dilation=3, additional=40),
    Problem((70,), 9, stride=4, is_causal=True),
    Problem((5, 6, 7), 3, head_dim=16, value_dim=16, additional=3),
    Problem((9, 11), 3, head_dim=256, value_dim=256, additional=5),
    Problem((40,), 5, head_dim=256, value_dim=64),
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
    machine = torch.cuda.get_device_name()
    description = {"device": machine, "commit": arguments.commit, "date": today()}
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


def run_problem(
    problem: Problem, dtype: torch.dtype, device: str = "cuda", backend: str = "fused"
) -> None:
    """Forward and backward; with few tokens also by the kernels of many."""
    for rule in (IS_WORTH_IT, lambda problem: False):
        fused_direct_forward.is_worth_it = rule
        fused_forward._prepare.cache_clear()
        _run(problem, dtype, device, backend)
    fused_direct_forward.is_worth_it = IS_WORTH_IT


def _run(problem: Problem, dtype: torch.dtype, device: str, backend: str) -> None:
    dims, keys = len(problem.spatial), (2, *problem.spatial, problem.key_heads)
    tensors = {
        "query": (2, *problem.spatial, HEADS, problem.head_dim),
        "key": (*keys, problem.head_dim),
        "value": (*keys, problem.value_dim),
        "rpb": (HEADS, *(2 * problem.kernel_size - 1,) * dims),
    }
    if problem.additional is not None:
        keys = 2, problem.additional, problem.key_heads
        tensors["additional_keys"] = (*keys, problem.head_dim)
        tensors["additional_values"] = (*keys, problem.value_dim)
    leaves = {
        name: torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
        for name, shape in tensors.items()
    }
    output, lse = FUNCTIONS[dims](
        **leaves,
        kernel_size=problem.kernel_size,
        stride=problem.stride,
        dilation=problem.dilation,
        is_causal=(problem.is_causal, *(False,) * (dims - 1)),
        return_lse=True,
        backend=backend,
    )
    (output.float().square().sum() + lse.sum()).backward()
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
