"""Pictures of the results of paper.py: how many times as fast one kernel is as another."""

from pathlib import Path
from typing import Any

from improvement import PASSES, groups, pairs
from measuring import Record, save_picture

PAIRS = [
    *(("fused", other) for other in ("naive", "gemm", "dense", "flex", "gathered")),
    ("gemm", "naive"),
]
COLORS = {1: "tab:blue", 2: "tab:orange", 3: "tab:green"}  # by the number of axes
WIDTH = 0.25  # of a box; pairs are 1 apart


def plots(result: Record, folder: Path) -> dict[str, Path]:
    """Box plots of the ratios of times, a panel a precision and pass; the file by its caption."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    precisions = list(dict.fromkeys(precision for precision, *_ in groups(result)))
    figure = Figure((5.5 * len(precisions), 8.5), layout="constrained")
    widths = [len(ratios(result, precision, PASSES[0])) for precision in precisions]
    panels = figure.subplots(
        2, len(precisions), squeeze=False, sharey=True, gridspec_kw={"width_ratios": widths}
    )
    for row, name in zip(panels, PASSES, strict=True):
        row[0].set_ylabel("times as fast")
        for axes, precision in zip(row, precisions, strict=True):
            _draw_boxes(axes, ratios(result, precision, name))
            axes.set_title(f"{precision}, {name}")
    patches = [Patch(facecolor=color, alpha=0.5) for color in COLORS.values()]
    figure.legend(patches, [f"{dims}-D" for dims in COLORS], loc="outside upper right", ncols=3)
    figure.suptitle(result["device"])
    figure.supxlabel(
        "Boxes: quartiles and median over the problems; whiskers: the least and the most; numbers: "
        "problems in 1-D, 2-D and 3-D",
        fontsize="medium",
    )
    return {"Times as fast as another kernel": save_picture(figure, result, "paper", folder)}


def ratios(result: Record, precision: str, name: str) -> dict[tuple[str, str], dict[int, Any]]:
    """Times of the old over those of the new, by pair and number of axes, where measured."""
    found: dict[tuple[str, str], dict[int, Any]] = {}
    for new, old in PAIRS:
        for group, dims, records in groups(result):
            times = pairs(records, new, old, name) if group == precision else []
            if times:
                found.setdefault((new, old), {})[dims] = [b / a for a, b in times]
    return found


def _draw_boxes(axes: Any, found: dict[tuple[str, str], dict[int, Any]]) -> None:
    labels = []
    for place, ((new, old), by_dims) in enumerate(found.items()):
        for dims, values in by_dims.items():
            box = axes.boxplot(
                [values], positions=[place + (dims - 2) * WIDTH], widths=0.8 * WIDTH,
                whis=(0, 100), patch_artist=True, medianprops={"color": "black"},
            )  # fmt: skip
            box["boxes"][0].set(facecolor=COLORS[dims], alpha=0.5)
        counts = ", ".join(str(len(values)) for values in by_dims.values())
        labels.append(f"{new}\nover\n{old}\n{counts}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(range(len(labels)), labels, fontsize="small")
    axes.axhline(1, color="black", linewidth=0.8, zorder=0)
