"""Work, traffic and occupancy of the three generations of kernels, and what the GPU allows."""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from measuring import Record, markdown_table, save_picture
from peers import GENERATIONS
from problem import PRECISIONS, Problem

COLORS = {"naive": "tab:red", "gemm": "tab:orange", "fused": "tab:blue", "dense": "tab:gray"}
BLOCKS = 32  # programs that a multiprocessor holds at most
RESERVED = 1024  # bytes of shared memory that a program costs besides its own


def flops(problem: Problem, backward: bool) -> int:
    """Of the products between queries and their windows: two forward, five backward."""
    return problem.flops * 5 // 2 if backward else problem.flops


def traffic(problem: Problem, precision: str, generation: str, backward: bool) -> int:
    """Bytes that a formulation moves at least: each step reads and writes each tensor once.

    Unfused, the weights [B, *map, heads, window] pass through memory. Forward: written by the
    products, read and written by the softmax, read by the sums. Backward: two products write them,
    the softmax's gradient reads both and writes one, three sums read one each.
    """
    weights = problem.elements // problem.head_dim * problem.window
    if generation == "fused":
        weights = 0
        tensors = 8 if backward else 4
    else:
        tensors = 10 if backward else 4
    size: int = PRECISIONS[precision][0].itemsize
    return (tensors * problem.elements + (8 if backward else 4) * weights) * size


def intensity(problem: Problem, precision: str, generation: str, backward: bool) -> float:
    """FLOP a byte."""
    return flops(problem, backward) / traffic(problem, precision, generation, backward)


def occupancy(kernel: Record, multiprocessor: Record) -> float:
    """Share of a multiprocessor's threads that programs of this kernel fill."""
    warps = kernel["warps"]
    registers = warps * -(-kernel["registers"] * 32 // 256) * 256  # given out in units of 256
    programs = min(
        multiprocessor["registers"] // registers,
        multiprocessor["shared_memory"] // (kernel["shared_memory"] + RESERVED),
        multiprocessor["threads"] // (32 * warps),
        BLOCKS,
    )
    return programs * warps * 32 / multiprocessor["threads"]


def passes(record: Record, provider: str) -> Iterator[tuple[bool, float]]:
    """Whether backward, and the time in microseconds, of what was measured."""
    times = record.get("providers", {}).get(provider, {})
    for name in ("forward", "backward"):
        if f"{name}_us" in times:
            yield name == "backward", times[f"{name}_us"]


def points(result: Record, precision: str) -> Iterator[tuple[str, bool, float, float, float]]:
    """Generation, whether backward, FLOP a byte, FLOP a second, bytes a second."""
    for record in result["results"]:
        if record["precision"] != precision:
            continue
        problem = Problem.of(record)
        for generation in GENERATIONS:
            for backward, time in passes(record, generation):
                work = flops(problem, backward), traffic(problem, precision, generation, backward)
                rates = (amount / (time / 1e6) for amount in work)
                yield generation, backward, work[0] / work[1], *rates


def tables(result: Record) -> str:
    """Achieved rates, and what the compiler made of the kernels, in Markdown."""
    return f"{_rates(result)}\n\n{_kernels(result)}"


def _rates(result: Record) -> str:
    rows = []
    for precision in _precisions(result):
        ceilings = result["ceilings"]
        found = list(points(result, precision))
        for backward in (False, True):
            for generation in GENERATIONS:
                chosen = [p[2:] for p in found if p[:2] == (generation, backward)]
                if not chosen:
                    continue
                per_byte, compute, memory = (median(v) for v in zip(*chosen, strict=True))
                rows.append([
                    precision, "backward" if backward else "forward", generation, len(chosen),
                    f"{per_byte:.1f}", f"{memory / 1e12:.2f} TB/s",
                    f"{memory / ceilings['bandwidth']:.0%}", f"{compute / 1e12:.1f} TFLOP/s",
                    f"{compute / ceilings[precision]:.1%}",
                ])  # fmt: skip
    head = ["precision", "pass", "kernels", "problems", "FLOP a byte", "bandwidth",
            "of a copy's", "products", "of a large product's"]  # fmt: skip
    return "Medians over the problems; each formulation by its own traffic:\n\n" + markdown_table(
        head, rows
    )


def _kernels(result: Record) -> str:
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for kernel in result.get("kernels", []):
        if kernel["registers"] is not None:
            key = kernel["backend"], kernel["precision"], kernel["name"]
            groups.setdefault(key, []).extend([kernel] * kernel["count"])
    rows = []
    for key, kernels in sorted(groups.items()):
        filled = [occupancy(kernel, result["multiprocessor"]) for kernel in kernels]
        rows.append([
            *key, f"{median(k['registers'] for k in kernels):.0f}",
            f"{median(k['shared_memory'] for k in kernels) / 1024:.1f}",
            f"{sum(k['spills'] > 0 for k in kernels) / len(kernels):.0%}",
            f"{median(filled):.0%}", f"{min(filled):.0%}",
        ])  # fmt: skip
    head = ["backend", "precision", "kernel", "registers", "shared KiB", "with spills",
            "occupancy", "least"]  # fmt: skip
    return f"Triton's kernels over the problems, medians:\n\n{markdown_table(head, rows)}"


def plots(result: Record, folder: Path) -> list[Path]:
    """The roofline of each precision, one file; a point a problem and pass."""
    from matplotlib.figure import Figure

    precisions = _precisions(result)
    figure = Figure((6 * len(precisions), 5), layout="constrained")
    panels = figure.subplots(1, len(precisions), squeeze=False)[0]
    for axes, precision in zip(panels, precisions, strict=True):
        _draw_roofline(axes, result, precision)
    panels[0].legend(fontsize="small")
    figure.suptitle(result["device"])
    return [save_picture(figure, result, "roofline", folder)]


def _draw_roofline(axes: Any, result: Record, precision: str) -> None:
    found = list(points(result, precision))
    for generation in GENERATIONS:
        for backward, marker in ((False, "o"), (True, "x")):
            chosen = [p for p in found if p[:2] == (generation, backward)]
            axes.scatter(
                [p[2] for p in chosen], [p[3] for p in chosen], s=9, marker=marker, alpha=0.5,
                color=COLORS[generation],
                label=f"{generation} {'backward' if backward else 'forward'}",
            )  # fmt: skip
    bandwidth, peak = result["ceilings"]["bandwidth"], result["ceilings"][precision]
    ends = 0.1, peak / bandwidth, 10_000
    axes.plot(ends, [min(x * bandwidth, peak) for x in ends], color="black")
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte", ylabel="FLOP/s", title=precision)


def _precisions(result: Record) -> list[str]:
    return [p for p in PRECISIONS if any(r["precision"] == p for r in result["results"])]
