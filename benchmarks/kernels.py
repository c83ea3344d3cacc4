"""Times of the operator on every layer of the zoo, beside its peers and its memory's floor.

    PYTHONPATH=kernels python benchmarks/kernels.py kernels.json --commit COMMIT --only main
    PYTHONPATH=kernels python benchmarks/kernels.py kernels.json --commit COMMIT \
        --providers fused flex sdpa natten --limit-seconds 530

Needs a GPU, PyTorch and Triton. A run that reaches its limit is continued by the same command. Our
own kernels are measured anew for another commit, peers are not. Without a GPU,
`--draw kernels.json FOLDER` makes table and chart again.

Each provider is first checked against the reference backend in fp64. A pass, with the bias and the
bias's gradient or without them, is captured in a CUDA graph; a time is the median of graph replays
with a cold L2 cache. The floor is the bytes that must move at least (forward q, k, v, o; backward
q, k, v, o, do, dq, dk, dv) over the bandwidth of a large copy, measured in the same run. Peers get
their tensors in the layout that suits them, masks made before, and the fastest of their ways
counts.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from compiling import Ahead, Part, parts_of
from measuring import (
    Deadline,
    Record,
    Results,
    copy_bandwidth,
    describe_device,
    markdown_table,
    today,
)
from peers import GENERATIONS, PROVIDERS, Provider, measure
from problem import (
    PRECISIONS,
    Exact,
    Problem,
    Tensors,
    load_problems,
    random_tensors,
    use_precision,
)

IDENTITY = "map", "heads", "head_dim", "kernel_size", "dilation", "batch", "dtype", "provider"
MARGIN = 20  # seconds that a problem may take


def main() -> None:
    """Measure what is missing; print the table."""
    arguments = parse(sys.argv[1:])
    if arguments.draw:
        result = json.loads(arguments.output.read_text())
        print(tables(result))
        plots(result, arguments.draw)
        return
    deadline = Deadline(arguments.limit_seconds)
    with torch.cuda.stream(torch.cuda.Stream()):
        results = run(arguments, deadline)
    print(tables(results.content | {"results": results.records}))
    wrong = [r for r in results.records if r["provider"] in GENERATIONS and r["failures"]]
    sys.exit("\n".join(f"failed: {r}" for r in wrong))


def parse(words: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--commit", help="of the code that is measured")
    parser.add_argument("--only", nargs="+", help="main, or parts of names such as 56x56-k7")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=PRECISIONS)
    parser.add_argument("--providers", nargs="+", default=["fused"], choices=PROVIDERS)
    parser.add_argument("--limit-seconds", type=float, default=530)
    parser.add_argument("--draw", type=Path, metavar="FOLDER", help="measure nothing")
    arguments = parser.parse_args(words)
    if arguments.commit is None and arguments.draw is None:
        parser.error("--commit is required")
    return arguments


def run(arguments: argparse.Namespace, deadline: Deadline) -> Results:
    """Measure until all is done or the time is over."""
    description = describe_device() | {
        "commit": arguments.commit,
        "date": today(),
        "method": " ".join(__doc__.split("\n\n")[-1].split()),
    }
    results = Results(arguments.output, description, IDENTITY)
    work = list(missing(arguments, results))
    with Ahead(part for item in work for part in parts(item)) as compiled:
        bandwidth = copy_bandwidth()
        results.content["copy_bandwidth_tb_s"] = bandwidth / 1e12
        for number, (record, problem, provider) in enumerate(work):
            if deadline.left < MARGIN:
                print(f"time is over, {len(work) - number} measurements left: run this again")
                break
            try:
                for part in parts(work[number]):
                    compiled.wait(part, deadline)
            except TimeoutError:
                continue
            record |= floors(problem, record["dtype"], bandwidth)
            try:
                results.add(record | measure_passes(problem, provider, record["dtype"]))
            except RuntimeError as error:  # the next run shall not meet it again
                results.add(record | {"failures": {"GPU": str(error)[:200]}})
                raise
            print(line(results.find(record)), flush=True)
    return results


Work = tuple[Record, Problem, Provider]


def missing(arguments: argparse.Namespace, results: Results) -> Iterator[Work]:
    """What is not measured yet, in order."""
    for entry in load_problems("zoo"):
        problem = Problem.of(entry)
        chosen = arguments.only or [""]
        if not any(part in str(problem) or (part == "main" and entry["main"]) for part in chosen):
            continue
        for dtype in arguments.dtype:
            for name in arguments.providers:
                record = record_of(problem, dtype, name) | {"main": entry["main"]}
                before = results.find(record)
                again = before and name in GENERATIONS and before["commit"] != arguments.commit
                if before is None or again:
                    yield record, problem, PROVIDERS[name]


def record_of(problem: Problem, dtype: str, provider: str) -> Record:
    """What identifies a measurement."""
    square = {"kernel_size": problem.kernel_size[0], "dilation": problem.dilation[0]}
    return problem.record | square | {"dtype": dtype, "provider": provider}


def parts(work: Work) -> list[Part]:
    """What other processes compile."""
    record, problem, provider = work
    return [p for bias in (True, False) for p in parts_of(provider, problem, record["dtype"], bias)]


def measure_passes(problem: Problem, provider: Provider, precision: str) -> Record:
    """Times in microseconds, where they could be taken; why others could not."""
    dtype, tolerance = use_precision(precision), PRECISIONS[precision][2]
    with_bias = random_tensors(problem, dtype, True)
    record: Record = {"failures": {}, "ways": {}, "ranges_us": {}}
    for suffix, tensors in (("", with_bias), ("_without_rpb", with_bias._replace(rpb=None))):
        found = measure_bias(provider, problem, tensors, tolerance)
        record["failures"] |= {f"{k}{suffix}": v for k, v in found.pop("failures").items()}
        for name, entry in found.items():
            record[f"{name}{suffix}_us"] = entry["us"]
            record["ranges_us"][name + suffix] = entry["range"]
            record["ways"][name + suffix] = entry["way"]
            if name == "backward" and not suffix:
                record["relative_errors"] = entry["errors"]
    if provider.compiler == "torch":
        torch._dynamo.reset()
    torch.cuda.empty_cache()
    return record


def measure_bias(
    provider: Provider, problem: Problem, tensors: Tensors, tolerance: float
) -> Record:
    """With the bias that the tensors have, or without."""
    slack = 1 if provider.name == "fused" else 4  # others may round weights and the bias
    return measure(provider, problem, tensors, Exact(problem, tensors, slack * tolerance))


def floors(problem: Problem, precision: str, bandwidth: float) -> Record:
    """Microseconds that the memory's traffic takes at least."""
    size = PRECISIONS[precision][0].itemsize
    floor = 4 * problem.elements * size / bandwidth * 1e6
    return {"forward_floor_us": floor, "backward_floor_us": 2 * floor}


def line(record: Record) -> str:
    """A measurement in short."""
    words = [shape(record), record["dtype"], record["provider"]]
    for name in ("forward", "forward_without_rpb", "backward", "backward_without_rpb"):
        words.append(over_floor(record, name))
    failures = "; ".join(f"{k}: {v}" for k, v in record["failures"].items())
    return " | ".join(words) + (f" | {failures[:300]}" if failures else "")


def shape(record: Record) -> str:
    """Map, heads and window."""
    words = "x".join(map(str, record["map"])) + f", {record['heads']} heads, "
    words += f"{record['kernel_size']}x{record['kernel_size']}"
    return words + (f", dilation {record['dilation']}" if record["dilation"] > 1 else "")


def over_floor(record: Record, name: str) -> str:
    """A time, and how many floors it is."""
    if f"{name}_us" not in record:
        return "-"
    time, floor = record[f"{name}_us"], record[f"{name.split('_')[0]}_floor_us"]
    return f"{time:.0f} ({time / floor:.1f}x)"


def tables(result: Record) -> str:
    """A table a dtype and pass, in Markdown."""
    parts = [
        f"{result['device']}, torch {result['versions']['torch']}, Triton "
        f"{result['versions']['triton']}; microseconds (times the floor), with bias unless said"
    ]
    for dtype in dict.fromkeys(r["dtype"] for r in result["results"]):
        records = [r for r in result["results"] if r["dtype"] == dtype]
        for name in ("forward", "backward"):
            columns = present_columns(records, name)
            rows = [
                [title, f"{floor:.0f}", *(over_floor(row.get(p, {}), c) for p, c in columns)]
                for title, floor, row in by_shape(records, name)
            ]
            heads = [p + (", no bias" if "without" in c else "") for p, c in columns]
            head = [f"{dtype} {name}", "floor", *heads]
            parts.append(markdown_table(head, rows))
    return "\n\n".join(parts)


def by_shape(records: list[Record], name: str) -> Iterator[tuple[str, float, dict[str, Record]]]:
    """Title, floor, and measurement by provider of each shape."""
    for title in dict.fromkeys(map(shape, records)):
        row = {r["provider"]: r for r in records if shape(r) == title}
        yield title, next(iter(row.values()))[f"{name}_floor_us"], row


def present_columns(records: list[Record], name: str) -> list[tuple[str, str]]:
    """Provider and measurement, where there is one."""
    return [
        (provider, column)
        for provider in dict.fromkeys(r["provider"] for r in records)
        for column in (name, f"{name}_without_rpb")
        if any(r["provider"] == provider and f"{column}_us" in r for r in records)
    ]


def plots(result: Record, folder: Path) -> list[Path]:
    """A bar chart of times over the floor, a dtype each; the files."""
    from matplotlib.figure import Figure

    files = []
    for dtype in dict.fromkeys(r["dtype"] for r in result["results"]):
        records = [r for r in result["results"] if r["dtype"] == dtype]
        titles = list(dict.fromkeys(map(shape, records)))
        figure = Figure((14, 2 + 0.32 * len(titles)), layout="constrained")
        for axes, name in zip(
            figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True
        ):
            draw_bars(axes, records, name)
            axes.set_title(name)
            axes.set_xlabel("time over the memory's floor")
            axes.set_xscale("log")
            axes.margins(y=0.01)
            axes.axvline(1, color="black", linewidth=0.8)
        axes.legend(fontsize="small", loc="lower right")
        figure.axes[0].set_yticks(range(len(titles)), titles, fontsize="small")
        figure.axes[0].invert_yaxis()
        figure.suptitle(f"{result['device']}, {dtype}, batch {records[0]['batch']}")
        files.append(folder / f"kernels-{dtype}.png")
        figure.savefig(files[-1], dpi=110)
    return files


def draw_bars(axes: Any, records: list[Record], name: str) -> None:
    """A group of bars a shape."""
    columns = [c for c in present_columns(records, name) if c[0] == "natten" or c[1] == name]
    height = 0.8 / max(1, len(columns))
    for place, (provider, column) in enumerate(columns):
        points = [
            (number - 0.4 + (place + 0.5) * height, row[provider][f"{column}_us"] / floor)
            for number, (_, floor, row) in enumerate(by_shape(records, name))
            if f"{column}_us" in row.get(provider, {})
        ]
        label = provider + (" (no bias)" if column != name else "")
        axes.barh([y for y, _ in points], [x for _, x in points], height, label=label)


if __name__ == "__main__":
    main()
