"""Tables and pictures of training on several GPUs, from the results of scaling.py."""

import statistics

from matplotlib.figure import Figure
from measuring import Record, markdown_table


def tables(result: Record) -> str:
    """Throughput, and losses compared with those of one GPU; Markdown."""
    versions = result["versions"]
    parts = [f"{result['device']}, torch {versions['torch']}, NCCL {result['nccl']}"]
    if table := throughput(result):
        parts.append(table)
    rows = [_loss_row(result, r) for r in result["results"] if "losses" in r]
    if rows:
        head = ["run", "GPUs", "precision", "steps", "last loss", "largest difference"]
        parts.append(markdown_table(head, rows))
    return "\n\n".join(parts)


def throughput(result: Record) -> str:
    """Images a second of all ways to train, beside one GPU; Markdown, empty if none is measured."""
    on_device = speeds(result)
    rows = []
    for part, note in (("throughput", ""), ("loader", ", through the loader")):
        for (model, strategy), by_gpus in speeds(result, part).items():
            one = on_device.get((model, "auto"), {}).get(1)
            for gpus, speed in sorted(by_gpus.items()):
                cells = [model + note, strategy if gpus > 1 else "-", gpus, f"{speed:,.0f}"]
                rows.append([*cells, f"{speed / one:.2f}x" if one else "-"])
    head = ["model", "strategy", "GPUs", "images/s", "of one GPU"]
    return markdown_table(head, rows) if rows else ""


def figures(result: Record) -> dict[str, Figure]:
    """Efficiency, images a second of a GPU against those of one alone, by the number of GPUs."""
    found = speeds(result)
    curves = {}
    for (model, strategy), by_gpus in found.items():
        one = found.get((model, "auto"), {}).get(1)
        if strategy != "auto" and one:
            shares = {n: 100 * by_gpus[n] / n / one for n in sorted(by_gpus)}
            curves[model, strategy] = {1: 100.0, **shares}
    if not curves:
        return {}
    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axhline(100, color="0.8", zorder=0)
    for (model, strategy), shares in curves.items():
        style = "--" if strategy == "fsdp2" else "-"
        axes.plot([*shares], [*shares.values()], style, marker="o", label=f"{model}, {strategy}")
    axes.set(xscale="log", xlabel="GPUs", ylabel="efficiency (%)", ylim=(0, 110))
    axes.set_title(f"Weak scaling of training, {result['device']}")
    ticks = sorted({gpus for shares in curves.values() for gpus in shares})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize="small")
    return {"efficiency": figure}


def speeds(result: Record, part: str = "throughput") -> dict[tuple[str, str], dict[int, float]]:
    """Images a second by (model and options, strategy) and number of GPUs; median of all turns."""
    turns: dict[tuple[str, str, int], list[float]] = {}
    for record in result["results"]:
        case = record["case"]
        if case["part"] == part:
            options = [f"batch {case['batch']}", f"{case['size']} pixels", *case["set"]]
            key = ", ".join([case["model"], *options]), case["strategy"], case["gpus"]
            turns.setdefault(key, []).append(record["images_per_second"])
    found: dict[tuple[str, str], dict[int, float]] = {}
    for (model, strategy, gpus), values in turns.items():
        found.setdefault((model, strategy), {})[gpus] = statistics.median(values)
    return found


def gap(result: Record, record: Record) -> float | None:
    """Largest difference of a run's losses from those of one GPU in one piece, if there are any.

    That of the same options, else that of the defaults.
    """
    whole = {"part": "loss", "gpus": 1, "strategy": "auto", "micro_batches": 1}
    wanted = {k: v for k, v in {**record["case"], **whole}.items() if k != "onto"}
    choices = [{**wanted, "set": options} for options in (wanted["set"], [])]
    found = (r["losses"] for case in choices for r in result["results"] if r["case"] == case)
    alone = next(found, None)
    if alone is None:
        return None
    return max(abs(loss - alone[step]) for step, loss in record["losses"].items())


def _loss_row(result: Record, record: Record) -> list[object]:
    case, losses = record["case"], record["losses"]
    name = case["strategy"]
    if case["part"] == "resume":
        name = f"fsdp2, continued on {case['onto']}"
    elif case["gpus"] == 1:
        name = f"one GPU, {case['micro_batches']} micro-batches"
    name = ", ".join([name, *case["set"]])
    last = losses[max(losses, key=int)]
    found = gap(result, record)
    difference = "-" if found is None else f"{found:.1e}"
    return [name, case["gpus"], case["precision"], len(losses), f"{last:.4f}", difference]
