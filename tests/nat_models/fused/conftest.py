"""Fused operations on the CPU: Triton's kernels run in its interpreter."""

import pytest

from nat_models.fused import use, using


@pytest.fixture
def use_fused(monkeypatch):
    """All operations run fused; the device is a GPU's or the interpreter's."""
    monkeypatch.setattr(use, "_has_kernels", lambda device, generation: True)
    with using("add_layer_norm", "mlp"):
        yield


@pytest.fixture
def device(use_fused):
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
