"""What the tests of the families share."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture
def assert_parity(tiny_model, to_original) -> Callable[..., None]:
    """Compares a small model's logits in fp64 with the original model's, from the original keys."""

    def assert_parity(
        name: str, size: tuple[int, int], original: Any, *settings: Any, **kwargs: Any
    ) -> None:
        weights = to_original(tiny_model(name, dtype=torch.float64, **kwargs).state_dict())
        model = tiny_model(name, dtype=torch.float64, **kwargs)
        model.load_state_dict(weights)
        images = torch.randn(1, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            expected = original(weights, images, *settings)
            torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)

    return assert_parity
