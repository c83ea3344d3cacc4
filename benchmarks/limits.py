"""What the fused kernels make possible: memory and time a token as maps and sequences grow.

    PYTHONPATH=kernels python benchmarks/limits.py limits.json --commit COMMIT --limit-seconds 530
    PYTHONPATH=kernels python benchmarks/limits.py limits.json --draw FOLDER

Needs a GPU, PyTorch and Triton; the second command only draws.

One image or sequence, 4 heads of 32 channels, fp16, no bias: 7x7 windows on square maps, and
windows of 255 tokens on sequences. Memory is the most that a forward and a backward hold, their
inputs and gradients included; times are medians of CUDA graph replays with a cold L2 cache. Results
are checked against the reference backend in fp64 up to 65,536 tokens. dense is PyTorch's fused
self-attention, where it takes at most about a second. naive and gemm are left out where their
attention weights take 32 GiB.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import peers
import study
import torch
from compiling import Part, parts_of
from measuring import Record, Results, markdown_table, save_picture
from peers import GENERATIONS, PROVIDERS, Provider
from problem import PRECISIONS, Exact, Problem, Tensors, Unchecked, random_tensors, use_precision
from roofline import COLORS

IDENTITY = "map", "kernel_size", "provider"
MARGIN = 20  # seconds that a problem may take
PRECISION = "float16"
SIDES = 32, 64, 128, 256, 512, 1024, 2048, 3072
LENGTHS = *(2**power for power in range(10, 20, 2)), 2**20
MEMORY_GIB = 16  # of the table of largest maps
CHECKED_TOKENS = 2**16
MAX_SECONDS = 1
DENSE_RATE = 10**14  # FLOP a second, a careful guess: decides what is left out


def problems() -> list[Problem]:
    """Maps, then sequences."""
    return [
        *(Problem((side, side), 4, 32, (7, 7), (1, 1), 1) for side in SIDES),
        *(Problem((length,), 4, 32, (255,), (1,), 1) for length in LENGTHS),
    ]


class Work(NamedTuple):
    """A provider on a size."""

    problem: Problem
    provider: Provider

    @property
    def record(self) -> Record:
        """What identifies it."""
        return self.problem.record | {"provider": self.provider.name}

    @property
    def parts(self) -> list[Part]:
        """What other processes compile."""
        return parts_of(self.provider, self.problem, PRECISION, False)


def add_options(parser: argparse.ArgumentParser) -> None:
    """None."""


def begin(results: Results) -> None:
    """Nothing."""


def missing(arguments: argparse.Namespace, results: Results) -> Iterator[Work]:
    """Sizes and providers that are not measured yet and feasible."""
    for problem, name in product(problems(), (*GENERATIONS, "dense")):
        work = Work(problem, PROVIDERS[name])
        if results.find(work.record) is None and is_feasible(work):
            yield work


def is_feasible(work: Work) -> bool:
    """Whether it takes neither too long nor too much memory."""
    problem = work.problem
    if work.provider.is_dense:  # the backward is the longest, five products to two
        return 10 * problem.elements * problem.tokens < MAX_SECONDS * DENSE_RATE
    weights = problem.elements // problem.head_dim * problem.window
    return work.provider.name == "fused" or 2 * 2 * weights < 2**35


def measure(work: Work, results: Results, _: Any) -> Record:
    """Times in microseconds, and bytes."""
    problem, provider = work
    tensors = random_tensors(problem, use_precision(PRECISION), False)
    whole = problem
    if provider.is_dense:
        whole = Problem(**vars(problem) | {"kernel_size": problem.map})
    is_checked = max(problem.tokens, whole.tokens * whole.window // 2**12) <= CHECKED_TOKENS
    exact = (Exact if is_checked else Unchecked)(whole, tensors, 4 * PRECISIONS[PRECISION][2])
    found = peers.measure(provider, problem, tensors, exact, seconds=0.05)
    failures = found.pop("failures")
    record: Record = {"failures": {} if found else failures}
    for name, entry in found.items():
        record[f"{name}_us"], record[f"{name}_range_us"] = entry["us"], entry["range"]
    if "backward" in found:
        way = found["backward"]["way"]
        record["bytes"] = most_bytes(provider, problem, tensors, exact.grad, way)
    del exact, tensors
    torch.cuda.empty_cache()
    return record


def most_bytes(
    provider: Provider, problem: Problem, tensors: Tensors, grad: torch.Tensor, way: str
) -> int:
    """Held at once by a forward and a backward, with inputs and gradients, however arranged."""
    call = next(call for call in provider.prepare(problem, tensors) if call.label == way)
    arranged = call.arrange(grad)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call.backward(arranged)
    return torch.cuda.max_memory_allocated() - before + tensors.qkv.nbytes + grad.nbytes


def tokens(record: Record) -> int:
    """Of the map."""
    return Problem.of(record).tokens


def line(record: Record) -> str:
    """A measurement in short."""
    words = [str(Problem.of(record)), record["provider"]]
    words += [f"{name} {record[f'{name}_us']:.0f} us" for name in passes(record)]
    words += [f"{record['bytes'] / 2**30:.2f} GiB"] if "bytes" in record else []
    return " | ".join([*words, *map(str, record["failures"].values())])


def passes(record: Record) -> list[str]:
    """Those with a time."""
    return [name for name in ("forward", "backward") if f"{name}_us" in record]


def tables(result: Record) -> str:
    """The largest sizes within a memory, and time a token by size; Markdown."""
    sizes = {len(r["map"]): None for r in result["results"]}
    parts = [f"{result['device']}; one image or sequence, forward and backward, {_words(result)}."]
    for dims in sorted(sizes, reverse=True):
        records = [r for r in result["results"] if len(r["map"]) == dims]
        parts.append(
            f"Largest size within {MEMORY_GIB} GiB, of those that were measured, and computed from "
            f"the bytes a token of the largest one measured:\n\n{_largest(records)}"
        )
        parts.append(f"Nanoseconds a token (MiB):\n\n{_by_size(records)}")
    return "\n\n".join(parts)


def _words(result: Record) -> str:
    """Element type and heads."""
    first = result["results"][0]
    return f"{PRECISION}, {first['heads']} heads of {first['head_dim']} channels"


def _largest(records: list[Record]) -> str:
    rows = []
    for name in dict.fromkeys(r["provider"] for r in records):
        measured = [r for r in records if r["provider"] == name and "bytes" in r]
        fits = [r for r in measured if r["bytes"] <= MEMORY_GIB * 2**30]
        if fits:
            last, largest = max(fits, key=tokens), max(measured, key=tokens)
            cells = _size(last["map"]), f"{last['bytes'] / 2**30:.2f}", _size(largest["map"])
            per_token = f"{largest['bytes'] / tokens(largest):.0f}"
            rows.append([name, *cells, per_token, _size(computed_size(largest))])
    head = ["kernels", "measured within", "its GiB", "largest measured", "bytes a token of that",
            "computed"]  # fmt: skip
    return markdown_table(head, rows)


def computed_size(record: Record) -> list[int]:
    """The largest map with equal sides that fits, if tokens take as many bytes as in `record`."""
    count = MEMORY_GIB * 2**30 * tokens(record) // record["bytes"]
    dims = len(record["map"])
    return [isqrt(count) if dims == 2 else count] * dims


def _size(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _by_size(records: list[Record]) -> str:
    names = list(dict.fromkeys(r["provider"] for r in records))
    rows = []
    for size in sorted({tuple(r["map"]) for r in records}):
        row = {r["provider"]: r for r in records if tuple(r["map"]) == size}
        cells = [_cell(row[name]) if name in row else "-" for name in names]
        rows.append([_size(size), *cells])
    return markdown_table(["size", *names], rows)


def _cell(record: Record) -> str:
    if len(passes(record)) < 2:
        return "-"
    time = record["forward_us"] + record["backward_us"]
    return f"{1e3 * time / tokens(record):.1f} ({record['bytes'] / 2**20:.0f})"


def plots(result: Record, folder: Path) -> dict[str, Path]:
    """Time a token and memory by size, for maps and sequences; one file, by its caption."""
    from matplotlib.figure import Figure

    figure = Figure((11, 8), layout="constrained")
    panels = figure.subplots(2, 2)
    titles = "maps, 7x7 windows", "sequences, windows of 255"
    for row, dims, title in zip(panels, (2, 1), titles, strict=True):
        for name in (*GENERATIONS, "dense"):
            records = [
                r
                for r in result["results"]
                if r["provider"] == name and len(r["map"]) == dims and len(passes(r)) == 2
            ]
            sizes = [tokens(r) for r in records]
            times = [(r["forward_us"] + r["backward_us"]) / tokens(r) * 1e3 for r in records]
            row[0].plot(sizes, times, label=name, **_style(name))
            row[1].plot(sizes, [r["bytes"] / 2**30 for r in records], **_style(name))
        row[0].set(ylabel="nanoseconds a token", title=title)
        row[1].set(ylabel=f"GiB (dotted: {MEMORY_GIB})", title=title)
        row[1].axhline(MEMORY_GIB, color="black", linewidth=0.8, linestyle=":")
        for axes in row:
            axes.set(xscale="log", yscale="log", xlabel="tokens")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    figure.suptitle(f"{result['device']}, {_words(result)};\none forward and backward", x=0.3)
    return {"Time a token and memory by size": save_picture(figure, result, "limits", folder)}


def _style(name: str) -> dict[str, Any]:
    """naive and gemm hold the same tensors: one is drawn wide, the other in it."""
    wide = {"linewidth": 5, "markersize": 11, "alpha": 0.4} if name == "naive" else {}
    return {"marker": "o", "markersize": 5, "color": COLORS[name], **wide}


if __name__ == "__main__":
    study.main(sys.modules[__name__])
