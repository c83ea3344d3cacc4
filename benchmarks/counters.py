"""Hardware counters of the three generations of kernels: what bounds each of them.

    PYTHONPATH=kernels python benchmarks/counters.py counters.json --commit COMMIT

Needs a Hopper GPU, PyTorch, Triton and Nsight Compute's ncu on the PATH. One ncu measures all, and
what it printed is left beside the results as .csv. When the time is over, the last calls are left
out.

Two layers of the zoo, and of the paper's 1-D and 3-D problems without dilation, with heads of 32
channels and 2^24 elements or more, the one of median work; without bias. Counted are the kernels of
one warm call, each by itself, with cold caches and at the clocks that the GPU chooses; times are
sums over kernels, without gaps and overlaps. Results are not checked here: paper.py does that.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import NamedTuple

import ncu
import roofline
import torch
from compiling import parts_of, wait
from measuring import Record, Results, copy_bandwidth, describe_device, markdown_table, today
from peers import GENERATIONS, PROVIDERS
from problem import Problem, load_problems, random_tensors, use_precision

from neighborhood_attention.tune.ahead import Ahead
from neighborhood_attention.tune.records import Deadline

SIZES = "map", "heads", "head_dim", "kernel_size", "dilation", "batch"
CALL = "precision", "pass", "generation"
LAYERS = {"map": [56, 56], "dilation": [1, 1]}, {"map": [28, 28], "dilation": [4, 4]}
LEAST_ELEMENTS = 2**24  # such tensors do not stay in the L2 cache
MARGIN = 5  # seconds that a call may take under ncu
MARKER = "spin_kernel"  # of torch.cuda._sleep: begins each call


class Case(NamedTuple):
    """One pass of one generation."""

    problem: Problem
    precision: str
    name: str
    generation: str

    @property
    def record(self) -> Record:
        """What identifies it."""
        return self.problem.record | dict(zip(CALL, self[1:], strict=True))


def cases() -> list[Case]:
    """All, in the order in which they are called."""
    choices = product(problems(), ("float16", "float32"), ("forward", "backward"), GENERATIONS)
    return [Case(*choice) for choice in choices]


def problems() -> list[Problem]:
    """As the module says."""
    zoo = [entry for entry in load_problems("zoo") if entry["main"]]
    layers = [next(entry for entry in zoo if some.items() <= entry.items()) for some in LAYERS]
    return [*map(Problem.of, layers), *map(median_work, (1, 3))]


def median_work(dims: int) -> Problem:
    """Of the paper's problems with so many axes."""
    found = [
        p
        for p in map(Problem.of, load_problems("paper"))
        if p.dims == dims and p.head_dim == 32 and set(p.dilation) == {1}
        if p.elements >= LEAST_ELEMENTS
    ]
    return sorted(found, key=lambda p: p.flops)[len(found) // 2]


def main() -> None:
    """Measure all cases, write them and print the table; or make the calls, under ncu."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--commit", required=True, help="of the code that is measured")
    parser.add_argument("--limit-seconds", type=float, default=300, help="of this run")
    parser.add_argument("--child", action="store_true", help="only make the calls")
    arguments = parser.parse_args()
    deadline = Deadline(arguments.limit_seconds)
    if arguments.child:
        make_calls(deadline)
        return
    path = ncu.find()
    method = " ".join(__doc__.split("\n\n")[-1].split())
    described = describe_device() | {"commit": arguments.commit, "date": today(), "method": method}
    results = Results(arguments.output, described | {"metrics": ncu.METRICS}, [*SIZES, *CALL])
    results.content["bandwidth"] = prepare(deadline)
    child = [sys.executable, __file__, *sys.argv[1:], "--child"]
    child += ["--limit-seconds", str(deadline.left)]
    found = calls(ncu.read(ncu.profile(path, child, arguments.output.with_suffix(".csv"))))
    for case, kernels in zip(cases(), found, strict=False):
        results.add(case.record | {"kernels": kernels})
    print(f"{len(found)} of {len(cases())} calls measured\n")
    print(tables(results.content | {"results": results.records}))


def prepare(deadline: Deadline) -> float:
    """Compile all kernels; bytes a second of a copy.

    Raises:
        TimeoutError: The deadline came first.
    """
    each = (parts_of(PROVIDERS[c.generation], c.problem, c.precision, False) for c in cases())
    parts = list(chain.from_iterable(each))
    with Ahead(parts) as ahead, torch.cuda.stream(torch.cuda.Stream()):
        bandwidth = copy_bandwidth()
        torch.cuda.empty_cache()
        for part in parts:
            wait(ahead, part, deadline)
    return bandwidth


def make_calls(deadline: Deadline) -> None:
    """Each case once to warm up, and once between start and stop of the profiler."""
    for case in cases():
        if deadline.left < MARGIN:
            return
        torch.cuda.empty_cache()  # ncu saves what a process holds before it repeats a kernel
        tensors = random_tensors(case.problem, use_precision(case.precision), False)
        call = next(iter(PROVIDERS[case.generation].prepare(case.problem, tensors)))
        is_backward = case.name == "backward"
        function = partial(call.backward, tensors.grad) if is_backward else call.forward
        function()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(0)
        function()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del tensors, call, function


def calls(kernels: Sequence[Record]) -> list[list[Record]]:
    """The kernels of each call.

    Raises:
        ValueError: The first is no mark.
    """
    found: list[list[Record]] = []
    for kernel in kernels:
        if MARKER in kernel["name"]:
            found.append([])
        elif not found:
            raise ValueError(f"the first kernel is {kernel['name']}, not {MARKER}")
        else:
            found[-1].append(kernel)
    return found


def tables(result: Record) -> str:
    """A row a call, in Markdown."""
    head = ["problem", *CALL, "us", "DRAM GB", "least", "GB/s", "of a copy's", "longest kernel",
            "of the time", "occupancy", "issue", "tensor pipe", "FMA pipe"]  # fmt: skip
    return (
        f"{result['device']}, {result['date']}. DRAM GB: read and written by all kernels of the "
        "pass; least: where each step moves each tensor once. The last columns are of the longest "
        "kernel: shares of resident warps, issue slots and cycles of the pipes.\n\n"
        + markdown_table(head, [_row(r, result["bandwidth"]) for r in result["results"]])
    )


def _row(record: Record, bandwidth: float) -> list[str]:
    problem, kernels = Problem.of(record), record["kernels"]
    precision, name, generation = call = [record[field] for field in CALL]
    time = sum(kernel["us"] for kernel in kernels)
    moved = sum(kernel["read_bytes"] + kernel["written_bytes"] for kernel in kernels)
    least = roofline.traffic(problem, precision, generation, name == "backward")
    rate = moved / (time / 1e6)
    longest = max(kernels, key=lambda kernel: kernel["us"])
    shares = [longest[k] for k in ("occupancy", "issue", "tensor_pipe", "fma_pipe")]
    return [
        str(problem), *call, f"{time:.0f}", f"{moved / 1e9:.2f}", f"{least / 1e9:.2f}",
        f"{rate / 1e9:.0f}", f"{rate / bandwidth:.0%}", longest["name"],
        *(f"{share:.0%}" for share in (longest["us"] / time, *shares)),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
