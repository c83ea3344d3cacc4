"""The fused kernels against the definition: interpreted on the CPU, natively on a GPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, check, inputs, run

from neighborhood_attention import na2d_qkvpacked

pytestmark = pytest.mark.interpreter

NATIVE = torch.cuda.is_available()
# Small, since the interpreter is slow: test_fused_native.py has the real sizes.
CASES = {
    "whole group": Case((7, 7), (7, 7), batch=1, heads=1),
    "groups of two lengths": Case((7, 5), (3, 2), dilation=(2, 2), head_dim=8),
    "interior tiles": Case((9, 18), (3, 2), batch=1, heads=1, head_dim=8),
    "several column strips": Case((2, 18), (2, 12), batch=1, heads=1, head_dim=8),
    "large head, no bias": Case((6, 9), (5, 2), dilation=(1, 3), batch=1, head_dim=20, rpb=False),
    "stride, causal rows": Case(
        (7, 9), (4, 3), stride=(2, 3), is_causal=(True, False), batch=1, heads=1, head_dim=8
    ),
    "stride, causal columns": Case(
        (3, 18), (1, 4), stride=(1, 3), dilation=(1, 2), is_causal=(False, True), batch=1, heads=1
    ),
}


# The interpreter computes bf16 wrongly.
@pytest.mark.parametrize("dtype", [torch.float32] + [torch.bfloat16] * NATIVE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name, dtype, device):
    check(na2d_qkvpacked, CASES[name], dtype, device, backend="fused")


@pytest.mark.parametrize("name", ["stride, causal rows", "large head, no bias"])
def test_agrees_with_the_definition_in_fp16(name, device):
    check(na2d_qkvpacked, CASES[name], torch.float16, device, backend="fused")


@st.composite
def cases(draw):
    longest = 16 if NATIVE else 8

    def axis():
        kernel_size, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        length = draw(st.integers(kernel_size * dilation, longest))
        return length, kernel_size, draw(st.integers(1, kernel_size)), dilation, draw(st.booleans())

    axes = list(zip(axis(), axis(), strict=True))
    return Case(*axes, batch=1, heads=1, head_dim=8, rpb=draw(st.booleans()))


@settings(max_examples=12 if NATIVE else 4)
@given(cases())
def test_agrees_with_the_definition_on_random_problems(case):
    check(na2d_qkvpacked, case, torch.float32, "cuda" if NATIVE else "cpu", backend="fused")


def test_a_large_bias_overflows_nowhere(device):
    # e^100 is infinite. The groups of rows have two lengths, and not the same number of tiles.
    case = Case((17, 2), (2, 1), dilation=(2, 1), batch=1, heads=1, head_dim=8)
    qkv, rpb = inputs(case, torch.float32, device)
    grad_output = torch.randn_like(qkv[:, :, :, 0])
    grad_lse = torch.zeros_like(grad_output[..., 0])
    plain, shifted = (
        run(na2d_qkvpacked, case, qkv, rpb + shift, grad_output, grad_lse, backend="fused")
        for shift in (0, 100)
    )
    for i in (0, 2, 3):  # output and gradients, which do not depend on the shift
        torch.testing.assert_close(shifted[i], plain[i], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64; use backend='reference'"),
        ({"head_dim": 257}, "head dimensions up to 256, not 257"),
    ],
)
def test_it_names_what_it_does_not_support(change, message, device):
    head_dim, dtype = change.get("head_dim", 8), change.get("dtype", torch.float32)
    qkv = torch.ones(1, 3, 3, 3, 1, head_dim, dtype=dtype, device=device)
    with pytest.raises(NotImplementedError, match=f"backend='fused' .*{message}"):
        na2d_qkvpacked(qkv, 3, backend="fused")
    na2d_qkvpacked(qkv, 3)
