"""Kernels compiled ahead, in processes beside the one that measures.

Triton keeps what it compiled on disk, so that the process that measures only loads it. Nothing is
launched: the GPU is left alone meanwhile.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from neighborhood_attention.backends.triton import tile_table
from neighborhood_attention.backends.triton.tile import Tiles
from neighborhood_attention.tune.passes import Pass, Work
from neighborhood_attention.tune.records import Deadline

MAX_PROCESSES = 14


@dataclass(frozen=True)
class Part:
    """A pass with certain tiles."""

    work: Work
    tiles: Tiles

    def __call__(self) -> None:
        """Compile its kernels; the tensors take no memory, since none is written.

        Raises:
            RuntimeError: Whatever the compiler raised, as another process can take it.
        """
        try:
            with compile_only():
                compiled = Pass(self.work, "cpu")
                compiled.use(self.tiles)
                compiled.run()
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from None


@contextmanager
def compile_only() -> Iterator[list[Any]]:
    """Triton compiles, and launches nothing; what it compiled is in the list.

    Tensors may be on the CPU: the tiles, and whether kernels overlap, are those of the GPU.
    """
    run, capability = triton.JITFunction.run, tile_table.capability
    of_gpu = capability(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    compiled: list[Any] = []

    def only_compile(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(kernel, *args, grid=grid, warmup=True, **options))

    triton.JITFunction.run = only_compile
    tile_table.capability = cache(lambda _: of_gpu)
    try:
        yield compiled
    finally:
        triton.JITFunction.run, tile_table.capability = run, capability


class Ahead:
    """Calls made by other processes, in order; as a context it ends them.

    Args:
        calls: Functions without arguments that another process can take; each is called once.
        processes: How many, by default 2 fewer than there are cores, and 14 at most.
    """

    def __init__(self, calls: Iterable[Callable[[], object]], processes: int | None = None) -> None:
        distinct = list(dict.fromkeys(calls))
        most = max(1, min(MAX_PROCESSES, (os.cpu_count() or 3) - 2, len(distinct)))
        self._pool = ProcessPoolExecutor(processes or most, multiprocessing.get_context("spawn"))
        self._futures = {call: self._pool.submit(call) for call in distinct}

    def wait(self, call: Callable[[], object], deadline: Deadline) -> Any:
        """The result of a call; None if it was not asked for, or its process died.

        Raises:
            TimeoutError: The deadline came first.
            Exception: What the call raised.
        """
        if call not in self._futures:
            return None
        try:
            return self._futures[call].result(deadline.left)
        except (FutureTimeoutError, CancelledError):
            raise TimeoutError from None
        except BrokenProcessPool:  # the process that measures compiles by itself
            return None

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
