"""Fused operations on the CPU: Triton's kernels run in its interpreter."""

import pytest

from nat_models import fused
from nat_models.fused import functional


@pytest.fixture
def use_fused(monkeypatch):
    """All operations run fused; the device is a GPU's or the interpreter's."""
    for modes in fused.USED.values():
        for mode in modes:
            monkeypatch.setitem(modes, mode, True)
    monkeypatch.setattr(functional, "_runs_on", lambda operation, device: True)


@pytest.fixture
def device(use_fused):
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
