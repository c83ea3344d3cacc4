"""Kernels compiled ahead of their use, in processes beside the one that measures.

Triton keeps what it compiled on disk, so that the process that measures only loads it. Our own
kernels are compiled without a launch, beside measurements. Peers are run, so they come before them.
"""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# Each process compiles by itself: PyTorch's compiler, imported later, shall start no further ones.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"

import torch
from peers import PROVIDERS, Provider
from problem import Problem, random_tensors, use_precision

from neighborhood_attention.backends import Inputs, load
from neighborhood_attention.geometry import Neighborhood
from neighborhood_attention.tune.ahead import Ahead, compile_only
from neighborhood_attention.tune.records import Deadline

# Of peers with more elements, one is run at a time.
LARGE_ELEMENTS = 2**28
LOCK = Path(tempfile.gettempdir(), "nat-models-large-peer.lock")


class Kernel(NamedTuple):
    """What the compiler says of a kernel; registers and spills are those of a thread."""

    name: str
    warps: int
    shared_memory: int  # bytes of a program
    registers: int | None  # None without a GPU
    spills: int | None


class OperatorPass(NamedTuple):
    """One pass of one of our backends."""

    backend: str
    problem: Problem
    precision: str
    bias: bool
    backward: bool

    def __call__(self) -> list[Kernel]:
        """Compile its kernels."""
        return compile_operator(self)


def compile_operator(work: OperatorPass) -> list[Kernel]:
    """Compile the kernels of a pass; the tensors take no memory, since none is written."""
    dtype = use_precision(work.precision)
    problem = work.problem
    kernel_size, dilation = problem.kernel_size, problem.dilation
    ones = (1,) * problem.dims
    window = Neighborhood(kernel_size, ones, dilation, (False,) * problem.dims)
    scale = problem.settings[1]
    rows = problem.batch, *problem.map, problem.heads
    sizes = [2 * k - 1 for k in kernel_size]

    def inputs() -> Inputs:
        qkv = torch.empty(*rows[:-1], 3, problem.heads, problem.head_dim, dtype=dtype)
        rpb = torch.empty(problem.heads, *sizes) if work.bias else None
        return Inputs(*qkv.unbind(-3), rpb)

    backend = load(work.backend)
    with compile_only() as compiled, as_on_the_gpu():
        if work.backward:
            output = torch.empty(*rows, problem.head_dim, dtype=dtype)
            lse = torch.empty(rows)
            backend.backward(output, None, inputs(), output, lse, window, scale, inputs())
        else:
            backend.forward(inputs(), window, scale)
    return [_described(kernel) for kernel in compiled]


@contextmanager
def as_on_the_gpu() -> Iterator[None]:
    """Questions about the device of tensors on the CPU are answered for the GPU."""
    capability = torch.cuda.get_device_capability
    properties = torch.cuda.get_device_properties
    torch.cuda.get_device_capability = lambda _=None: capability(0)
    torch.cuda.get_device_properties = lambda _=None: properties(0)
    try:
        yield
    finally:
        torch.cuda.get_device_capability = capability
        torch.cuda.get_device_properties = properties


def _described(compiled: Any) -> Kernel:
    metadata = compiled.metadata
    registers = spills = None
    if torch.cuda.is_available():
        _ = compiled.run  # loads it, and makes its launcher
        registers, spills = compiled.n_regs, compiled.n_spills
    return Kernel(compiled.name, metadata.num_warps, metadata.shared, registers, spills)


class PeerRun(NamedTuple):
    """Both passes of a peer."""

    provider: str
    problem: Problem
    precision: str
    bias: bool

    def __call__(self) -> None:
        """Run them once, so that PyTorch compiles them and keeps the result on disk."""
        is_large = self.problem.elements > LARGE_ELEMENTS
        with open(LOCK, "w") as lock:
            if is_large:  # the processes share the GPU's memory
                fcntl.flock(lock, fcntl.LOCK_EX)
            self._run()
            torch.cuda.synchronize()
            torch._dynamo.reset()
            torch.cuda.empty_cache()

    def _run(self) -> None:
        tensors = random_tensors(self.problem, use_precision(self.precision), self.bias)
        for call in PROVIDERS[self.provider].prepare(self.problem, tensors):
            call.forward()
            call.backward(call.arrange(tensors.grad))


Part = OperatorPass | PeerRun


def parts_of(provider: Provider, problem: Problem, precision: str, bias: bool) -> list[Part]:
    """What can be compiled ahead of a measurement."""
    what = provider.name, problem, precision, bias
    if provider.compiler == "triton":
        return [OperatorPass(*what, backward) for backward in (False, True)]
    refused = provider.refuses(problem, bias, False)
    return [PeerRun(*what)] if provider.compiler == "torch" and not refused else []


def wait(ahead: Ahead, part: Part, deadline: Deadline) -> list[Kernel] | None:
    """What a part returns; None where it failed: the process that measures then does it by itself.

    Raises:
        TimeoutError: The deadline came first.
    """
    try:
        found: list[Kernel] | None = ahead.wait(part, deadline)
    except TimeoutError:
        raise
    except Exception as error:
        _tell(f"{part}: {type(error).__name__}: {str(error)[:300]}")
        return None
    return found


@cache
def _tell(message: str) -> None:
    """Once, however often it is waited for."""
    print(f"ahead: {message}", flush=True)
