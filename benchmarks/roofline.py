"""Work, traffic and occupancy of the three generations of kernels, and what the GPU allows."""

from collections import Counter
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

from improvement import groups
from measuring import Record, markdown_table, save_picture
from peers import GENERATIONS
from problem import PRECISIONS, Problem

COLORS = {"naive": "tab:red", "gemm": "tab:orange", "fused": "tab:blue", "dense": "tab:gray"}
PASSES = "forward", "backward"
BLOCKS = 32  # programs that a multiprocessor holds at most
ROOF = 0.3, 300_000  # FLOP a byte, where lines end; their labels are right of all points
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


def roof(ceilings: Record, precision: str, generation: str) -> float:
    """FLOP a second of the units that do a generation's products, as large products reach them.

    naive multiplies in fp32 without tensor cores, whatever the precision. gemm and fused do a
    product of fp32 by three of TF32.
    """
    if generation == "naive":
        return float(ceilings["float32"])
    return ceilings["tf32"] / 3 if precision == "float32" else float(ceilings[precision])


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


def points(
    records: list[Record], generation: str, backward: bool
) -> list[tuple[float, float, float]]:
    """FLOP a byte, FLOP a second and bytes a second of each record that has a time."""
    found = []
    for record in records:
        times = record.get("providers", {}).get(generation, {})
        if time := times.get(f"{PASSES[backward]}_us"):
            problem, precision = Problem.of(record), record["precision"]
            per_byte = intensity(problem, precision, generation, backward)
            rate = flops(problem, backward) / (time / 1e6)
            found.append((per_byte, rate, rate / per_byte))
    return found


def tables(result: Record) -> str:
    """Intensity, achieved rates, and what the compiler made of the kernels, in Markdown."""
    return "\n\n".join([
        "Arithmetic intensity, FLOP a byte: of the products, over the bytes that a formulation "
        "moves at least; median (least, most) over the problems:",
        _intensities(result),
        "Achieved rates, medians over the problems; each formulation by its own traffic. The last "
        "column: of what large products reach on the units in use, those of fp32 for naive, for "
        "gemm and fused tensor cores (in float32 a third of a TF32 product's rate):",
        _rates(result),
        _kernels(result),
    ])  # fmt: skip


def _intensities(result: Record) -> str:
    rows = []
    for backward, name in enumerate(PASSES):
        for precision, dims, records in groups(result):
            cells = []
            for generation in GENERATIONS:
                found = [
                    intensity(Problem.of(r), precision, generation, bool(backward)) for r in records
                ]
                cells.append(f"{median(found):.1f} ({min(found):.1f}, {max(found):.1f})")
            rows.append([name, precision, f"{dims}-D", len(records), *cells])
    return markdown_table(["pass", "precision", "axes", "problems", *GENERATIONS], rows)


def _rates(result: Record) -> str:
    rows = []
    ceilings = result["ceilings"]
    for precision in _precisions(result):
        for backward, name in enumerate(PASSES):
            for generation in GENERATIONS:
                found = points(_of(result, precision), generation, bool(backward))
                if not found:
                    continue
                per_byte, compute, memory = (median(v) for v in zip(*found, strict=True))
                rows.append([
                    precision, name, generation, len(found),
                    f"{per_byte:.1f}", f"{memory / 1e12:.2f} TB/s",
                    f"{memory / ceilings['bandwidth']:.0%}", f"{compute / 1e12:.1f} TFLOP/s",
                    f"{compute / roof(ceilings, precision, generation):.1%}",
                ])  # fmt: skip
    head = ["precision", "pass", "kernels", "problems", "FLOP a byte", "bandwidth",
            "of a copy's", "products", "of the units'"]  # fmt: skip
    return markdown_table(head, rows)


def launches(result: Record) -> list[int]:
    """How often each of the file's kernels is launched by a pass of each record."""
    found = Counter(chain.from_iterable(r.get("kernels", ()) for r in result["results"]))
    # Older files have a count a kernel, of all that was ever compiled.
    return [found[i] if found else k["count"] for i, k in enumerate(result.get("kernels", []))]


def _kernels(result: Record) -> str:
    found: dict[tuple[str, str, str], list[Record]] = {}
    for kernel, count in zip(result.get("kernels", []), launches(result), strict=True):
        if kernel["registers"] is not None and count:
            key = kernel["backend"], kernel["precision"], kernel["name"]
            found.setdefault(key, []).extend([kernel] * count)
    rows = []
    for key, kernels in sorted(found.items()):
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


def plots(result: Record, folder: Path) -> dict[str, Path]:
    """The roofline, a panel a precision and pass, a point a problem; the file by its caption."""
    from matplotlib.figure import Figure

    precisions = _precisions(result)
    figure = Figure((5 * len(precisions), 8), layout="constrained")
    panels = figure.subplots(2, len(precisions), squeeze=False, sharex=True, sharey=True)
    for backward, row in enumerate(panels):
        row[0].set_ylabel("FLOP/s")
        for axes, precision in zip(row, precisions, strict=True):
            count = _draw_points(axes, _of(result, precision), bool(backward))
            _draw_roofs(axes, result["ceilings"], precision)
            title = f"{precision}, {PASSES[backward]}, {count} problems"
            axes.set(xscale="log", yscale="log", title=title)
            axes.margins(y=0.08)
    for axes in panels[-1]:
        axes.set_xlabel("FLOP a byte")
    legend = figure.legend(
        *panels[0][0].get_legend_handles_labels(), loc="outside upper right", ncols=3
    )
    for handle in legend.legend_handles:
        handle.set(alpha=1, sizes=[25])
    figure.suptitle(f"{result['device']}; a point a problem")
    file = save_picture(figure, result, "roofline", folder)
    return {"Roofline: rates by arithmetic intensity": file}


def _draw_points(axes: Any, records: list[Record], backward: bool) -> int:
    """How many there are of fused."""
    for generation in GENERATIONS:
        found = points(records, generation, backward)
        axes.scatter(
            [x for x, *_ in found], [y for _, y, _ in found], s=7, alpha=0.25, linewidths=0,
            color=COLORS[generation], label=generation,
        )  # fmt: skip
    return len(found)


def _draw_roofs(axes: Any, ceilings: Record, precision: str) -> None:
    bandwidth = ceilings["bandwidth"]
    top, fma = (roof(ceilings, precision, generation) for generation in ("fused", "naive"))
    left, right = ROOF
    axes.plot([left, top / bandwidth, right], [left * bandwidth, top, top], "k", linewidth=1)
    axes.plot([fma / bandwidth, right], [fma, fma], color=COLORS["naive"], linewidth=1)
    words = "tensor cores" + (", 3 products" if precision == "float32" else "")
    for name, rate in ((words, top), ("fp32 units (naive)", fma)):
        text = f"{name}: {rate / 1e12:.0f} TFLOP/s"
        axes.text(right, 1.08 * rate, text, ha="right", va="bottom", fontsize="small")
    text = f"memory: {bandwidth / 1e12:.1f} TB/s"
    axes.text(0.02, 0.97, text, transform=axes.transAxes, va="top", fontsize="small")


def _of(result: Record, precision: str) -> list[Record]:
    return [r for r in result["results"] if r["precision"] == precision]


def _precisions(result: Record) -> list[str]:
    return [p for p in PRECISIONS if _of(result, p)]
