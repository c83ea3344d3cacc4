"""Times of the operator on every layer of the zoo, beside its peers and its memory's floor.

    PYTHONPATH=kernels python benchmarks/kernels.py kernels.json --commit COMMIT --only main
    PYTHONPATH=kernels python benchmarks/kernels.py kernels.json --commit COMMIT \
        --providers fused flex sdpa natten --limit-seconds 530

Needs a GPU, PyTorch and Triton. A run that reaches its limit is continued by the same command. Our
own kernels are measured anew for another commit, peers are not. Without a GPU,
`kernels.json --draw FOLDER` makes table and chart again. Estimated, not measured, for an H100 and
16 cores: fused 1 minute a precision; flex and sdpa, with the bias alone, 7 minutes and 3.

Each provider is first checked against the reference backend in fp64. A pass, with the bias and the
bias's gradient or without them, is captured in a CUDA graph; a time is the median of graph replays
with a cold L2 cache. The floor is the bytes that must move at least (forward q, k, v, o; backward
q, k, v, o, do, dq, dk, dv) over the bandwidth of a large copy, measured in the same run. Peers get
their tensors in the layout that suits them, masks made before, the bias where they can add it, and
the fastest of their ways counts (one that takes twice as long as another is replayed once).
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peers
import study
import torch
from compiling import Part, parts_of
from measuring import Record, Results, copy_bandwidth, markdown_table, save_picture
from peers import GENERATIONS, PROVIDERS, Provider
from problem import PRECISIONS, Exact, Problem, load_problems, random_tensors, use_precision

IDENTITY = "map", "heads", "head_dim", "kernel_size", "dilation", "batch", "dtype", "provider"
MARGIN = 20  # seconds that a problem may take
NAT_TINY = {56: 3, 28: 4, 14: 18, 7: 5}  # layers by the side of their map


def add_options(parser: argparse.ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART",
                        help="main, or parts of names such as 56x56-k7")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=PRECISIONS)
    parser.add_argument("--providers", nargs="+", default=["fused"], choices=PROVIDERS)


def begin(results: Results) -> None:
    """Measure the bandwidth."""
    results.content["copy_bandwidth_tb_s"] = copy_bandwidth() / 1e12


class Work(NamedTuple):
    """A provider on a layer."""

    problem: Problem
    is_main: bool
    dtype: str
    provider: Provider

    @property
    def record(self) -> Record:
        """What identifies it; windows are square."""
        record = self.problem.record | {"dtype": self.dtype, "provider": self.provider.name}
        for name in ("kernel_size", "dilation"):
            record[name] = record[name][0]
        return record | {"main": self.is_main}

    @property
    def biases(self) -> list[bool]:
        """With and without; peers that add it are measured with it alone."""
        is_ours = isinstance(self.provider, peers.Operator)
        adds_bias = not self.provider.refuses(self.problem, True, False)
        return [True] if adds_bias and not is_ours else [True, False]

    @property
    def parts(self) -> list[Part]:
        """What other processes compile."""
        what = self.provider, self.problem, self.dtype
        return [part for bias in self.biases for part in parts_of(*what, bias)]


def missing(arguments: argparse.Namespace, results: Results) -> Iterator[Work]:
    """What is not measured yet, in order."""
    for entry in load_problems("zoo"):
        problem, is_main = Problem.of(entry), entry["main"]
        chosen = any(p in str(problem) or (p == "main" and is_main) for p in arguments.only)
        for dtype in arguments.dtype if chosen else ():
            for name in arguments.providers:
                work = Work(problem, is_main, dtype, PROVIDERS[name])
                before = results.find(work.record)
                is_old = before and name in GENERATIONS and before["commit"] != arguments.commit
                if before is None or is_old:
                    yield work


def measure(work: Work, results: Results, _: Any) -> Record:
    """Times in microseconds, where they could be taken; why others could not."""
    problem, provider, dtype = work.problem, work.provider, work.dtype
    # Others may round weights and the bias.
    tolerance = PRECISIONS[dtype][2] * (1 if provider.name == "fused" else 4)
    with_bias = random_tensors(problem, use_precision(dtype), True)
    record: Record = {"failures": {}, "ways": {}, "ranges_us": {}}
    for bias in work.biases:
        suffix = "" if bias else "_without_rpb"
        tensors = with_bias if bias else with_bias._replace(rpb=None)
        found = peers.measure(provider, problem, tensors, Exact(problem, tensors, tolerance))
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
    return record | floors(problem, dtype, results.content["copy_bandwidth_tb_s"] * 1e12)


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
            parts.append(f"{markdown_table(head, rows)}{nat_tiny(records, name, columns)}")
    return "\n\n".join(parts)


def nat_tiny(records: list[Record], name: str, columns: list[tuple[str, str]]) -> str:
    """A last row, where all of them are measured: NAT-Tiny's 30 layers at 224 pixels."""
    layers = [r for r in records if r["main"] and r["dilation"] == 1]
    cells = ["NAT-Tiny, milliseconds"]
    for provider, column in [("fused", f"{name}_floor"), *columns]:
        found = {r["map"][0]: r.get(f"{column}_us") for r in layers if r["provider"] == provider}
        if set(found) != set(NAT_TINY) or None in found.values():
            cells.append("-")
        else:
            cells.append(f"{sum(n * found[side] for side, n in NAT_TINY.items()) / 1e3:.2f}")
    return f"\n| {' | '.join(cells)} |"


def by_shape(records: list[Record], name: str) -> Iterator[tuple[str, float, dict[str, Record]]]:
    """Title, floor, and measurement by provider of each shape; none of what broke the GPU."""
    whole = [r for r in records if f"{name}_floor_us" in r]
    for title in dict.fromkeys(map(shape, whole)):
        row = {r["provider"]: r for r in whole if shape(r) == title}
        yield title, next(iter(row.values()))[f"{name}_floor_us"], row


def present_columns(records: list[Record], name: str) -> list[tuple[str, str]]:
    """Provider and measurement, where there is one."""
    return [
        (provider, column)
        for provider in dict.fromkeys(r["provider"] for r in records)
        for column in (name, f"{name}_without_rpb")
        if any(r["provider"] == provider and f"{column}_us" in r for r in records)
    ]


def plots(result: Record, folder: Path) -> dict[str, Path]:
    """A bar chart of times over the floor, a dtype each; the files by their captions."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    files = {}
    for dtype in dict.fromkeys(r["dtype"] for r in result["results"]):
        records = [r for r in result["results"] if r["dtype"] == dtype]
        titles = [title for title, *_ in by_shape(records, "forward")]
        figure = Figure((14, 2 + 0.32 * len(titles)), layout="constrained")
        for axes, name in zip(
            figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True
        ):
            draw_bars(axes, records, name)
            axes.set_title(name)
            axes.set_xlabel("time over the memory's floor")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 7)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.margins(y=0.01)
            axes.axvline(1, color="black", linewidth=0.8)
        axes.legend(fontsize="small", loc="lower right")
        figure.axes[0].set_yticks(range(len(titles)), titles, fontsize="small")
        figure.axes[0].invert_yaxis()
        figure.suptitle(f"{result['device']}, {dtype}, batch {records[0]['batch']}")
        file = save_picture(figure, result, f"kernels-{dtype}", folder)
        files[f"Times over the memory's floor, {dtype}"] = file
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
    found = study.main(sys.modules[__name__])
    wrong = [r for r in (found.records if found else ()) if r["failures"]]
    sys.exit("\n".join(f"failed: {r}" for r in wrong if r["provider"] in GENERATIONS))
