"""Speed and memory of whole models: inference and training, ours and any that timm knows.

    PYTHONPATH=.:kernels python benchmarks/models.py OUTPUT.json --preset headline \\
        --commit COMMIT --limit-seconds 560

Cases are the product of models, passes, executions, attention backends, batch sizes, resolutions
and precisions; a preset is a list of such products, of which --passes selects and in which other
options replace whole axes. Each case runs in a process of its own. A group of them is prepared side
by side, which is mostly compiling, then timed in turns, then profiled. What OUTPUT.json holds is
not measured again; a run stops before a group that would not end in time, and the same command
continues. Of the preset paper, which needs no compiler but Triton, only the inference in half
precision is profiled: elsewhere a process goes on with a case of the next group. On an H100 with 16
cores 8 of headline's cases, eager and in CUDA graphs, took 80 to 90 s, in training 3 minutes.
Estimated: headline 36 cases in 3 groups, 7 minutes; backends 2 groups, 6; sizes 6 groups, 13; paper
18 groups, 13.

Images a second are those of successive calls in a stream; latency is that of a call that is waited
for. Peak memory is what tensors took at most, or what CUDA graphs keep. MFU is the model's
multiplications and additions (three times the forward's for training) over the device's published
dense peak.

Needs PyTorch, Triton, timm, omegaconf and hydra-core.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

# Many processes share the cores; before PyTorch is imported, here and by them.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")

import torch
from adapters import available_backends
from measuring import Results, markdown_table
from model_process import Workers

import nat_models  # noqa: F401 (registers the models)
from nat_models.benchmark.case import EXECUTIONS, PRECISIONS, Case
from nat_models.benchmark.measure import Sampling
from nat_models.benchmark.report import describe
from nat_models.benchmark.settings import attention_backend, check_models
from neighborhood_attention.tune.records import Deadline

# TFLOP/s of NVIDIA's data sheets for H100 SXM and H200, without sparsity.
PEAK_TFLOPS = {"float32": 67, "tf32": 494.5, "bfloat16": 989.5, "float16": 989.5}
PEAK_DEVICES = ("H100 80GB HBM3", "H200")


@dataclass(frozen=True)
class Grid:
    """A product of cases; `together` of them are measured in turns: they share the memory."""

    models: Sequence[str] = ()
    passes: Sequence[str] = ("inference", "training")
    executions: Sequence[str] = ("eager", "compiled", "cuda_graphs")
    backends: Sequence[str | None] = (None,)
    batch_sizes: Sequence[int] = (128,)
    input_sizes: Sequence[int | None] = (None,)
    precisions: Sequence[str] = ("bfloat16",)
    together: int = 12
    profile: bool = True

    def cases(self, device: str) -> list[Case]:
        """Each case once: a model without neighborhood attention has no other backend."""
        conditions = product(self.precisions, self.input_sizes, self.batch_sizes, self.passes)
        cases = [
            Case(model, kind, execution, batch_size, precision, input_size,
                 attention_backend(model, backend, device))
            for precision, input_size, batch_size, kind in conditions
            for execution, model, backend in product(self.executions, self.models, self.backends)
        ]  # fmt: skip
        return list(dict.fromkeys(cases))


TINY = ("nat_tiny", "dinat_tiny", "convnext_tiny", "swin_tiny_patch4_window7_224")
SIZES = {
    "small": ("nat_small", "dinat_small", "dinat_s_small", "convnext_small",
              "swin_small_patch4_window7_224"),
    "base": ("nat_base", "dinat_base", "dinat_s_base", "convnext_base",
             "swin_base_patch4_window7_224"),
    "large": ("dinat_large", "dinat_s_large", "convnext_large", "swin_large_patch4_window7_224"),
    "large at 384": ("dinat_large_384", "dinat_s_large_384", "convnext_large.fb_in22k_ft_in1k_384",
                     "swin_large_patch4_window12_384"),
}  # fmt: skip
PAPER = {
    "small": ("nat_mini", "nat_tiny", "nat_small", "dinat_mini", "dinat_tiny", "dinat_small",
              "dinat_s_tiny", "dinat_s_small"),
    "large": ("nat_base", "dinat_base", "dinat_s_base", "dinat_large", "dinat_s_large"),
    "at 384": ("dinat_large_384_11x11", "dinat_s_large_384"),
}  # fmt: skip
GENERATIONS = ("naive", "gemm", "fused")
INFERENCE, TRAINING = ("inference",), ("training",)


def _paper(batch_size: int, together: Sequence[int], **axes: Any) -> list[Grid]:
    """A captured step needs no compiler and no host: the kernels make the difference."""
    return [
        Grid(models, executions=("captured",), backends=GENERATIONS, together=count,
             batch_sizes=(batch_size // 4 if "384" in size else batch_size,), **axes)
        for (size, models), count in zip(PAPER.items(), together, strict=True)
    ]  # fmt: skip


def _sizes(kind: Sequence[str], execution: str, batch_size: int, **axes: Any) -> list[Grid]:
    return [
        Grid(models, kind, (execution,), together=10,
             batch_sizes=(batch_size // 4 if "384" in size else batch_size,), **axes)
        for size, models in SIZES.items()
    ]  # fmt: skip


PRESETS = {
    "headline": [
        Grid(TINY, INFERENCE, batch_sizes=(256,), precisions=("bfloat16-true",)),
        Grid(TINY, TRAINING, batch_sizes=(128,)),
        Grid(TINY, INFERENCE, ("eager", "compiled", "cuda_graphs", "captured_compiled"),
             batch_sizes=(1,), precisions=("bfloat16-true",), together=16),
    ],
    "sizes": [
        *_sizes(INFERENCE, "compiled", 128, precisions=("bfloat16-true",)),
        *_sizes(TRAINING, "cuda_graphs", 64),
    ],
    "backends": [
        Grid(("nat_tiny", "dinat_tiny"), INFERENCE, ("compiled",), (*GENERATIONS, "flex", "natten"),
             precisions=("bfloat16-true",)),
        Grid(("nat_tiny", "dinat_tiny"), TRAINING, ("cuda_graphs",),
             (*GENERATIONS, "flex", "natten")),
    ],
    "paper": [
        *_paper(128, (15, 15, 6), passes=INFERENCE, precisions=("float16-true",)),
        *_paper(64, (9, 3, 3), passes=TRAINING, profile=False),
        *_paper(128, (15, 15, 6), passes=INFERENCE, precisions=("tf32",), profile=False),
    ],
}  # fmt: skip


def main() -> None:
    """Measure what is missing, group by group."""
    arguments = parse()
    deadline = Deadline(arguments.limit_seconds)
    description = describe(torch.device(arguments.device)) | {
        "date": time.strftime("%Y-%m-%d"),
        "method": " ".join(__doc__.split("\n\n")[3].split()),
        "sampling": asdict(arguments.sampling),
    }
    if arguments.commit:
        description["commit"] = arguments.commit
    results = Results(arguments.output, description, list(arguments.cases[0].as_record()))
    longest = 0.0
    missing = [case for case in arguments.cases if not is_measured(results, case)]
    print(f"{len(missing)} of {len(arguments.cases)} cases to measure", flush=True)
    with Workers(arguments.device, arguments.sampling) as workers:
        for group in groups(missing, arguments.grids):
            if deadline.left < longest:
                break
            start = time.monotonic()
            profile = arguments.grids[group[0]].profile
            try:
                for _, record in workers.measure(group, deadline, profile):
                    results.add(record | {"mfu": mfu(record, description["device"])})
            except TimeoutError:
                print("out of time: the next run measures anew what is missing of the last group")
                break
            longest = max(longest, time.monotonic() - start)
            print(f"{len(group)} cases in {time.monotonic() - start:.0f} s", flush=True)
    left = sum(not is_measured(results, case) for case in arguments.cases)
    print(table(results.records))
    print(f"{left} cases left" if left else "all cases measured")


def is_measured(results: Results, case: Case) -> bool:
    """Whether there is a result; too little memory is one, any other failure is none."""
    record = results.find(case.as_record())
    return record is not None and not record["status"].startswith("failed")


def groups(cases: Sequence[Case], grids: dict[Case, Grid]) -> Iterator[list[Case]]:
    """Successive cases of one pass, batch size and precision, as many as go together."""
    group: list[Case] = []
    for case in cases:
        is_full = len(group) >= grids[case].together
        if group and (is_full or _condition(group[0], grids) != _condition(case, grids)):
            yield group
            group = []
        group.append(case)
    if group:
        yield group


def _condition(case: Case, grids: dict[Case, Grid]) -> tuple[Any, ...]:
    own = case.kind, case.batch_size, case.precision, case.input_size
    return *own, grids[case].together, grids[case].profile


def mfu(record: dict[str, Any], device: str) -> float | None:
    """Fraction of the peak; None on a device whose peak is not known here."""
    known = any(name in device for name in PEAK_DEVICES)
    if "images_per_second" not in record or not known:
        return None
    passes = 3 if record["pass"] == "training" else 1
    peak = PEAK_TFLOPS[record["precision"].removesuffix("-true")] * 1e12
    return passes * record["flops_per_image"] * record["images_per_second"] / peak


def table(records: Sequence[dict[str, Any]]) -> str:
    """A short table for the terminal."""
    head = ["model", "pass", "execution", "backend", "batch", "precision", "img/s", "spread",
            "p50 ms", "p95 ms", "GiB", "MFU", "attention"]  # fmt: skip
    return markdown_table(head, [_row(record) for record in records])


def _row(r: dict[str, Any]) -> list[str]:
    case = [r["model"], r["pass"], r["execution"], r["attention_backend"] or "-"]
    case += [f"{r['batch_size']}x{r['input_size'][-1]}", r["precision"]]
    if r["status"] != "ok":
        return [*case, r["status"][:60], *[""] * 6]
    peak = r.get("peak_memory_mib")
    latency = (f"{r['latency_ms'][q]:.2f}" for q in ("p50", "p95"))
    share = _percent(r["mfu"]), _percent(r.get("attention_share"))
    memory = "-" if peak is None else f"{peak / 1024:.1f}"
    return [*case, f"{r['images_per_second']:,.0f}", f"{r['spread']:.1%}", *latency, memory, *share]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; its `cases` are all to measure, `grids` the grid of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--commit", help="of the code that is measured, where there is no git")
    parser.add_argument("--limit-seconds", type=float, default=86400.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    axes = parser.add_argument_group("axes", "in place of those of the preset")
    axes.add_argument("--models", nargs="+")
    axes.add_argument("--passes", nargs="+", choices=["inference", "training"])
    axes.add_argument("--executions", nargs="+", choices=EXECUTIONS)
    axes.add_argument("--backends", nargs="+", choices=available_backends())
    axes.add_argument("--batch-sizes", nargs="+", type=int)
    axes.add_argument("--input-sizes", nargs="+", type=int, help="pixels a side")
    axes.add_argument("--precisions", nargs="+", choices=PRECISIONS)
    axes.add_argument("--together", type=int, help="cases measured in turns")
    axes.add_argument("--profile", action=argparse.BooleanOptionalAction,
                      help="say where the time goes")  # fmt: skip
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--warmup", type=int, default=5)
    sampling.add_argument("--rounds", type=int, default=3)
    sampling.add_argument("--round-seconds", type=float, default=0.3)
    options = parser.parse_args(arguments)

    given = {field: value for field, value in vars(options).items()
             if field in Grid.__annotations__ and value is not None}  # fmt: skip
    passes = given.pop("passes", Grid.passes)
    selected = [(grid, [kind for kind in grid.passes if kind in passes])
                for grid in PRESETS.get(options.preset, [Grid()])]  # fmt: skip
    grids = [replace(grid, passes=kinds, **given) for grid, kinds in selected if kinds]
    grids = [replace(grid, backends=_importable(grid.backends)) for grid in grids]
    options.grids = {case: grid for grid in grids for case in grid.cases(options.device)}
    options.cases = list(options.grids)
    options.sampling = Sampling(options.warmup, options.rounds, options.round_seconds)
    if not options.cases:
        parser.error("expected --preset or --models")
    try:
        check_models([model for grid in grids for model in grid.models])
    except ValueError as error:
        parser.error(str(error))
    return options


def _importable(backends: Sequence[str | None]) -> list[str | None]:
    available = available_backends()
    for name in backends:
        if name is not None and name not in available:
            print(f"{name} is not installed: left out")
    return [name for name in backends if name is None or name in available]


if __name__ == "__main__":
    main()
