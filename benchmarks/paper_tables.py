"""The paper's tables from the results of paper.py: who matches whom, and by how much it improves.

An improvement is t_old / t_new - 1, in percent, as in "Faster Neighborhood Attention" (arXiv
2403.04690); a problem is matched where the time is at most 1 % longer, less than a run's noise.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, median

from measuring import Record, markdown_table, save_picture
from peers import GENERATIONS
from problem import PRECISIONS, Problem

NOISE = 1.01
PASSES = "forward", "forward and backward"
PAIRS = [("gemm", "naive"), ("fused", "naive"), ("fused", "gemm")]
# Average improvements of the paper's table 3, percent: forward on an A100, by the pairs above.
PAPER = {
    ("float16", 1): (548, 1759, 180),
    ("float16", 2): (193, 958, 257),
    ("float16", 3): (None, 1135, None),
    ("float32", 1): (874, 978, 17),
    ("float32", 2): (386, 564, 43),
    ("float32", 3): (None, 712, None),
}
PROVIDERS = *GENERATIONS, "dense", "flex", "gathered"


def time_of(record: Record, provider: str, name: str) -> float | None:
    """Microseconds of a pass, or of both."""
    times = record.get("providers", {}).get(provider, {})
    parts = [times.get(f"{part}_us") for part in name.split(" and ")]
    return None if None in parts else sum(parts)


def pairs(records: Sequence[Record], new: str, old: str, name: str) -> list[tuple[float, float]]:
    """Times of both, where both were measured."""
    times = [(time_of(r, new, name), time_of(r, old, name)) for r in records]
    return [(a, b) for a, b in times if a is not None and b is not None]


def improvements(records: Sequence[Record], new: str, old: str, name: str) -> list[float]:
    """In percent."""
    return [100 * (b / a - 1) for a, b in pairs(records, new, old, name)]


def matched(records: Sequence[Record], new: str, old: str, name: str) -> str:
    """Share of problems that `new` matches or beats."""
    times = pairs(records, new, old, name)
    return f"{sum(a <= NOISE * b for a, b in times) / len(times):.1%}" if times else "-"


def groups(result: Record) -> Iterator[tuple[str, int, list[Record]]]:
    """Records by precision and number of axes."""
    for precision in PRECISIONS:
        for dims in (1, 2, 3):
            records = [
                r
                for r in result["results"]
                if r["precision"] == precision and len(r["map"]) == dims
            ]
            if records:
                yield precision, dims, records


def tables(result: Record) -> str:
    """All tables, in Markdown."""
    versions = result["versions"]
    return "\n\n".join([
        f"{result['device']}, torch {versions['torch']}, Triton {versions['triton']}; "
        f"{len(result['results'])} problems and precisions.",
        "Improvement of one kernel over another, average (least, most):",
        breakdown(result),
        "Average improvements beside those of the paper's table 3, which are of an A100 and of "
        "CUDA kernels; forward:",
        beside_paper(result),
        "Share of problems, each in its row, that the kernel matches or beats:",
        shares(result),
        "The same function by PyTorch's compiler, half precision; improvement of fused:",
        compiled(result),
        slower(result),
        failures(result),
    ])  # fmt: skip


def breakdown(result: Record) -> str:
    """Average, least and largest improvements."""
    rows = [
        [name, precision, f"{dims}-D", len(records), *(summary(records, *p, name) for p in PAIRS)]
        for name in PASSES
        for precision, dims, records in groups(result)
    ]
    heads = [f"{new} over {old}" for new, old in PAIRS]
    return markdown_table(["pass", "precision", "axes", "problems", *heads], rows)


def summary(records: Sequence[Record], new: str, old: str, name: str) -> str:
    """Average, and the extremes."""
    found = improvements(records, new, old, name)
    return f"{mean(found):.0f} % ({min(found):.0f}, {max(found):.0f})" if found else "-"


def beside_paper(result: Record) -> str:
    """Averages and the paper's."""
    rows = []
    for precision, dims, records in groups(result):
        if (precision, dims) in PAPER:
            cells = []
            for pair, theirs in zip(PAIRS, PAPER[precision, dims], strict=True):
                found = improvements(records, *pair, "forward")
                cells += [f"{mean(found):.0f} %" if found else "-"]
                cells += ["-" if theirs is None else f"{theirs} %"]
            rows.append([precision, f"{dims}-D", *cells])
    heads = [
        head
        for new, old in PAIRS
        for head in (f"{new} over {old}, {result['device']}", "paper, A100")
    ]
    return markdown_table(["precision", "axes", *heads], rows)


def shares(result: Record) -> str:
    """For each kernel and each other."""
    others = *GENERATIONS, "dense"
    rows = [
        [name, precision, f"{dims}-D", kernel,
         *("" if kernel == other else matched(records, kernel, other, name) for other in others)]
        for name in PASSES
        for precision, dims, records in groups(result)
        for kernel in others
    ]  # fmt: skip
    return markdown_table(["pass", "precision", "axes", "kernel", *others], rows)


def compiled(result: Record) -> str:
    """Fused over the providers of the subset."""
    rows = []
    for name in PASSES:
        for precision, dims, records in groups(result):
            for other in ("flex", "gathered"):
                found = improvements(records, "fused", other, name)
                if found:
                    share = matched(records, "fused", other, name)
                    cells = summary(records, "fused", other, name), f"{median(found):.0f} %", share
                    rows.append([name, precision, f"{dims}-D", len(found), other, *cells])
    head = ["pass", "precision", "axes", "problems", "over", "average", "median", "matched"]
    return markdown_table(head, rows)


def slower(result: Record) -> str:
    """The problems on which fused is slower than another generation."""
    rows = []
    for record in result["results"]:
        for name in PASSES:
            for other in ("naive", "gemm"):
                for ours, theirs in pairs([record], "fused", other, name):
                    if ours > NOISE * theirs:
                        cells = f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}"
                        problem = str(Problem.of(record))
                        rows.append([problem, record["precision"], name, other, *cells])
    rows.sort(key=lambda row: -float(row[-1]))
    title = f"Fused is slower in {len(rows)} cases, the 30 worst:\n\n"
    head = ["problem", "precision", "pass", "than", "fused us", "us", "ratio"]
    return title + markdown_table(head, rows[:30])


def failures(result: Record) -> str:
    """What could not be measured."""
    found = [
        f"- {Problem.of(r)} {r['precision']}: {name}: {reason}"
        for r in result["results"]
        for name, reason in r["failures"].items()
    ]
    return "\n".join([f"Measurements that failed: {len(found)}", *found[:30]])


def plots(result: Record, folder: Path) -> list[Path]:
    """Box plots of the ratios of times, a panel a precision."""
    from matplotlib.figure import Figure

    precisions = list(dict.fromkeys(precision for precision, *_ in groups(result)))
    others = [("fused", p) for p in PROVIDERS if p != "fused"] + [("gemm", "naive")]
    figure = Figure((5.5 * len(precisions), 8), layout="constrained")
    panels = figure.subplots(2, len(precisions), squeeze=False, sharey=True)
    for row, name in zip(panels, PASSES, strict=True):
        for axes, precision in zip(row, precisions, strict=True):
            boxes = {
                f"{new} over {old}\n{dims}-D": [b / a for a, b in pairs(records, new, old, name)]
                for new, old in others
                for p, dims, records in groups(result)
                if p == precision
            }
            boxes = {label: ratios for label, ratios in boxes.items() if ratios}
            axes.boxplot(boxes.values(), whis=(0, 100))
            axes.set_xticks(range(1, len(boxes) + 1), list(boxes), rotation=90, fontsize="small")
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set(yscale="log", title=f"{precision}, {name}", ylabel="times as fast")
    figure.suptitle(result["device"])
    return [save_picture(figure, result, "paper", folder)]
