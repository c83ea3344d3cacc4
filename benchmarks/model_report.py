"""Tables and pictures of whole models, from the results of models.py."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from measuring import Record, markdown_table
from models import GENERATIONS, TINY

from nat_models.verify_weights import PUBLISHED_TOP1

# Percent of ImageNet-1k's validation images, at the model's own size, by the authors' tables:
# github.com/microsoft/Swin-Transformer and github.com/facebookresearch/ConvNeXt; the large ones
# pretrained on ImageNet-22k, as ours are.
PEERS_TOP1 = {
    "swin_tiny_patch4_window7_224": 81.2,
    "swin_small_patch4_window7_224": 83.2,
    "swin_base_patch4_window7_224": 83.5,
    "swin_large_patch4_window7_224": 86.3,
    "swin_large_patch4_window12_384": 87.3,
    "convnext_tiny": 82.1,
    "convnext_small": 83.1,
    "convnext_base": 83.8,
    "convnext_large": 86.6,
    "convnext_large.fb_in22k_ft_in1k_384": 87.5,
}
TOP1 = PUBLISHED_TOP1 | PEERS_TOP1
ROUGH = 0.1  # spread of rounds beyond which a figure is marked
EXECUTIONS = {
    "eager": "eager",
    "captured": "captured by hand",
    "compiled": "compiled",
    "cuda_graphs": "compiled, CUDA graphs",
    "captured_compiled": "compiled, captured by hand",
}
COLORS = {"ours": "#c8501e", "peers": "#5b6770"}
COMPONENT_COLORS = {
    "attention": "#c8501e",
    "matrix products": "#2f6690",
    "convolution": "#81b29a",
    "normalization": "#e0b34c",
    "activation": "#8e6c8a",
    "copies": "#b0a8a0",
    "optimizer": "#33415c",
    "other": "#5b6770",
    "idle": "#e8e4df",
}


def tables(result: Record) -> str:
    """All that was measured, and the generations of kernels against each other; Markdown."""
    parts = [_source(result), everything(result)]
    if rows := [*_generation_rows(result)]:
        head = ["model", "step", *GENERATIONS, "gemm over naive", "fused over naive",
                "fused over gemm"]  # fmt: skip
        parts += ["Images a second, and improvements of one generation of kernels over another:",
                  markdown_table(head, rows)]  # fmt: skip
    return "\n\n".join(parts)


def everything(result: Record) -> str:
    """A line a case."""
    head = ["model", "top-1", "step", "execution", "attention", "precision", "batch", "pixels",
            "img/s", "spread", "p50 ms", "p95 ms", "GiB", "MFU", "attention's share"]  # fmt: skip
    return markdown_table(head, [_row(r) for r in result["results"]])


def summary(result: Record, models: Sequence[str] = TINY) -> str:
    """Speed at 224 pixels and memory of the compiled, a column a model, and what there is not.

    Each row is a condition that was measured for ours and for a peer, if any peer was.
    """
    records = [
        r
        for r in result["results"]
        if r["model"] in models
        and r["execution"] != "captured"
        and r.get("attention_backend") in (None, "fused")
        and r["input_size"][-1] == 224
    ]
    records.sort(key=lambda r: (r["pass"], -r["batch_size"]))
    conditions: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in records:
        condition = r["pass"], r["execution"], r["precision"], r["batch_size"]
        conditions.setdefault(condition, {})[r["model"]] = r
    shown = sorted({r["model"] for r in records}, key=lambda m: (m not in PUBLISHED_TOP1, m))
    if any(model in PEERS_TOP1 for model in shown):
        conditions = {c: found for c, found in conditions.items() if set(found) & set(PEERS_TOP1)}

    def row(label: str, value: Callable[[Record], str], found: dict[str, Record]) -> list[str]:
        mark = " \\*" if len({*map(_run, found.values())}) > 1 else ""
        cells = [
            "-" if m not in found
            else _is_rough(found[m]) * "~" + value(found[m]) if found[m]["status"] == "ok"
            else found[m]["status"].partition(":")[0]
            for m in shown
        ]  # fmt: skip
        return [label + mark, *cells]

    rows = [["top-1, %", *(TOP1.get(m, "-") for m in shown)]]
    for (kind, execution, precision, batch_size), found in conditions.items():
        label = _condition(kind, execution, precision, batch_size)
        if batch_size == 1:
            rows.append(row(f"{label}: ms", lambda r: f"{r['latency_ms']['p50']:.2f}", found))
            continue
        rows.append(row(f"{label}: img/s", lambda r: f"{r['images_per_second']:,.0f}", found))
        if execution == "compiled":
            rows.append(row(f"{label}: peak GiB", _gib, found))
    notes = [_runs(conditions.values())] if conditions else []
    if any(_is_rough(r) for found in conditions.values() for r in found.values()):
        notes.append(f"~: its rounds differ by more than {ROUGH:.0%}.")
    if missing := [f"`{model}`" for model in models if model not in shown]:
        notes.append(f"Not measured: {', '.join(missing)}.")
    return "\n\n".join([markdown_table(["", *(f"`{m}`" for m in shown)], rows), *notes])


def _is_rough(record: Record) -> bool:
    return bool(record.get("spread", 0) > ROUGH)


def _run(record: Record) -> tuple[Any, ...]:
    """What tells runs apart."""
    return record.get("run"), record.get("date"), record.get("commit")


def _runs(rows: Iterable[dict[str, Record]]) -> str:
    """What was measured in one run."""
    runs = [{*map(_run, found.values())} for found in rows]
    if len(set().union(*runs)) == 1:
        return "All in one run."
    if max(map(len, runs)) == 1:
        return "Each row in one run."
    return "\\*: of several runs; each other row in one."


def figures(result: Record) -> dict[str, Figure]:
    """Pictures by name; those that the results have nothing for are left out."""
    drawn = {
        "accuracy and throughput": accuracy_throughput(result),
        "where the time goes": components(result),
        "fused over naive and gemm": speed_ups(result),
    }
    found = {name: figure for name, figure in drawn.items() if figure is not None}
    for figure in found.values():
        figure.suptitle(result["device"], fontsize=12)
    return found


def accuracy_throughput(result: Record) -> Figure | None:
    """Published accuracy over the images a second of each model's fastest execution, with peers."""
    records = [
        r
        for r in _ok(result)
        if r["model"] in TOP1
        and r["batch_size"] > 1
        and r.get("attention_backend") in (None, "fused")
    ]
    compared = {(r["pass"], r["precision"]) for r in records if r["model"] in PEERS_TOP1}
    records = [r for r in records if (r["pass"], r["precision"]) in compared]
    figure, panels = _panels(records, lambda r: (r["pass"], r["precision"]))
    for (kind, precision), axes, found in panels:
        fastest: dict[str, Record] = {}
        labels: list[tuple[float, float, str, str]] = []
        for r in sorted(found, key=lambda r: r["images_per_second"]):
            fastest[r["model"]] = r
        for model, r in fastest.items():
            ours = "ours" if model in PUBLISHED_TOP1 else "peers"
            tip = (
                f"{model}: {r['images_per_second']:,.0f} img/s, {TOP1[model]} %, "
                f"{EXECUTIONS[r['execution']]}, batch {r['batch_size']}"
            )
            [point] = axes.plot(r["images_per_second"], TOP1[model], "o", color=COLORS[ours])
            point.set_gid(f"tip:{tip}")
            name, side = model.split("_patch")[0].split(".")[0], str(r["input_size"][-1])
            name += "" if side == "224" or side in name else f" {side}"
            labels.append((r["images_per_second"], TOP1[model], name, COLORS[ours]))
        axes.set_title(f"{kind}, {precision}", fontsize=11)
        axes.set_xlabel("images a second, fastest execution")
        axes.set_ylabel("top-1 on ImageNet-1k, published, %")
        axes.margins(0.25)
        axes.set_xlim(0, 1.25 * max(r["images_per_second"] for r in found))
        axes.grid(alpha=0.3)
        annotate(axes, labels)
    return figure


def annotate(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write each point's name (x, y, name, color) beside it, where it hides no point or name."""
    figure = cast(Figure, axes.get_figure())
    FigureCanvasAgg(figure).draw()  # settles the layout, and with it the pixels of the points
    points = axes.transData.transform([label[:2] for label in labels])
    around = [Bbox.from_extents(x - 10, y - 10, x + 10, y + 10) for x, y in points]
    frame, taken = axes.get_window_extent(), []
    for number, (x, y, name, color) in enumerate(labels):
        others = [*around[:number], *around[number + 1 :], *taken]
        for place in ((0, 7), (0, -15), (8, -3), (-8, -3), (8, 10), (-8, 10), (8, -16), (-8, -16)):
            side = "center" if place[0] == 0 else "left" if place[0] > 0 else "right"
            text = axes.annotate(
                name, (x, y), xytext=place, ha=side, textcoords="offset points", fontsize=8,
                color=color,
            )  # fmt: skip
            box = text.get_window_extent()
            if box.count_overlaps(others) == 0 and frame.x0 < box.x0 and box.x1 < frame.x1:
                break
            text.remove()
        else:  # a name that might be another's is worse than none
            continue
        taken.append(box)


def components(result: Record) -> Figure | None:
    """Milliseconds of a step on the GPU by part of the model, and idle."""
    records = [
        r
        for r in _ok(result)
        if "component_ms" in r and r.get("attention_backend") in (None, *GENERATIONS)
    ]
    figure, panels = _panels(records, lambda r: (r["pass"], r["batch_size"], r["precision"]), 0.32)
    for (kind, batch_size, precision), axes, found in panels:
        labels = [_label(r) for r in found]
        left = [0.0] * len(found)
        for name, color in COMPONENT_COLORS.items():
            widths = [_component(r, name) for r in found]
            bars = axes.barh(labels, widths, left=left, color=color, label=name)
            for bar, label, width in zip(bars, labels, widths, strict=True):
                bar.set_gid(f"tip:{label}: {name} {width:.2f} ms")
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set_title(f"{kind}, batch {batch_size}, {precision}", fontsize=11)
        axes.set_xlabel("ms a step")
    if figure is not None:
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=9)
    return figure


def speed_ups(result: Record) -> Figure | None:
    """How many times as fast a model is on the fused kernels."""
    found = [(key, speeds) for key, speeds in _generations(result) if "fused" in speeds]
    records = [{"key": key, "speeds": speeds} for key, speeds in found]
    figure, panels = _panels(records, lambda r: r["key"][1:], 0.4)
    for condition, axes, rows in panels:
        names = [r["key"][0] for r in rows]
        for offset, other, color in ((-0.2, "naive", "#c8501e"), (0.2, "gemm", "#2f6690")):
            ratios = [r["speeds"]["fused"] / r["speeds"].get(other, float("nan")) for r in rows]
            places = [i + offset for i in range(len(rows))]
            bars = axes.barh(places, ratios, 0.38, color=color, label=f"over {other}")
            for bar, name, ratio in zip(bars, names, ratios, strict=True):
                bar.set_gid(f"tip:{name}: fused is {ratio:.2f} times as fast as {other}")
        axes.set_yticks(range(len(rows)), names)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(_condition(*condition), fontsize=11)
        axes.set_xlabel("times as fast on the fused kernels")
    if figure is not None:
        handles, names = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def _generations(result: Record) -> Iterator[tuple[tuple[Any, ...], dict[str, float]]]:
    """Images a second by backend, of models that more than one was measured of in one run."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for r in _ok(result):
        if r.get("attention_backend") in GENERATIONS:
            key = r["model"], r["pass"], r["execution"], r["precision"], r["batch_size"]
            run = _run(r), r["input_size"][-1]
            found.setdefault((*key, *run), {})[r["attention_backend"]] = r["images_per_second"]
    for (*key, _, _), speeds in found.items():
        if len(speeds) > 1:
            yield tuple(key), speeds


def _generation_rows(result: Record) -> Iterator[list[str]]:
    for (model, *condition), speeds in _generations(result):
        pairs = [("gemm", "naive"), ("fused", "naive"), ("fused", "gemm")]
        yield [
            f"`{model}`",
            _condition(*condition),
            *(f"{speeds[name]:,.0f}" if name in speeds else "-" for name in GENERATIONS),
            *(
                f"{100 * (speeds[new] / speeds[old] - 1):+.0f} %"
                if {new, old} <= speeds.keys()
                else "-"
                for new, old in pairs
            ),
        ]


def _panels(
    records: Sequence[Record], condition: Callable[[Record], Any], inches_a_row: float = 0.0
) -> tuple[Figure | None, list[tuple[Any, Axes, list[Record]]]]:
    """A figure with a panel for each condition, and what belongs there; no figure of nothing."""
    groups: dict[Any, list[Record]] = {}
    for r in records:
        groups.setdefault(condition(r), []).append(r)
    if not groups:
        return None, []
    columns = min(2, len(groups))
    lines = [[*groups.values()][i : i + columns] for i in range(0, len(groups), columns)]
    heights = [max(3.6, 1.0 + inches_a_row * max(map(len, line))) for line in lines]
    figure = Figure((6.4 * columns, sum(heights) + 0.4), layout="constrained")
    axes = [*figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights).flat]
    for unused in axes[len(groups) :]:
        unused.remove()
    return figure, [(key, a, members) for (key, members), a in zip(groups.items(), axes)]  # noqa: B905


def _ok(result: Record) -> list[Record]:
    return [r for r in result["results"] if r["status"] == "ok"]


def _condition(kind: str, execution: str, precision: str, batch_size: int) -> str:
    return f"{kind}, {EXECUTIONS[execution]}, {precision}, batch {batch_size}"


def _label(r: Record) -> str:
    backend = r.get("attention_backend")
    name = r["model"].split("_patch")[0] + (f" {backend}" if backend else "")
    return f"{name}, {r['execution'].replace('_', ' ')}"


def _component(r: Record, name: str) -> float:
    if name != "idle":
        return float(r["component_ms"].get(name, 0.0))
    step = 1e3 * r["batch_size"] / r["images_per_second"]
    return max(0.0, step - sum(r["component_ms"].values()))


def _row(r: Record) -> list[Any]:
    top1, side = TOP1.get(r["model"], "-"), r["input_size"][-1]
    case = [f"`{r['model']}`", top1, r["pass"], EXECUTIONS[r["execution"]]]
    case += [r.get("attention_backend") or "-", r["precision"], r["batch_size"], side]
    if r["status"] != "ok":
        return [*case, r["status"], *["-"] * 6]
    latency = r.get("latency_ms", {})
    return [
        *case,
        f"{r['images_per_second']:,.0f}",
        _percent(r["spread"], 1),
        *(f"{latency[q]:.2f}" if q in latency else "-" for q in ("p50", "p95")),
        _gib(r),
        _percent(r.get("mfu")),
        _percent(r.get("attention_share")),
    ]


def _gib(r: Record) -> str:
    peak = r.get("peak_memory_mib")
    return "-" if peak is None else f"{peak / 1024:.1f}"


def _percent(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}%}"


def _source(result: Record) -> str:
    versions = result["versions"]
    return (
        f"{result['device']}, torch {versions['torch']}, Triton {versions['triton']}, "
        f"timm {versions['timm']}, {result['date'][:10]}; channels_last, random images and "
        + " ".join(filter(None, ["weights.", result.get("method"), result.get("note")]))
    )
