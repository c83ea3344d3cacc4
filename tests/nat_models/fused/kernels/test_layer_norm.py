"""Addition and LayerNorm against their definition in fp64."""

import pytest
import torch
from torch.nn import functional as F

layer_norm = pytest.importorskip("nat_models.fused.kernels.layer_norm")

pytestmark = pytest.mark.interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32, FP16 = torch.float32, torch.float16
# channels, tokens a sample, branch, gamma, keep, dtype of x, of the branch, of the norm
CASES = {
    "norm": (64, 7, False, False, False, FP32, FP32, FP32),
    "add": (96, 5, True, False, False, FP32, FP32, FP32),
    "half": (192, 6, True, False, True, FP16, FP16, FP16),
    "all": (64, 75, True, True, True, FP32, FP16, FP16),
    "wide": (2500, 1, True, True, False, FP32, FP32, FP32),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def problem(request):
    channels, tokens, has_branch, has_gamma, has_keep, *dtypes = request.param
    rows = 3 * tokens

    def draw(*shape, dtype=FP32):
        return torch.randn(shape, device=DEVICE).to(dtype)

    x = draw(rows, channels, dtype=dtypes[0])
    branch = draw(rows, channels, dtype=dtypes[1]) if has_branch else None
    gamma = draw(channels) if has_gamma else None
    keep = torch.tensor([0.0, 2.0, 0.5], device=DEVICE) if has_keep else None
    return x, branch, gamma, keep, draw(channels), draw(channels), dtypes[2]


def definition(x, branch, gamma, keep, weight, bias):
    if branch is not None:
        if gamma is not None:
            branch = branch * gamma
        if keep is not None:
            branch = branch * keep.repeat_interleave(len(x) // len(keep)).unsqueeze(1)
        x = x + branch
    return x, F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def forward(problem):
    """The sum, its norm, and what the backward takes."""
    *tensors, dtype = problem
    x, branch = tensors[:2]
    total = None if branch is None else torch.empty_like(x)
    normalized = torch.empty_like(x, dtype=dtype)
    kept = torch.empty_like(normalized), x.new_empty(len(x), dtype=FP32)
    layer_norm.forward(*tensors, 1e-5, total, normalized, *kept)
    return (x if branch is None else total), normalized, *kept


def assert_close(actual, expected, dtype=FP32):
    """To the precision of the result, or of what it was computed from."""
    tolerance = 2e-3 if FP16 in (actual.dtype, dtype) else 1e-5
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_forward(problem):
    total, normalized = definition(*map(double, problem[:-1]))
    variance, mean = torch.var_mean(total, -1, correction=0, keepdim=True)
    rstd = (variance + 1e-5).rsqrt()
    exact = total, normalized, (total - mean) * rstd, rstd.squeeze(-1)
    for actual, expected in zip(forward(problem), exact, strict=True):
        assert_close(actual, expected, problem[0].dtype)


@pytest.mark.parametrize("uses_sum", [True, False], ids=["sum", "norm-only"])
def test_backward(problem, uses_sum, monkeypatch):
    monkeypatch.setattr(layer_norm, "WAVES", 2)  # programs walk over several blocks
    x, branch, gamma, keep, weight, bias, dtype = problem
    leaves = [
        t if t is None else t.double().requires_grad_() for t in (x, branch, gamma, weight, bias)
    ]
    total, normalized = definition(*leaves[:3], double(keep), *leaves[3:])
    grad_total = torch.randn_like(x) if uses_sum else None
    grad_normalized = torch.randn_like(x, dtype=dtype)
    value = (normalized * grad_normalized.double()).sum()
    if uses_sum:
        value = value + (total * grad_total.double()).sum()
    value.backward()

    grad_x = torch.empty_like(x)
    grad_branch = None if branch is None else torch.empty_like(branch)
    again = torch.empty_like(grad_normalized)
    parameters = weight.new_empty(2 if gamma is None else 3, len(weight))
    layer_norm.backward(
        *forward(problem)[2:], branch, gamma, keep, weight, bias, grad_total, grad_normalized,
        grad_x, grad_branch, again, parameters,
    )  # fmt: skip
    assert_close(again, normalized.detach())
    assert_close(grad_x, leaves[0].grad, dtype)
    if branch is not None:
        assert_close(grad_branch, leaves[1].grad, dtype)
    order = leaves[3], leaves[4], leaves[2]
    for actual, leaf in zip(parameters, order[: len(parameters)], strict=True):
        assert leaf is not None
        scale = leaf.grad.abs().max().item()
        precision = 2e-3 if FP16 in (x.dtype, dtype) else 1e-5
        torch.testing.assert_close(actual.double(), leaf.grad, rtol=0, atol=precision * scale)


def double(tensor):
    return None if tensor is None else tensor.double()


def test_constant_rows_are_normalized_to_the_shift():
    x = torch.full((5, 64), 3.0, device=DEVICE)
    weight, bias = torch.randn(2, 64, device=DEVICE)
    normalized = torch.empty_like(x)
    layer_norm.forward(x, None, None, None, weight, bias, 1e-5, None, normalized, None, None)
    torch.testing.assert_close(normalized, bias.expand(5, -1))
