"""A pass of a problem with any tiles: run, checked against fp64, and timed."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from triton.testing import do_bench

from neighborhood_attention.backends import Inputs, reference
from neighborhood_attention.backends.triton import fused_backward, fused_forward, tile_table
from neighborhood_attention.backends.triton.launch import Problem, describe
from neighborhood_attention.backends.triton.tile import Tiles
from neighborhood_attention.backends.triton.tile_table import KERNELS, Key
from neighborhood_attention.geometry import Neighborhood
from neighborhood_attention.tune.records import Record

# Of the elements, and the allowed norm of an error over that of the exact result.
PRECISIONS = {
    "half": (torch.bfloat16, 1e-2),
    "tf32": (torch.float32, 4e-3),
    "ieee": (torch.float32, 2e-5),
}
# The kernels of a pass, the best way first where it can run.
FORWARD_WAYS = (("ring_forward",), ("forward",))
BACKWARD_WAYS = (
    ("whole_group",),
    ("query_bias_gradient", "key_gradient"),
    ("query_gradient", "bias_gradient", "key_gradient"),
)
FORWARD_KERNELS = tuple(kernel for way in FORWARD_WAYS for kernel in way)


class Timing(NamedTuple):
    """Microseconds: the median of the replays, and their 10 % and 90 % quantiles."""

    median: float
    low: float
    high: float


class Shape(NamedTuple):
    """The sizes of a problem; `map`, `kernel_size` and `dilation` have an entry an axis."""

    map: tuple[int, ...]
    heads: int
    head_dim: int
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    batch: int

    @classmethod
    def of(cls, record: Record) -> "Shape":
        """From an object with these fields, others are ignored.

        Raises:
            KeyError: One is missing.
            ValueError: A window does not fit into the map.
        """
        settings: Record = {name: record[name] for name in ("heads", "head_dim", "batch")}
        for name in ("map", "kernel_size", "dilation"):
            settings[name] = tuple(record[name])
        shape = cls(**settings)
        extents = zip(shape.map, shape.kernel_size, shape.dilation, strict=True)
        if any(size * step > length for length, size, step in extents):
            raise ValueError(f"{shape}: expected a map of kernel_size * dilation or more")
        return shape

    def __str__(self) -> str:
        axes = ("", self.map), ("k", self.kernel_size), ("d", self.dilation)
        words = (prefix + "x".join(map(str, sizes)) for prefix, sizes in axes)
        return "-".join((*words, f"h{self.heads}", f"D{self.head_dim}", f"B{self.batch}"))

    @property
    def window(self) -> Neighborhood:
        """Neither strided nor causal."""
        dims = len(self.map)
        return Neighborhood(self.kernel_size, (1,) * dims, self.dilation, (False,) * dims)


class Work(NamedTuple):
    """Kernels to tune: those of one pass of a problem."""

    shape: Shape
    precision: str
    kernels: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.shape} {self.precision} {self.name}"

    @property
    def name(self) -> str:
        """Of the pass."""
        return "forward" if set(self.kernels) <= set(FORWARD_KERNELS) else "backward"

    @property
    def ways(self) -> tuple[tuple[str, ...], ...]:
        """The kernels that make up the pass, the best way first where it can run."""
        return FORWARD_WAYS if self.name == "forward" else BACKWARD_WAYS

    @property
    def record(self) -> Record:
        """What identifies a measurement of it, but for the tiles."""
        return {**self.shape._asdict(), "precision": self.precision, "pass": self.name}


class Pass:
    """A pass on tensors of its own.

    Attributes:
        problem: What its launches depend on.
        key: Of its entry in the table of tiles.
    """

    def __init__(self, work: Work, device: str) -> None:
        shape, (dtype, self._tolerance) = work.shape, PRECISIONS[work.precision]
        torch.set_float32_matmul_precision("high" if work.precision == "tf32" else "highest")
        self._is_backward = work.name == "backward"
        self.window, self._scale = shape.window, shape.head_dim**-0.5
        rows, heads = (shape.batch, *shape.map), (shape.heads, shape.head_dim)
        self._qkv = torch.empty(*rows, 3, *heads, dtype=dtype, device=device)
        rpb = torch.empty(shape.heads, *self.window.bias_shape, device=device)
        self._grad_output = torch.empty(*rows, *heads, dtype=dtype, device=device)
        self._inputs = Inputs(*_parts(self._qkv), rpb)
        self._gradients = Inputs(*_parts(torch.empty_like(self._qkv)), torch.empty_like(rpb))
        self._output = torch.empty_like(self._grad_output)
        self._lse = torch.empty(*rows, shape.heads, device=device)
        self._sample = sorted({0, shape.batch - 1})
        self.problem = Problem.of(describe(self._inputs))
        self.key = Key.of(self.problem, self.window)

    def fill(self) -> None:
        """Random numbers, always the same, and what a backward needs of the forward."""
        generator = torch.Generator(self._qkv.device).manual_seed(0)
        for tensor in (self._qkv, self._inputs.rpb, self._grad_output):
            assert tensor is not None
            tensor.normal_(generator=generator)
        if self._is_backward:
            self._output, self._lse = self._forward(self._inputs)

    def use(self, tiles: Tiles) -> None:
        """Choose these from now on."""
        tile_table.table()[self.key] = {name: getattr(tiles, name) for name in KERNELS}
        for module in (fused_forward, fused_backward):
            module._prepare.cache_clear()

    def run(self, grad_output: Tensor | None = None) -> Sequence[Tensor | None]:
        """The results: output and log-sum-exp, or the gradients."""
        if not self._is_backward:
            return self._forward(self._inputs)
        fused_backward.backward(
            self._grad_output if grad_output is None else grad_output, None, self._inputs,
            self._output, self._lse, self.window, self._scale, self._gradients,
        )  # fmt: skip
        return self._gradients

    def check(self, tiles: Tiles) -> float:
        """Run with uninitialised memory full of NaN.

        Returns:
            The largest norm of a result's error over the norm of the exact result.

        Raises:
            ArithmeticError: It is too large, or an image was not written.
        """
        self.use(tiles)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            for gradient in self._gradients[:4]:
                assert gradient is not None
                gradient.fill_(torch.nan)
            results = self.run(self._sampled_grad)
        finally:
            torch.use_deterministic_algorithms(before)
        errors = []
        for actual, exact in zip(results, self._exact, strict=False):
            assert actual is not None
            is_written = actual.isfinite().all()
            if actual.shape != exact.shape:  # all but the bias's gradient are of all images
                actual = actual[self._sample]
            relative = (actual.double() - exact).norm() / exact.norm()
            errors.append(relative.where(is_written, torch.nan))
        error = float(torch.stack(errors).max())
        if not error <= self._tolerance:
            raise ArithmeticError(f"relative error {error:.2g}, more than {self._tolerance}")
        return float(f"{error:.2g}")

    def time(self, tiles: Tiles, milliseconds: int = 20) -> Timing:
        """Of a CUDA graph of the pass."""
        self.use(tiles)
        self.run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        times = do_bench(graph.replay, warmup=5, rep=milliseconds, quantiles=(0.5, 0.1, 0.9))
        return Timing(*(round(1e3 * time, 2) for time in times))

    def _forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return fused_forward.forward(inputs, self.window, self._scale)

    @cached_property
    def _sampled_grad(self) -> Tensor:
        """Zero but for the images that are compared, so that the bias's gradient is theirs."""
        grad = torch.zeros_like(self._grad_output)
        grad[self._sample] = self._grad_output[self._sample]
        return grad

    @cached_property
    def _exact(self) -> Sequence[Tensor]:
        """Of these images, in fp64."""
        assert self._inputs.rpb is not None
        inputs = Inputs(*_parts(self._qkv[self._sample].double()), self._inputs.rpb.double())
        settings = self.window, self._scale
        output, lse = reference.forward(inputs, *settings)
        if not self._is_backward:
            return output, lse
        grad_output = self._grad_output[self._sample].double()
        gradients = [torch.empty_like(x) for x in inputs[:4] if x is not None]
        reference.backward(grad_output, None, inputs, output, lse, *settings, Inputs(*gradients))
        return gradients


def _parts(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.unbind(-3)
    return query, key, value
