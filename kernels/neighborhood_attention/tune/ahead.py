"""Kernels compiled ahead, in processes beside the one that measures.

Triton keeps what it compiled on disk, so that the process that measures only loads it. Nothing is
launched: the GPU is left alone meanwhile.
"""

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import triton

from neighborhood_attention.backends.triton.tile import Tiles
from neighborhood_attention.tune.passes import Pass, Work
from neighborhood_attention.tune.records import Deadline

MAX_PROCESSES = 14


class Part(NamedTuple):
    """A pass with certain tiles."""

    work: Work
    tiles: Tiles

    def compile(self) -> None:
        """Compile its kernels; the tensors take no memory, since none is written.

        Raises:
            RuntimeError: Whatever the compiler raised, as another process can take it.
        """
        run = triton.JITFunction.run

        def only_compile(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            run(kernel, *args, grid=grid, warmup=True, **options)

        triton.JITFunction.run = only_compile
        try:
            compiled = Pass(self.work, "cpu")
            compiled.use(self.tiles)
            compiled.run()
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        finally:
            triton.JITFunction.run = run


class Ahead:
    """Compiles parts in order; as a context it ends the processes."""

    def __init__(self, parts: Iterable[Part], processes: int | None = None) -> None:
        processes = processes or max(1, min(MAX_PROCESSES, (os.cpu_count() or 3) - 2))
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
        self._futures: dict[Part, Future[None]] = {}
        for part in parts:
            if part not in self._futures:
                self._futures[part] = self._pool.submit(part.compile)

    def wait(self, part: Part, deadline: Deadline) -> None:
        """Return when a part is compiled, or was not asked for.

        Raises:
            TimeoutError: The deadline came first.
            RuntimeError: What the compiler raised.
        """
        if part not in self._futures:
            return
        try:
            self._futures[part].result(deadline.left)
        except FutureTimeoutError:
            raise TimeoutError from None
        except BrokenProcessPool:  # the process that measures compiles by itself
            return

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
