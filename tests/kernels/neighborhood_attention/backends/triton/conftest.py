import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _freed_memory() -> Iterator[None]:
    """Cached memory goes back to the GPU, which the processes of a run share."""
    yield
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > 2**30:
        torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def workers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the processes of one run."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def much_memory(workers_folder: Path) -> Any:
    """`with much_memory():` one process at a time, since only one fits into the GPU."""

    @contextmanager
    def alone() -> Iterator[None]:
        with open(workers_folder / "much_memory", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                torch.cuda.empty_cache()

    return alone


@pytest.fixture
def tf32() -> Iterator[None]:
    """fp32 matrix products in TF32, as PyTorch's own."""
    matmul = torch.backends.cuda.matmul  # pytest's monkeypatch cannot restore it
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    yield
    matmul.allow_tf32 = before
