"""The three generations of kernels against each other and dense attention, as in the paper.

    PYTHONPATH=kernels python benchmarks/paper.py paper.json --commit COMMIT --limit-seconds 530
    PYTHONPATH=kernels python benchmarks/paper.py paper.json --draw FOLDER

Needs a GPU, PyTorch and Triton; the second command only draws. Runs go on where the last one ended,
on any machine of the same kind, and measure nothing twice, unless the kernels have changed since:
git says so, or without git the option --again. Problems with providers that PyTorch compiles come
first, the others in a random order, so that each part is a sample of the whole. There are 1,424
pairs of a problem and a precision; on an H200 with 16 cores one takes 1 second.

The problems of problems/paper.json, without bias, in half and full precision (fp32: products by
IEEE or as exact, and every third problem with TF32 ones). Each pass is checked against the
reference backend in fp64 and timed in a CUDA graph, the median of replays with a cold L2 cache.
dense is self-attention over the whole map by the fastest of PyTorch's cuDNN, FlashAttention and
memory-efficient kernels (one that takes twice as long as another is replayed once), where it takes
at most some 10 ms; its results are checked on small maps. flex (FlexAttention) and gathered
(windows by indexing), both compiled, are measured on thirty of the problems, in half precision.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import NamedTuple

import commits
import paper_plots
import paper_tables
import peers
import roofline
import study
import torch
from compiling import Kernel, Part, parts_of
from measuring import Record, Results, copy_bandwidth, product_rate
from peers import GENERATIONS, PROVIDERS, Provider
from problem import (
    PRECISIONS,
    Exact,
    Problem,
    Tensors,
    Unchecked,
    load_problems,
    random_tensors,
    use_precision,
)

IDENTITY = "map", "heads", "head_dim", "kernel_size", "dilation", "batch", "precision"
SLOW = "flex", "gathered"
MARGIN = 10  # seconds that a problem may take
MEASURED = ["float16", "float32", "tf32"]
SECONDS = 0.015  # of replays, of which there are 5 at least
# Dense attention that takes longer than these FLOP is left out.
DENSE_FLOPS = {"float16": 2 * 10**12, "float32": 10**11, "tf32": 10**11}
CHECKED_TOKENS = 2048  # of dense attention


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--precision", nargs="+", default=MEASURED, choices=MEASURED)
    parser.add_argument("--dims", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--again", nargs="*", metavar="COMMIT",
                        help="measure anew what these commits measured, or all but --commit; "
                        "by default those whose kernels differ, where git can tell")  # fmt: skip


def begin(results: Results) -> None:
    """Bytes a second of a copy, FLOP a second of a large product in each precision."""
    rates = {precision: product_rate(use_precision(precision)) for precision in MEASURED}
    results.content["ceilings"] = {"bandwidth": copy_bandwidth(), **rates}


class Work(NamedTuple):
    """A problem in a precision."""

    problem: Problem
    precision: str
    providers: list[Provider]

    @property
    def record(self) -> Record:
        """What identifies it."""
        return self.problem.record | {"precision": self.precision}

    @property
    def parts(self) -> list[Part]:
        """What other processes compile."""
        what = self.problem, self.precision, False
        return [part for provider in self.providers for part in parts_of(provider, *what)]


def missing(arguments: argparse.Namespace, results: Results) -> list[Work]:
    """What is not measured or old, in an order that is always the same: random but for peers."""
    work = [
        Work(problem, precision, providers_of(entry, problem, precision))
        for entry in load_problems("paper")
        for precision in MEASURED
        if (precision != "tf32" or entry["tf32"]) and (problem := Problem.of(entry))
    ]
    Random(0).shuffle(work)
    work.sort(key=lambda item: not set(item.providers) & {PROVIDERS[name] for name in SLOW})
    return [
        item
        for item in work
        if item.precision in arguments.precision
        and item.problem.dims in arguments.dims
        and is_due(item, arguments, results)
    ]


def is_due(work: Work, arguments: argparse.Namespace, results: Results) -> bool:
    """Whether it is not measured, or of other kernels."""
    before = results.find(work.record)
    if before is None:
        return True
    return commits.is_old(before["commit"], arguments.commit, arguments.again)


def providers_of(entry: Record, problem: Problem, precision: str) -> list[Provider]:
    """What is measured on a problem."""
    names = list(GENERATIONS)
    if 4 * problem.elements * problem.tokens <= DENSE_FLOPS[precision]:
        names.append("dense")
    if entry["slow"] and precision == "float16":
        names.extend(SLOW)
    return [PROVIDERS[name] for name in names]


def measure(work: Work, results: Results, compiled: dict[Part, list[Kernel] | None]) -> Record:
    """Times in microseconds of all providers, the largest errors, and what failed."""
    problem, precision = work.problem, work.precision
    tolerance = 4 * PRECISIONS[precision][2]  # long sums; unfused weights are rounded
    tensors = random_tensors(problem, use_precision(precision), False)
    exact = Exact(problem, tensors, tolerance)
    times: Record = {}
    record: Record = {"providers": times, "errors": {}, "failures": {}}
    record["kernels"] = kernel_numbers(results.content, compiled)
    for provider in work.providers:
        check = exact_dense(problem, tensors, tolerance) if provider.is_dense else exact
        found = peers.measure(provider, problem, tensors, check, SECONDS)
        failures = found.pop("failures")
        if not found or provider.compiler:  # ways of PyTorch's that do not exist are no failures
            record["failures"] |= {f"{provider.name} {k}": v for k, v in failures.items()}
        times[provider.name] = {}
        for name, entry in found.items():
            times[provider.name] |= {
                f"{name}_us": entry["us"], f"{name}_range_us": entry["range"],
                f"{name}_way": entry["way"],
            }  # fmt: skip
            record["errors"][f"{provider.name} {name}"] = max(entry["errors"].values(), default=0)
        if provider.compiler == "torch":
            torch._dynamo.reset()
    return record


def exact_dense(problem: Problem, tensors: Tensors, tolerance: float) -> Exact:
    """Of attention to the whole map; of a large one nothing is checked."""
    whole = replace(problem, kernel_size=problem.map, dilation=(1,) * problem.dims)
    return (Exact if problem.tokens <= CHECKED_TOKENS else Unchecked)(whole, tensors, tolerance)


def kernel_numbers(content: Record, compiled: dict[Part, list[Kernel] | None]) -> list[int]:
    """Places in the file's `kernels` of what is launched; variants that are new come to its end."""
    names = "backend", "precision", "dims", *Kernel._fields
    variants: list[Record] = content.setdefault("kernels", [])
    places = {tuple(v[n] for n in names): place for place, v in enumerate(variants)}
    numbers = []
    for part, kernels in compiled.items():
        for kernel in kernels or ():
            key = (part[0], part.precision, part.problem.dims, *kernel)
            if key not in places:
                places[key] = len(variants)
                variants.append(dict(zip(names, key, strict=True)))
            numbers.append(places[key])
    return numbers


def line(record: Record) -> str:
    """A measurement in short."""
    words = [f"{Problem.of(record)} {record['precision']}"]
    for name, times in record.get("providers", {}).items():
        words.append(f"{name} {times.get('forward_us', 0):.0f} {times.get('backward_us', 0):.0f}")
    failures = "; ".join(f"{k}: {v}" for k, v in record["failures"].items())
    return " | ".join(words) + (f" | {failures[:300]}" if failures else "")


def tables(result: Record) -> str:
    """All of it in Markdown."""
    return f"{paper_tables.tables(result)}\n\n{roofline.tables(result)}"


def plots(result: Record, folder: Path) -> dict[str, Path]:
    """The improvements and the roofline; files by caption."""
    return paper_plots.plots(result, folder) | roofline.plots(result, folder)


if __name__ == "__main__":
    study.main(sys.modules[__name__])
