"""The fused kernels against the definition: interpreted on the CPU, natively on a GPU."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, attention, check, random_gradients, random_tensors, results

from neighborhood_attention import (
    na1d,
    na1d_qkvpacked,
    na2d,
    na2d_qkvpacked,
    na3d,
    na3d_qkvpacked,
)
from neighborhood_attention.backends import load

pytestmark = pytest.mark.interpreter

NATIVE = torch.cuda.is_available()
fp32, fp16 = torch.float32, torch.float16
FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
PACKED = {1: na1d_qkvpacked, 2: na2d_qkvpacked, 3: na3d_qkvpacked}
ONE = {"batch": 1, "heads": 1}
# Small, since the interpreter is slow: test_fused_native.py has the real sizes.
PACKED_CASES = {
    "whole group": Case((7, 7), (7, 7), **ONE),
    "groups of two lengths": Case((7, 5), (3, 2), dilation=(2, 2), head_dim=8),
    "interior tiles": Case((9, 18), (3, 2), **ONE, head_dim=8),
    "several column strips": Case((2, 18), (2, 12), **ONE, head_dim=8),
    "large head, no bias": Case((6, 9), (5, 2), dilation=(1, 3), batch=1, head_dim=20, rpb=False),
    "sequence": Case((70,), (3,), stride=(2,), **ONE),
    "volume": Case((3, 4, 5), (2, 3, 3), dilation=(1, 1, 1), is_causal=(True, False, False), **ONE),
}
CASES = {
    "stride, causal rows": Case(
        (7, 9), (4, 3), stride=(2, 3), is_causal=(True, False), **ONE, head_dim=8
    ),
    "stride, causal columns": Case(
        (3, 18), (1, 4), stride=(1, 3), dilation=(1, 2), is_causal=(False, True), **ONE
    ),
    "grouped heads": Case((4, 6), (3, 3), batch=1, heads=4, key_heads=2),
    "one key head, without a bias": Case((20,), (5,), batch=1, heads=3, key_heads=1, rpb=False),
    "small values": Case((5, 6), (3, 3), **ONE, value_dim=8, head_dim=24),
    "large values, additional keys": Case((33,), (3,), **ONE, value_dim=40, additional=5),
    "more additional keys than a strip": Case((3, 5), (3, 3), **ONE, additional=40),
    "additional keys in a volume": Case((2, 3, 4), (1, 2, 3), **ONE, additional=1, rpb=False),
    "no additional keys": Case((5,), (3,), **ONE, additional=0),
    "axes of length 1": Case((1, 5), (1, 3), **ONE),
    "a window of one token": Case((5, 4), (1, 1), **ONE),
}


# The interpreter computes bf16 wrongly.
@pytest.mark.parametrize("dtype", [fp32] + [torch.bfloat16] * NATIVE, ids=str)
@pytest.mark.parametrize("name", PACKED_CASES)
def test_a_packed_projection_agrees_with_the_definition(name, dtype, device):
    case = PACKED_CASES[name]
    check(PACKED[len(case.spatial)], case, dtype, device, backend="fused")


@pytest.mark.parametrize("dtype", [fp32] + [torch.bfloat16] * NATIVE, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name, dtype, device):
    case = CASES[name]
    check(FUNCTIONS[len(case.spatial)], case, dtype, device, backend="fused")


@pytest.mark.parametrize("name", ["stride, causal rows", "large values, additional keys"])
def test_agrees_with_the_definition_in_fp16(name, device):
    case = CASES[name]
    check(FUNCTIONS[len(case.spatial)], case, fp16, device, backend="fused")


@st.composite
def cases(draw):
    longest = 16 if NATIVE else 7

    def axis():
        kernel_size, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2))
        length = draw(st.integers(kernel_size * dilation, max(longest, kernel_size * dilation)))
        return length, kernel_size, draw(st.integers(1, kernel_size)), dilation, draw(st.booleans())

    dims = draw(st.integers(1, 3 if NATIVE else 2))
    axes = list(zip(*(axis() for _ in range(dims)), strict=True))
    return Case(
        *axes, batch=1, heads=2, key_heads=draw(st.sampled_from([1, 2])), head_dim=8,
        value_dim=draw(st.sampled_from([8, 20])), rpb=draw(st.booleans()),
        additional=draw(st.sampled_from([None, 3])),
    )  # fmt: skip


@settings(max_examples=8 if NATIVE else 4)  # each compiles kernels of its own
@given(cases())
def test_agrees_with_the_definition_on_random_problems(case):
    device = "cuda" if NATIVE else "cpu"
    check(FUNCTIONS[len(case.spatial)], case, fp32, device, backend="fused")


def test_a_large_bias_overflows_nowhere(device):
    # e^100 is infinite. The groups have two lengths, and not the same number of tiles.
    case = Case((65,), (2,), dilation=(2,), **ONE, head_dim=8)
    tensors = random_tensors(case.shapes(), fp32, device)
    grad_output, grad_lse = random_gradients(case, fp32, device)
    plain, shifted = (
        results(fused(case), tensors | {"rpb": tensors["rpb"] + shift}, (grad_output, 0 * grad_lse))
        for shift in (0, 100)
    )
    torch.testing.assert_close(shifted.pop("lse"), plain.pop("lse") + 100)
    for name, expected in plain.items():  # they do not depend on the shift
        torch.testing.assert_close(shifted[name], expected, rtol=1e-3, atol=1e-4)


def fused(case):
    """The function of this case's tensors alone."""
    function = FUNCTIONS[len(case.spatial)]
    return partial(function, **case.settings, return_lse=True, backend="fused")


def surround(tensor, value):
    """The same numbers as a slice, on every axis, of a larger tensor full of `value`."""
    larger = torch.full([n + 3 for n in tensor.shape], value, dtype=tensor.dtype)
    view = larger.to(tensor.device)[(slice(1, -2),) * tensor.dim()]
    return view.copy_(tensor)


WHOLE_GROUP = Case((6, 5), (3, 3), **ONE, head_dim=8)  # all gradients in one pass
ISOLATED = [Case((3, 5), (3, 3), **ONE, head_dim=8, value_dim=20, additional=3)] + [
    Case((24, 20), (5, 5), batch=3, head_dim=32),
    Case((30, 40), (7, 7), dilation=(2, 3), heads=4, key_heads=2, head_dim=32, additional=40),
    Case((300,), (9,), head_dim=64),
    Case((5, 9, 10), (3, 3, 4), head_dim=20),
] * NATIVE
DTYPES = [fp32, fp16] + [torch.bfloat16] * NATIVE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [WHOLE_GROUP, *ISOLATED], ids=str)
def test_memory_around_the_views_changes_nothing(case, dtype, device):
    tensors = random_tensors(case.shapes(), dtype, device)
    grads = random_gradients(case, dtype, device)
    views = {name: surround(x, torch.nan) for name, x in tensors.items()}
    found = results(fused(case), views, [surround(x, torch.nan) for x in grads])
    for name, expected in results(fused(case), tensors, grads).items():
        assert torch.equal(found[name], expected), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [WHOLE_GROUP, Case((6,), (3,), **ONE, additional=2), *ISOLATED[1:]], ids=str
)
def test_tokens_outside_a_window_however_large_change_nothing(case, dtype, device):
    # On the first axis, queries before `near` see the first window. The others are zero.
    kernel_size, dilation = case.kernel_size[0], case.dilation[0]
    near, far = (kernel_size // 2 + 1) * dilation, kernel_size * dilation
    tensors = random_tensors(case.shapes(), dtype, device)
    grads = random_gradients(case, dtype, device)
    for tensor in (tensors["query"], *grads):
        tensor[:, near:] = 0
    # Products with `near` queries and their gradients overflow, sums of values alone do not.
    large = 1 if dtype == fp16 else 1024
    grads[0].mul_(large)
    huge = {name: x.clone() for name, x in tensors.items()}
    huge["key"][:, far:] = torch.finfo(dtype).max / 4
    huge["value"][:, far:] = torch.finfo(dtype).max / large
    found = results(fused(case), huge, grads)
    for name, expected in results(fused(case), tensors, grads).items():
        count = near if name in ("output", "lse") else None
        assert torch.equal(found[name][:, :count], expected[:, :count]), name
    for name in ("grad_key", "grad_value"):
        assert not found[name][:, far:].any()


def test_a_bias_beyond_the_range_of_fp16_stays_finite(device):
    query = torch.randn(1, 6, 1, 8, device=device).half()
    rpb = torch.full((1, 5), 60000.0, device=device)
    output, lse = na1d(query, query, query, 3, rpb=rpb, return_lse=True, backend="fused")
    plain = na1d(query, query, query, 3, backend="fused")
    assert lse.isfinite().all()
    torch.testing.assert_close(output, plain, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", [fp32, fp16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("length", [6, 40])
def test_a_bias_that_is_not_finite_acts_as_such(length, value, dtype, device):
    case = Case((length,), (3,), **ONE, head_dim=8)
    tensors = random_tensors(case.shapes(), dtype, device)
    tensors["rpb"][0, 1] = value  # of the key before the query
    output = fused(case)(**tensors)[0]
    if value == -torch.inf:  # such a key is masked
        expected = attention(case, **{n: x.double() for n, x in tensors.items()}, scale=8**-0.5)
        torch.testing.assert_close(output.double(), expected[0], rtol=1e-2, atol=1e-3)
    else:
        assert output[:, 1:].isnan().all()
    assert output[:, 0].isfinite().all()  # its window starts with the query


@pytest.mark.parametrize("length", [6, 40])
def test_a_bias_however_negative_is_no_mask(length, device):
    case = Case((length,), (3,), **ONE, head_dim=8)
    tensors = random_tensors(case.shapes(), fp32, device)
    tensors["rpb"] = torch.full_like(tensors["rpb"], -1e38)
    output, lse = fused(case)(**tensors)
    torch.testing.assert_close(lse, torch.full_like(lse, -1e38))
    flat = tensors | {"query": 0 * tensors["query"], "rpb": 0 * tensors["rpb"]}
    torch.testing.assert_close(output, fused(case)(**flat)[0])


@pytest.mark.parametrize(
    "case",
    [Case((6,), (3,), **ONE, head_dim=8), Case((3, 5), (3, 3), **ONE, head_dim=8, additional=3)],
    ids=str,
)
def test_a_scale_of_zero_leaves_the_bias_alone(case, device):
    tensors = random_tensors(case.shapes(), fp32, device)
    grads = random_gradients(case, fp32, device)
    large = {n: x * 1e15 if n in ("query", "key") else x for n, x in tensors.items()}
    plain, found = (results(partial(fused(case), scale=0.0), x, grads) for x in (tensors, large))
    for name, expected in plain.items():
        assert torch.equal(found[name], expected), name
    assert not found["grad_query"].any()
    assert not found["grad_key"].any()


@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.parametrize("value", [torch.nan, 3e38], ids=["nan", "overflow"])
def test_scores_that_are_not_finite_are_not_hidden(value, name, device):
    case = Case((12,), (3,), **ONE, rpb=False)
    tensors = {n: torch.ones(s, device=device) for n, s in case.shapes().items()}
    tensors[name][:, 5] = value
    grads = [torch.ones_like(tensors["query"]), torch.zeros_like(tensors["query"][..., 0])]
    found = results(fused(case), tensors, grads)
    touched = [5] if name == "query" else [4, 5, 6]  # the queries that see the key
    broken = {n: (~x.view(12, -1).isfinite().all(-1)).nonzero() for n, x in found.items()}
    for result in ("output", "lse"):
        assert broken[result].flatten().tolist() == touched, result
    # In the gradient a NaN key reaches all of its strip: 0 * NaN.
    assert set(touched) <= set(broken["grad_query"].flatten().tolist())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float64}, "float64; use backend='reference'"),
        ({"head_dim": 257}, "head dimensions up to 256, not 257"),
    ],
)
def test_it_names_what_it_does_not_support(change, message, device):
    head_dim, dtype = change.get("head_dim", 8), change.get("dtype", fp32)
    qkv = torch.ones(1, 3, 3, 3, 1, head_dim, dtype=dtype, device=device)
    with pytest.raises(NotImplementedError, match=f"backend='fused' .*{message}"):
        na2d_qkvpacked(qkv, 3, backend="fused")
    na2d_qkvpacked(qkv, 3)


def test_gpus_of_amd_are_left_to_the_reference(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not load("fused")._has_capability.__wrapped__(torch.device("cuda"))


def test_it_names_a_value_dimension_that_is_too_large(device):
    query = torch.ones(1, 3, 1, 8, device=device)
    with pytest.raises(NotImplementedError, match="head dimensions up to 256, not 300"):
        na1d(query, query, torch.ones(1, 3, 1, 300, device=device), 3, backend="fused")


@pytest.mark.parametrize("additional", [None, 2])
def test_an_empty_batch_has_empty_results_and_no_gradient(additional, device):
    case = Case((5,), (3,), batch=0, additional=additional)
    tensors = random_tensors(case.shapes(), fp32, device)

    found = results(fused(case), tensors, random_gradients(case, fp32, device))
    assert found["output"].shape == (0, 5, 2, 16)
    assert not found["grad_rpb"].any()
