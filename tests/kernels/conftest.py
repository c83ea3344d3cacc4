"""For every kernel test: uninitialised memory holds NaN, so that an unwritten element shows."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    # Deterministic mode fills torch.empty and its relatives with NaN (integers: their maximum).
    # warn_only: it shall not forbid the operations that have no deterministic version.
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(params=["reference", pytest.param("fused", marks=pytest.mark.interpreter)])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn."""
    return request.param
