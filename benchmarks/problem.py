"""A problem of the benchmarks: its sizes, its tensors, and its exact results."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import neighborhood_attention  # noqa: F401  registers the operators

OPERATORS = torch.ops.neighborhood_attention
FOLDER = Path(__file__).parent / "problems"
# Of the element type; whether products of fp32 may use TF32; allowed relative error.
PRECISIONS = {
    "bfloat16": (torch.bfloat16, False, 1e-2),
    "float16": (torch.float16, False, 2e-3),
    "float32": (torch.float32, False, 2e-5),
    "tf32": (torch.float32, True, 4e-3),
}


@dataclass(frozen=True)
class Problem:
    """Sizes; `map`, `kernel_size` and `dilation` have an entry an axis."""

    map: tuple[int, ...]
    heads: int
    head_dim: int
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    batch: int

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Problem":
        """From an entry of a list of problems; other keys of it are ignored."""
        axes = {name: tuple(record[name]) for name in ("map", "kernel_size", "dilation")}
        return cls(**axes, **{name: record[name] for name in ("heads", "head_dim", "batch")})

    @property
    def record(self) -> dict[str, Any]:
        """What `of` takes, as JSON gives it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        axes = [("", self.map), ("k", self.kernel_size), ("d", self.dilation)]
        words = [prefix + "x".join(map(str, values)) for prefix, values in axes]
        return "-".join([*words, f"h{self.heads}", f"D{self.head_dim}", f"B{self.batch}"])

    @property
    def dims(self) -> int:
        """Spatial axes."""
        return len(self.map)

    @property
    def tokens(self) -> int:
        """Of one image."""
        return prod(self.map)

    @property
    def window(self) -> int:
        """Keys of a query."""
        return prod(self.kernel_size)

    @property
    def elements(self) -> int:
        """Of the query; key, value and output have as many."""
        return self.batch * self.tokens * self.heads * self.head_dim

    @property
    def flops(self) -> int:
        """Of the forward: two products over every query's window."""
        return 4 * self.elements * self.window

    @property
    def settings(self) -> tuple[list[int], float]:
        """Window and scale, as the operators take them."""
        flat = [*self.kernel_size, *[1] * self.dims, *self.dilation, *[0] * self.dims]
        return flat, self.head_dim**-0.5


class Tensors(NamedTuple):
    """Of one problem; standard layout is [B, *map, heads, D]."""

    qkv: Tensor  # [B, *map, 3, heads, D]
    rpb: Tensor | None  # [heads, 2 * kernel_size - 1, ...], fp32
    grad: Tensor  # of the output, in standard layout


def load_problems(name: str) -> list[dict[str, Any]]:
    """Entries of a list in problems/."""
    entries: list[dict[str, Any]] = json.loads((FOLDER / f"{name}.json").read_text())["problems"]
    return entries


def use_precision(precision: str) -> torch.dtype:
    """The element type; products of fp32 follow from now on."""
    dtype, tf32, _ = PRECISIONS[precision]
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return dtype


def random_tensors(
    problem: Problem, dtype: torch.dtype, bias: bool, device: str = "cuda"
) -> Tensors:
    """N(0, 1), always the same."""
    generator = torch.Generator(device).manual_seed(0)
    rows = problem.batch, *problem.map
    heads = problem.heads, problem.head_dim
    sizes = [2 * k - 1 for k in problem.kernel_size]

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    rpb = randn(problem.heads, *sizes, dtype=torch.float32) if bias else None
    return Tensors(randn(*rows, 3, *heads), rpb, randn(*rows, *heads))


class Exact:
    """Results of a sample of images in fp64, by the reference backend.

    Gradients are compared with those of `grad`, the output's gradient left at these images alone:
    then the bias's gradient comes from them alone too.
    """

    def __init__(self, problem: Problem, tensors: Tensors, tolerance: float) -> None:
        self.tolerance = tolerance
        self._sample = sorted({0, problem.batch - 1})
        self._problem, self._tensors = problem, tensors

    @cached_property
    def grad(self) -> Tensor:
        """In standard layout; zeros outside the sample."""
        grad = torch.zeros_like(self._tensors.grad)
        grad[self._sample] = self._tensors.grad[self._sample]
        return grad

    @cached_property
    def _results(self) -> dict[str, Tensor]:
        qkv, grad = (x[self._sample].double() for x in (self._tensors.qkv, self._tensors.grad))
        rpb = self._tensors.rpb
        arguments = qkv, rpb if rpb is None else rpb.double(), *self._problem.settings, "reference"
        output, lse = OPERATORS.attention_qkvpacked(*arguments)
        grad_qkv, grad_rpb = OPERATORS.attention_qkvpacked_backward(
            *arguments, output, lse, grad, None, [True, rpb is not None]
        )
        names = "grad_query", "grad_key", "grad_value"
        results = {"output": output, **dict(zip(names, grad_qkv.unbind(-3), strict=True))}
        return results if rpb is None else {**results, "grad_rpb": grad_rpb}

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """Norm of each result's error over the norm of the exact value."""
        errors = {}
        for name, actual in results.items():
            exact = self._results[name]
            actual = actual if name == "grad_rpb" else actual[self._sample]
            errors[name] = float((actual.detach().double() - exact).norm() / exact.norm())
        return errors


class Unchecked(Exact):
    """For problems too large for the reference: compares nothing."""

    def errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        """None."""
        return {}
