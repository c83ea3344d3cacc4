"""For every kernel test: uninitialised memory holds NaN, so that an unwritten element shows.

The processes of a run share the GPU: a test that takes `much_memory` runs while no other does.
"""

import fcntl
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def workers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the processes of one run."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(autouse=True)
def _gpu_memory(workers_folder: Path) -> Iterator[Callable[[], None]]:
    """Shares the GPU's memory with other tests; the function yielded waits until it is alone."""
    if not torch.cuda.is_available():
        yield lambda: None
        return
    with ExitStack() as stack:
        gate, memory = (
            stack.enter_context(open(workers_folder / name, "w")) for name in ("gate", "memory")
        )

        def be_alone() -> None:
            fcntl.flock(memory, fcntl.LOCK_UN)
            fcntl.flock(gate, fcntl.LOCK_EX)  # no other test starts
            fcntl.flock(memory, fcntl.LOCK_EX)

        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(memory, fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield be_alone
        if getattr(sys, "last_value", None) is not None:  # of a failed test, with all its tensors
            sys.last_value = sys.last_traceback = sys.last_exc = None
            gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture
def much_memory(_gpu_memory: Callable[[], None]) -> Callable[[], None]:
    """much_memory(): before a test allocates so much that it needs the GPU alone."""
    return _gpu_memory


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    # Deterministic mode fills torch.empty and its relatives with NaN (integers: their maximum).
    # warn_only: it shall not forbid the operations that have no deterministic version.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _general_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, small problems take the kernels of large ones: those of few tokens have tests."""
    if find_spec("triton") is not None:
        module = "neighborhood_attention.backends.triton.fused_direct_forward"
        monkeypatch.setattr(f"{module}.is_worth_it", lambda problem: False)


@pytest.fixture(params=["reference", pytest.param("fused", marks=pytest.mark.interpreter)])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return request.param
