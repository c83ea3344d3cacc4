"""Fused additions, norms and MLPs against PyTorch's own, and what they make of a whole model.

    PYTHONPATH=.:kernels python benchmarks/fusions.py OUTPUT.json --commit COMMIT \\
        --limit-seconds 560 [--parts operations host models] [--passes inference training]
        [--executions eager captured compiled cuda_graphs] [--choices off norm mlp all default]

What OUTPUT.json holds is not measured again, so that the same command continues. Models are
prepared side by side, in processes of their own, and timed in turns; "off", "norm", "mlp" and "all"
say what runs fused whatever the mode and the size, "default" leaves it to the project.

Operations have the sizes of NAT-Tiny's stages, in bf16: 256 images forward, 128 in what only a
training step does. Times are medians of calls in a stream, each with a cold L2 cache; the floor is
what has to be read and written, at 3 TB/s. Results are checked against fp64. Host times are those
of calls whose kernels are short. PyTorch's backward of a norm includes its casts and the addition
of the other gradient; that of two products, the bias gradient.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

# Each process compiles by itself: PyTorch's compiler, imported later, shall start no further ones.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch
from measuring import Record, Results, markdown_table, today
from model_process import Workers
from torch import Tensor, nn
from torch.nn import functional as F

from nat_models import fused
from nat_models.benchmark import steps
from nat_models.benchmark.case import EXECUTIONS, Case
from nat_models.benchmark.measure import Sampling
from nat_models.benchmark.report import describe
from nat_models.fused import ops
from neighborhood_attention.tune.ahead import Ahead
from neighborhood_attention.tune.records import Deadline

PARTS = ("operations", "host", "models")
IDENTITY = ("part", "case")
STAGES = [(56, 64), (28, 128), (14, 256), (7, 512)]  # side of the map, channels
RATIO = 3  # of an MLP's hidden channels
BANDWIDTH = 3e12
TOLERANCE = 0.03  # relative, with 0.05 added to what is divided by
CHOICES: dict[str, Sequence[Any] | None] = {
    "off": (), "norm": ("add_layer_norm",), "mlp": ("mlp",), "all": ("add_layer_norm", "mlp"),
    "default": None,
}  # fmt: skip
MODEL = "nat_tiny"
Function = Callable[[], Any]


class Pair(NamedTuple):
    """One computation twice, and what it should give for some rows."""

    fused: Function
    torch: Function
    exact: Function
    rows: slice
    bytes: int


def norm(rows: int, channels: int, device: str, has_branch: bool = False) -> Pair:
    """A LayerNorm, with an addition before it or without."""
    x, branch = draw(device, 2, rows, channels)
    weight, bias = draw(device, 2, channels)
    part = slice(-2048, None)

    def torch_norm() -> tuple[Tensor, ...]:
        total = x + branch if has_branch else x
        return total, F.layer_norm(total, (channels,), weight, bias)

    def exact() -> tuple[Tensor, ...]:
        total = (x[part] + branch[part] if has_branch else x[part]).double()
        return total, F.layer_norm(total, (channels,), weight.double(), bias.double())

    added = fused.Branch(branch) if has_branch else None
    return Pair(
        lambda: fused.add_layer_norm(x, added, fused.Norm(weight, bias, 1e-5)),
        torch_norm, exact, part, (4 if has_branch else 2) * x.nbytes,
    )  # fmt: skip


def add_norm(rows: int, channels: int, device: str) -> Pair:
    """A residual addition and the LayerNorm of the sum."""
    return norm(rows, channels, device, has_branch=True)


def norm_backward(rows: int, channels: int, device: str) -> Pair:
    """Under autocast: sums, their gradients and parameters in fp32, what a norm gives in bf16."""
    total, grad_total = draw(device, 2, rows, channels, dtype=torch.float32)
    (grad,) = draw(device, 1, rows, channels)
    weight, bias = draw(device, 2, channels, dtype=torch.float32)
    part = slice(-2048, None)
    backward = torch.ops.aten.native_layer_norm_backward
    _, mean, rstd = torch.native_layer_norm(total, (channels,), weight, bias, 1e-5)
    standardized = ((total - mean) * rstd).to(grad.dtype)

    def torch_backward() -> tuple[Tensor, ...]:
        found = backward(
            grad.float(), total, [channels], mean, rstd, weight, bias, [True, True, True]
        )
        found[0].add_(grad_total)
        return found[0], found[0].to(grad.dtype)

    def exact() -> tuple[Tensor, ...]:
        x = total[part].double().requires_grad_()
        F.layer_norm(x, (channels,), weight.double()).backward(grad[part].double())
        return (x.grad + grad_total[part].double(),) * 2

    settings = total.dtype, grad.dtype
    return Pair(
        lambda: ops.add_layer_norm_backward(
            standardized, rstd.flatten(), None, None, None, weight, bias, grad_total, grad,
            *settings,
        )[:2],
        torch_backward, exact, part, 2 * total.nbytes + 4 * grad.nbytes,
    )  # fmt: skip


def linear_gelu(rows: int, channels: int, device: str, with_hidden: bool = False) -> Pair:
    """A linear layer and the GELU of its result; training keeps what the GELU was taken of."""
    (x,) = draw(device, 1, rows, channels)
    (weight,) = draw(device, 1, RATIO * channels, channels)
    weight /= channels**0.5
    (bias,) = draw(device, 1, RATIO * channels)
    part = slice(-2048, None)

    def both(hidden: Tensor) -> tuple[Tensor | None, Tensor]:
        return hidden if with_hidden else None, F.gelu(hidden)

    return Pair(
        lambda: ops.linear_gelu(x, weight, bias, with_hidden),
        lambda: both(F.linear(x, weight, bias)),
        lambda: both(F.linear(x[part].double(), weight.double(), bias.double())),
        part,
        x.nbytes * (1 + RATIO * (1 + with_hidden)),
    )


def linear_gelu_training(rows: int, channels: int, device: str) -> Pair:
    """As `linear_gelu`, for a backward."""
    return linear_gelu(rows, channels, device, with_hidden=True)


def mlp_backward(rows: int, channels: int, device: str) -> Pair:
    """Through the second linear layer and the GELU, to the first one's result and its bias.

    Ours computes the GELU once more, PyTorch's layers keep it.
    """
    (grad,) = draw(device, 1, rows, channels)
    (weight,) = draw(device, 1, channels, RATIO * channels)
    weight /= channels**0.5
    (hidden,) = draw(device, 1, rows, RATIO * channels)
    part = slice(-2048, None)

    def torch_backward() -> tuple[Tensor, ...]:
        found = torch.ops.aten.gelu_backward(grad @ weight, hidden)
        return found, found.sum(0)

    def exact() -> tuple[Tensor, ...]:
        x = hidden[part].double().requires_grad_()
        F.gelu(x).backward(grad[part].double() @ weight.double())
        return (x.grad,)

    return Pair(
        lambda: ops.gelu_linear_backward(grad, weight, hidden)[:1],
        torch_backward, exact, part, grad.nbytes * (1 + 3 * RATIO),
    )  # fmt: skip


OPERATIONS: dict[str, tuple[Callable[[int, int, str], Pair], int]] = {
    "norm": (norm, 256),
    "add, norm": (add_norm, 256),
    "norm backward": (norm_backward, 128),
    "linear, GELU": (linear_gelu, 256),
    "linear, GELU, training": (linear_gelu_training, 128),
    "linear, GELU backward": (mlp_backward, 128),
}


def draw(device: str, count: int, *shape: int, dtype: Any = None) -> list[Tensor]:
    """Normal numbers, in a GPU's bf16, the interpreter's fp16."""
    half = torch.float16 if device == "cpu" else torch.bfloat16
    return [torch.randn(shape, device=device).to(dtype or half) for _ in range(count)]


class Work(NamedTuple):
    """An operation on the map of a stage; called, it compiles."""

    operation: str
    stage: int
    device: str

    @property
    def record(self) -> Record:
        """What identifies it."""
        side, channels = STAGES[self.stage]
        rows = OPERATIONS[self.operation][1] * side**2
        case = {"operation": self.operation, "rows": rows, "channels": channels}
        return {"part": "operations", "case": case}

    def pair(self) -> Pair:
        """With its tensors."""
        case = self.record["case"]
        return OPERATIONS[self.operation][0](case["rows"], case["channels"], self.device)

    def __call__(self) -> None:
        """Run it once."""
        self.pair().fused()

    def measure(self) -> Record:
        """Microseconds, and the largest error.

        Raises:
            ValueError: The result is wrong.
        """
        pair = self.pair()
        wrong = error(pair.fused(), pair.exact(), pair.rows)
        if not wrong < TOLERANCE:
            raise ValueError(f"{self.record['case']}: relative error {wrong:.3g}")
        return {
            "fused_us": median_us(pair.fused, self.device),
            "torch_us": median_us(pair.torch, self.device),
            "floor_us": pair.bytes / BANDWIDTH * 1e6,
            "error": wrong,
        }


def error(results: Sequence[Tensor | None], exact: Sequence[Tensor | None], rows: slice) -> float:
    """The largest, relative to the exact value and 0.05."""
    return max(
        ((a[rows].double() - e).abs() / (e.abs() + 0.05)).max().item()
        for a, e in zip(results, exact, strict=False)
        if a is not None and e is not None
    )


def median_us(function: Function, device: str) -> float:
    """Of a call; each finds a cold L2 cache."""
    if device == "cpu":
        return host_us(function, calls=1)
    from triton.testing import do_bench

    return 1e3 * float(do_bench(function, warmup=5, rep=50, return_mode="median"))


def host_us(function: Function, calls: int = 300) -> float:
    """Of a call, of the fastest of three turns."""
    turns = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        turns.append((time.perf_counter() - start) / calls * 1e6)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return min(turns)


def host_times(device: str) -> Iterator[Record]:
    """On one map of 7x7, in inference."""
    channels = STAGES[-1][1]
    x, branch = draw(device, 2, 1, 7, 7, channels)
    calls: dict[str, tuple[nn.Module, tuple[Any, ...]]] = {
        "norm": (fused.LayerNorm(channels), (x,)),
        "mlp": (fused.Mlp(channels, RATIO * channels), (x,)),
        "add, norm": (_AddNorm(channels), (x, branch)),
    }
    for name, (module, arguments) in calls.items():
        module.to(device, x.dtype)
        times = {}
        for way, choice in (("torch", "off"), ("fused", "all")):
            with fused.using(*CHOICES[choice] or ()), torch.inference_mode():
                module(*arguments)
                times[f"{way}_us"] = host_us(lambda m=module, a=arguments: m(*a))
        yield {"part": "host", "case": {"operation": name}} | times


class _AddNorm(nn.LayerNorm):
    def forward(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        if fused.norm_is_used(x):
            norm = fused.Norm(self.weight, self.bias, self.eps)
            return fused.add_layer_norm(x, fused.Branch(branch), norm)
        x = x + branch
        return x, super().forward(x)


@dataclass(frozen=True)
class FusedCase(Case):
    """A case in which a choice of operations runs fused."""

    choice: str = "default"


_chosen = ExitStack()  # until the process's next case


def create_model(case: Case, device: torch.device) -> nn.Module:
    """The case's model, in a process whose code runs its choice fused."""
    operations = CHOICES[case.choice] if isinstance(case, FusedCase) else None
    _chosen.close()
    if operations is not None:
        _chosen.enter_context(fused.using(*operations))
    return steps.create_model(case, device)


def model_groups(arguments: argparse.Namespace) -> Iterator[list[FusedCase]]:
    """Cases to be timed in turns: they differ in what runs fused."""
    for kind, execution in product(arguments.passes, arguments.executions):
        is_training = kind == "training"
        size, precision = (128, "bfloat16") if is_training else (256, "bfloat16-true")
        size, precision = arguments.batch_size or size, arguments.precision or precision
        yield [
            FusedCase(arguments.model, kind, execution, size, precision, choice=choice)
            for choice in arguments.choices
        ]


def case_record(case: FusedCase) -> Record:
    """What identifies it."""
    return {"part": "models", "case": case.as_record()}


def main() -> None:
    """Measure what is missing, print the tables."""
    arguments = parse()
    deadline = Deadline(arguments.limit_seconds)
    description = describe(torch.device(arguments.device)) | {
        "date": today(), "commit": arguments.commit,
        "method": " ".join(__doc__.split("\n\n")[-1].split()),
    }  # fmt: skip
    results = Results(arguments.output, description, IDENTITY)
    try:
        if "operations" in arguments.parts:
            measure_operations(results, arguments.device, deadline)
        if "host" in arguments.parts:
            for record in host_times(arguments.device):
                results.add(record)
        if "models" in arguments.parts:
            measure_models(results, arguments, deadline)
    except TimeoutError:
        print("out of time: the same command continues")
    print(tables(results.content | {"results": results.records}))


def measure_operations(results: Results, device: str, deadline: Deadline) -> None:
    """All that are not measured yet, compiled side by side before the first is timed."""
    work = [Work(name, stage, device) for name in OPERATIONS for stage in range(len(STAGES))]
    work = [item for item in work if results.find(item.record) is None]
    if device != "cpu":
        with Ahead(work) as ahead:
            for item in work:
                ahead.wait(item, deadline)
    for item in work:
        results.add(item.record | item.measure())


def measure_models(results: Results, arguments: argparse.Namespace, deadline: Deadline) -> None:
    """Group by group, until the time is over."""
    longest = 0.0
    for group in model_groups(arguments):
        missing = [case for case in group if not is_measured(results, case)]
        if not missing:
            continue
        start = time.monotonic()
        if deadline.left < longest:
            raise TimeoutError
        with Workers(arguments.device, arguments.sampling, create_model) as workers:
            for case, record in workers.measure(missing, deadline):
                results.add(record | case_record(case))
        longest = max(longest, time.monotonic() - start)
        print(f"{len(missing)} cases in {time.monotonic() - start:.0f} s", flush=True)


def is_measured(results: Results, case: FusedCase) -> bool:
    """Whether there is a result that is no failure."""
    record = results.find(case_record(case))
    return record is not None and not record["status"].startswith("failed")


def tables(result: Record) -> str:
    """Operations, host, models; Markdown."""
    by_part: dict[str, list[Record]] = {part: [] for part in PARTS}
    for record in result["results"]:
        by_part[record["part"]].append(record)
    versions = result["versions"]
    parts = [f"{result['device']}, torch {versions['torch']}, Triton {versions['triton']}"]
    rows = [
        [*r["case"].values(), *(f"{r[f'{name}_us']:.1f}" for name in ("torch", "fused", "floor"))]
        for r in by_part["operations"]
    ]
    if rows:
        head = ["operation", "rows", "channels", "PyTorch, us", "fused, us", "floor, us"]
        parts.append(markdown_table(head, rows))
    rows = [
        [r["case"]["operation"], f"{r['torch_us']:.1f}", f"{r['fused_us']:.1f}"]
        for r in by_part["host"]
    ]
    if rows:
        parts.append(markdown_table(["call", "PyTorch, host us", "fused, host us"], rows))
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for r in by_part["models"]:
        case = r["case"]
        key = case["model"], case["pass"], case["execution"], str(case["batch_size"])
        speed = r.get("images_per_second")
        groups.setdefault(key, {})[case["choice"]] = f"{speed:,.0f}" if speed else r["status"][:40]
    rows = [
        [*key, *(found.get(choice, "-") for choice in CHOICES)] for key, found in groups.items()
    ]
    if rows:
        parts.append("Images a second by what runs fused:")
        parts.append(markdown_table(["model", "pass", "execution", "batch", *CHOICES], rows))
    return "\n\n".join(parts)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--commit", required=True, help="of the code that is measured")
    parser.add_argument("--limit-seconds", type=float, default=560)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    models = parser.add_argument_group("models")
    models.add_argument("--model", default=MODEL)
    passes = ["inference", "training"]
    models.add_argument("--passes", nargs="+", choices=passes, default=passes)
    models.add_argument("--executions", nargs="+", choices=EXECUTIONS, default=EXECUTIONS)
    models.add_argument("--choices", nargs="+", choices=list(CHOICES), default=list(CHOICES))
    models.add_argument("--batch-size", type=int, help="in place of 256, in training 128")
    models.add_argument("--precision", help="in place of bfloat16-true, in training bfloat16")
    models.add_argument("--rounds", type=int, default=3)
    models.add_argument("--round-seconds", type=float, default=0.5)
    arguments = parser.parse_args(words)
    arguments.sampling = Sampling(rounds=arguments.rounds, round_seconds=arguments.round_seconds)
    return arguments


if __name__ == "__main__":
    main()
