"""What every test gets: one thread, a fixed seed, the machine's device."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads; subprocesses inherit it

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import hypothesis
import pytest
import torch

# A deadline fails at random on a busy machine; fixed examples make a failure repeatable.
hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True)
hypothesis.settings.register_profile(
    "fuzz", deadline=None, derandomize=False, max_examples=3000, print_blob=True
)
hypothesis.settings.load_profile("repeatable")

# The first backward starts a thread for each device, and a process with such threads must not fork.
# Without a GPU there is none, unless a FakeTensorMode came first: that pretends to be eight.
if not torch.cuda.is_available():
    torch.ones(1, requires_grad=True).sum().backward()

# tests/kernels needs torch alone; a GPU machine may hold nothing more.
MISSING = [name for name in ("timm", "hydra", "lightning") if find_spec(name) is None]
collect_ignore = ["nat_models", "configs", "e2e", "packaging"] if MISSING else []


def pytest_report_header() -> str | None:
    return f"only tests/kernels: {', '.join(MISSING)} not installed" if MISSING else None


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _matmul_precision() -> None:
    """PyTorch's default; a run sets another for its whole process, in a shared fixture too."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def compose() -> Callable[..., Any]:
    """compose(NAME, *OVERRIDES): the configuration of a command, as Hydra makes it."""
    import hydra

    from nat_models.cli import config_dir

    def compose(name: str, *overrides: str) -> Any:
        with hydra.initialize_config_dir(config_dir(), version_base="1.3"):
            return hydra.compose(name, overrides=list(overrides))

    return compose
