from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def tf32() -> Iterator[None]:
    """fp32 matrix products in TF32, as PyTorch's own."""
    matmul = torch.backends.cuda.matmul  # pytest's monkeypatch cannot restore it
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    yield
    matmul.allow_tf32 = before
