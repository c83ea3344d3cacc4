"""The results of paper.py on single problems: all layers of the zoo, and where fused is slower."""

from collections.abc import Iterator

from improvement import NOISE, PASSES, pairs, time_of
from measuring import Record, markdown_table
from peers import GENERATIONS
from problem import PRECISIONS, Problem, load_problems

OTHERS = "naive", "gemm"


def layers() -> dict[Problem, bool]:
    """The zoo's problems, and whether they are to be measured in TF32 too."""
    return {Problem.of(e): e["tf32"] for e in load_problems("paper") if e["zoo"]}


def tables(result: Record) -> str:
    """In Markdown."""
    return "\n\n".join([every_layer(result), not_measured(result), slower(result)])


def every_layer(result: Record) -> str:
    """Times on every layer that is measured."""
    zoo = layers()
    found = [r for r in result["results"] if Problem.of(r) in zoo]
    order = *zoo, *PRECISIONS
    found.sort(key=lambda r: (order.index(Problem.of(r)), order.index(r["precision"])))
    rows = [row for record in found for row in _layer_rows(record)]
    slow = sum(any(loses(r, other, name) for other in OTHERS) for r in found for name in PASSES)
    count = len({Problem.of(r) for r in found})
    title = (
        f"Layers of the zoo, {count} of {len(zoo)}, with as many images (B) as can be measured; "
        f"microseconds, and times that fused is as fast. Fused is slower in {slow} of {len(rows)} "
        "rows (bold):\n\n"
    )
    heads = [f"over {other}" for other in OTHERS]
    return title + markdown_table(["layer", "precision", "pass", *GENERATIONS, *heads], rows)


def _layer_rows(record: Record) -> Iterator[list[str]]:
    for name in PASSES:
        times = {p: time_of(record, p, name) for p in GENERATIONS}
        cells = ["-" if time is None else f"{time:.0f}" for time in times.values()]
        ratios = [pairs([record], "fused", other, name) for other in OTHERS]
        cells += [_ratio(*found[0]) if found else "-" for found in ratios]
        yield [str(Problem.of(record)), record["precision"], name, *cells]


def _ratio(ours: float, theirs: float) -> str:
    """Bold where fused is slower."""
    ratio = f"{theirs / ours:.2f}"
    return f"**{ratio}**" if is_slower(ours, theirs) else ratio


def not_measured(result: Record) -> str:
    """The layers of the zoo without a time of each kernel, by precision."""
    measured = {
        (Problem.of(r), r["precision"])
        for r in result["results"]
        if all(time_of(r, p, PASSES[-1]) is not None for p in GENERATIONS)
    }
    precisions = {r["precision"] for r in result["results"]}
    lines = []
    for precision in (p for p in PRECISIONS if p in precisions):
        due = [p for p, has_tf32 in layers().items() if precision != "tf32" or has_tf32]
        names = [str(p) for p in due if (p, precision) not in measured]
        if names:
            lines.append(f"- {precision}: {len(names)} of {len(due)}: {', '.join(names)}")
    if not lines:
        return "All layers of the zoo are measured, in TF32 those that are to be."
    return "\n".join(["Layers of the zoo that are not measured, of those that are to be:", *lines])


def slower(result: Record) -> str:
    """The other problems on which fused is slower than another generation."""
    zoo = layers()
    rows = []
    for record in result["results"]:
        for name in PASSES if Problem.of(record) not in zoo else ():
            for other in OTHERS:
                for ours, theirs in pairs([record], "fused", other, name):
                    if is_slower(ours, theirs):
                        cells = f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}"
                        problem = str(Problem.of(record))
                        rows.append([problem, record["precision"], name, other, *cells])
    rows.sort(key=lambda row: -float(row[-1]))
    title = f"Of the other problems fused is slower in {len(rows)} cases, the 30 worst:\n\n"
    head = ["problem", "precision", "pass", "than", "fused us", "us", "ratio"]
    return title + markdown_table(head, rows[:30])


def loses(record: Record, other: str, name: str) -> bool:
    """Whether fused is slower."""
    return any(is_slower(*times) for times in pairs([record], "fused", other, name))


def is_slower(ours: float, theirs: float) -> bool:
    """By more than noise."""
    return ours > NOISE * theirs
