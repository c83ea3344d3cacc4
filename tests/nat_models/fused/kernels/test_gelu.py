"""The polynomial's GELU against the error function's, in fp64."""

import pytest
import torch
from torch.nn import functional as F

triton = pytest.importorskip("triton", reason="Triton is not available on this platform")
import triton.language as tl  # noqa: E402

from nat_models.fused.kernels.gelu import gelu, gelu_with_derivative  # noqa: E402

pytestmark = pytest.mark.interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _kernel(x, alone, value, derivative, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + offset)
    tl.store(alone + offset, gelu(values))
    results = gelu_with_derivative(values)
    tl.store(value + offset, results[0])
    tl.store(derivative + offset, results[1])


def evaluate(x):
    results = [torch.empty_like(x) for _ in range(3)]
    _kernel[(len(x) // 1024,)](x, *results, BLOCK=1024)
    return results


def test_accuracy():
    x = torch.linspace(-12, 12, 2**14, device=DEVICE)
    alone, value, derivative = evaluate(x)
    reference = x.double().requires_grad_()
    expected = F.gelu(reference)
    expected.sum().backward()
    torch.testing.assert_close(alone, value)
    torch.testing.assert_close(alone.double(), expected, rtol=3e-5, atol=3e-7)
    torch.testing.assert_close(derivative.double(), reference.grad, rtol=0, atol=3e-5)


def test_values_that_are_no_numbers():
    x = torch.zeros(1024, device=DEVICE)
    x[0], x[1], x[2] = torch.inf, -torch.inf, torch.nan
    alone, _, _ = evaluate(x)
    assert alone[0] == torch.inf
    assert abs(alone[1]) < 1e-6
    assert alone[2].isnan()
