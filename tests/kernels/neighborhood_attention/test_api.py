import pytest
import torch

from neighborhood_attention import (
    merge_attentions,
    na1d,
    na1d_qkvpacked,
    na2d,
    na2d_qkvpacked,
    na3d,
    na3d_qkvpacked,
)


def tensor(*shape, **options):
    return torch.ones(shape or (2, 6, 7, 2, 4), **options)


# Argument, a bad value, the error and its message.
WINDOW_ERRORS = [
    ("kernel_size", 0, ValueError, r"kernel_size=\(0, 0\): expected at least 1"),
    ("kernel_size", (3, -1), ValueError, r"kernel_size=\(3, -1\): expected at least 1"),
    ("kernel_size", (3,), ValueError, r"kernel_size=\(3,\): expected 2 entries"),
    ("kernel_size", (3, 3, 3), ValueError, r"kernel_size=\(3, 3, 3\): expected 2 entries"),
    ("kernel_size", 7, ValueError, r"kernel_size=\(7, 7\).* 7 tokens of axis 0.* at most .* 6"),
    ("kernel_size", 3.0, TypeError, r"kernel_size=3.0: expected int"),
    ("kernel_size", "3", TypeError, r"kernel_size='3': expected int"),
    ("kernel_size", True, TypeError, r"kernel_size=True: expected int"),
    ("stride", 0, ValueError, r"stride=\(0, 0\): expected 1 <= stride <= kernel_size=\(3, 3\)"),
    ("stride", (1, 4), ValueError, r"stride=\(1, 4\): expected 1 <= stride"),
    ("stride", None, TypeError, r"stride=None: expected int"),
    ("dilation", 0, ValueError, r"dilation=\(0, 0\): expected at least 1"),
    ("dilation", (1, 3), ValueError, r"dilation=\(1, 3\): spans 9 tokens of axis 1, .* 7"),
    ("dilation", 1.5, TypeError, r"dilation=1.5: expected int"),
    ("is_causal", 1, TypeError, r"is_causal=1: expected bool"),
    ("is_causal", (True,), ValueError, r"is_causal=\(True,\): expected 2 entries"),
    ("scale", "1", TypeError, r"scale='1': expected a number"),
    ("scale", float("nan"), ValueError, r"scale=nan: expected a finite number"),
    ("scale", float("inf"), ValueError, r"scale=inf: expected a finite number"),
    ("scale", True, TypeError, r"scale=True: expected a number"),
    ("rpb", [1.0], TypeError, r"rpb: expected a tensor, got list"),
    ("rpb", tensor(2, 5, 3), ValueError, r"rpb: expected shape .*\(2, 5, 5\), got \(2, 5, 3\)"),
    ("rpb", tensor(2, 5, 5, dtype=torch.int64), TypeError, r"rpb: expected fp16, .*int64"),
    ("rpb", tensor(2, 5, 5, device="meta"), ValueError, r"rpb: expected query's device cpu"),
]
BACKEND_ERRORS = [
    ("backend", "cutlass", ValueError, r"backend='cutlass': expected None or one of"),
    ("backend", 3, ValueError, r"backend=3: expected None or one of \[.*'fused'"),
    ("backend", [], ValueError, r"backend=\[\]: expected None or one of"),
    ("backend", {"fused"}, ValueError, r"backend={'fused'}: expected None or one of"),
    ("backend", "", ValueError, r"backend='': expected None or one of"),
]
DTYPES = "expected fp16, bf16, fp32 or fp64, got"
QKV_ERRORS = [
    ("query", None, TypeError, r"query: expected a tensor, got NoneType"),
    ("query", tensor(6, 7, 2, 4), ValueError, r"query: expected \[B, H, W, heads, D\], got .*\(6"),
    ("query", tensor(2, 6, 7, 1, 2, 4), ValueError, r"query: expected \[B, H, W, heads, D\]"),
    ("query", tensor(2, 6, 7, 0, 4), ValueError, r"query: expected a head .*\(2, 6, 7, 0, 4\)"),
    ("query", tensor(2, 6, 7, 2, 0), ValueError, r"query: .* head dimension, .*\(2, 6, 7, 2, 0\)"),
    ("query", tensor(dtype=torch.int32), TypeError, rf"query: {DTYPES} torch.int32"),
    ("query", tensor(dtype=torch.cfloat), TypeError, rf"query: {DTYPES} torch.complex64"),
    ("key", 1, TypeError, r"key: expected a tensor, got int"),
    ("key", tensor(6, 7, 2, 4), ValueError, r"key: expected \[B, H, W, heads, D\], got .*\(6, 7"),
    (
        "key", tensor(2, 6, 7, 2, 5), ValueError,
        r"key: expected query's shape \(2, 6, 7, key_heads, 4\), got \(2, 6, 7, 2, 5\)",
    ),
    ("key", tensor(2, 6, 8, 2, 4), ValueError, r"key: expected query's shape .*\(2, 6, 8, 2, 4\)"),
    ("key", tensor(2, 6, 7, 3, 4), ValueError, r"key: .* divides query's 2, .*\(2, 6, 7, 3, 4\)"),
    ("key", tensor(2, 6, 7, 0, 4), ValueError, r"key: expected a head .*\(2, 6, 7, 0, 4\)"),
    ("key", tensor(dtype=torch.float64), TypeError, r"key: expected query's dtype .*float64"),
    ("key", tensor(device="meta"), ValueError, r"key: expected query's device cpu, got meta"),
]  # fmt: skip
NA2D_ERRORS = [
    ("value", None, TypeError, r"value: expected a tensor, got NoneType"),
    ("value", tensor(2, 6, 7, 4), ValueError, r"value: expected \[B, H, W, heads, D\]"),
    (
        "value", tensor(2, 6, 7, 1, 4), ValueError,
        r"value: expected key's shape \(2, 6, 7, 2, D_v\), got \(2, 6, 7, 1, 4\)",
    ),
    ("value", tensor(2, 6, 7, 2, 0), ValueError, r"value: .* head dimension, .*\(2, 6, 7, 2, 0\)"),
    ("value", tensor(dtype=torch.bfloat16), TypeError, r"value: expected query's dtype .*bfloat16"),
    ("value", tensor(device="meta"), ValueError, r"value: expected query's device cpu, got meta"),
    ("additional_keys", None, ValueError, r"additional_keys=None: expected both"),
    ("additional_keys", 3, TypeError, r"additional_keys: expected a tensor, got int"),
    ("additional_values", None, ValueError, r"additional_values=None: expected both"),
    (
        "additional_keys", tensor(2, 3, 2, 5), ValueError,
        r"additional_keys: expected shape \(2, S, 2, 4\), got \(2, 3, 2, 5\)",
    ),
    ("additional_keys", tensor(), ValueError, r"additional_keys: expected .*\(2, 6, 7, 2, 4\)"),
    (
        "additional_values", tensor(2, 4, 2, 4), ValueError,
        r"additional_values: expected shape \(2, 3, 2, 4\), got \(2, 4, 2, 4\)",
    ),
    (
        "additional_keys", tensor(2, 3, 2, 4).double(), TypeError,
        r"additional_keys: expected query's dtype torch.float32, got torch.float64",
    ),
    (
        "additional_values", tensor(2, 3, 2, 4, device="meta"), ValueError,
        r"additional_values: expected query's device cpu, got meta",
    ),
]  # fmt: skip
PACKED_ERRORS = [
    ("qkv", None, TypeError, r"qkv: expected a tensor, got NoneType"),
    ("qkv", tensor(), ValueError, r"qkv: expected \[B, H, W, 3, heads, D\], got .*\(2, 6, 7, 2, 4"),
    ("qkv", tensor(2, 6, 7, 2, 2, 4), ValueError, r"qkv: expected \[B, H, W, 3, heads, D\]"),
    ("qkv", tensor(2, 6, 7, 3, 2, 0), ValueError, r"qkv: .* head dimension, .*\(2, 6, 7, 3, 2, 0"),
    ("qkv", tensor(2, 6, 7, 3, 2, 4, dtype=torch.uint8), TypeError, rf"qkv: {DTYPES} torch.uint8"),
]


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    QKV_ERRORS + NA2D_ERRORS + WINDOW_ERRORS + BACKEND_ERRORS,
)
def test_na2d_names_the_argument_that_breaks_a_rule(name, value, error, message):
    good = {"query": tensor(), "key": tensor(), "value": tensor(), "kernel_size": 3}
    good |= {f"additional_{n}": tensor(2, 3, 2, 4) for n in ("keys", "values")}
    na2d(**good)
    with pytest.raises(error, match=message):
        na2d(**good | {name: value})


@pytest.mark.parametrize(
    ("name", "value", "error", "message"), PACKED_ERRORS + WINDOW_ERRORS + BACKEND_ERRORS
)
def test_na2d_qkvpacked_names_the_argument_that_breaks_a_rule(name, value, error, message):
    good = {"qkv": tensor(2, 6, 7, 3, 2, 4), "kernel_size": 3}
    na2d_qkvpacked(**good)
    with pytest.raises(error, match=message):
        na2d_qkvpacked(**good | {name: value})


@pytest.mark.parametrize(
    ("three", "packed", "spatial"),
    [
        (na1d, na1d_qkvpacked, (9,)),
        (na2d, na2d_qkvpacked, (6, 7)),
        (na3d, na3d_qkvpacked, (6, 3, 4)),
    ],
)
def test_three_tensors_and_their_packed_form_give_the_same(three, packed, spatial, device):
    qkv = torch.randn(2, *spatial, 3, 2, 4, device=device)
    settings = {"dilation": (2, 1, 1)[: len(spatial)], "backend": "reference", "return_lse": True}
    settings["rpb"] = torch.randn(2, *[5] * len(spatial), device=device)
    for a, b in zip(three(*qkv.unbind(-3), 3, **settings), packed(qkv, 3, **settings), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("three", "packed", "layout"),
    [
        (na1d, na1d_qkvpacked, r"\[B, L, heads, D\]"),
        (na3d, na3d_qkvpacked, r"\[B, D, H, W, heads, D\]"),
    ],
)
def test_one_and_three_axes_name_their_layout(three, packed, layout):
    two = tensor()
    with pytest.raises(ValueError, match=f"query: expected {layout}, got .*2, 6, 7, 2, 4"):
        three(two, two, two, 3)
    with pytest.raises(ValueError, match=r"qkv: expected .*3, heads, D\], got .*2, 6, 7, 2, 4"):
        packed(two, 3)


def test_additional_keys_are_one_more_set_of_keys(device):
    tensors = torch.randn(3, 2, 5, 4, 2, 8, dtype=torch.float64, device=device)
    keys, values = torch.randn(2, 2, 6, 2, 8, dtype=torch.float64, device=device)
    whole = na2d(*tensors, 3, additional_keys=keys, additional_values=values, return_lse=True)
    window = na2d(*tensors, 3, return_lse=True)
    dense = torch.einsum("bhwnd,bsnd->bhwns", tensors[0] * 8**-0.5, keys)
    others = torch.einsum("bhwns,bsnd->bhwnd", dense.softmax(-1), values), dense.logsumexp(-1)
    for a, b in zip(whole, merge_attentions(*zip(window, others, strict=True)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_log_sum_exp_is_returned_on_request_alone(device):
    qkv = torch.randn(1, 4, 4, 3, 1, 8, device=device)
    output, lse = na2d_qkvpacked(qkv, 3, return_lse=True, backend="reference")
    assert lse.shape == (1, 4, 4, 1)
    assert torch.equal(na2d_qkvpacked(qkv, 3, backend="reference"), output)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_autocast_casts_query_key_and_value_and_leaves_the_bias(dtype):
    qkv = torch.randn(1, 4, 5, 3, 2, 8, dtype=dtype)
    rpb = torch.randn(2, 5, 5).requires_grad_()
    expected = na2d_qkvpacked(qkv.bfloat16(), 3, rpb=rpb)
    (expected_grad,) = torch.autograd.grad(expected.float().sum(), rpb)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [na2d(*qkv.unbind(3), 3, rpb=rpb), na2d_qkvpacked(qkv, 3, rpb=rpb)]
        grads = [torch.autograd.grad(x.float().sum(), rpb)[0] for x in outputs]
    for output, grad in zip(outputs, grads, strict=True):
        assert output.dtype == torch.bfloat16
        assert grad.dtype == torch.float32
        # To the bit: autocast must not reach the scores, which are computed in fp32.
        assert torch.equal(output, expected)
        assert torch.equal(grad, expected_grad)


def test_autocast_casts_additional_keys_and_values():
    tensors = [torch.randn(1, 4, 5, 2, 8), torch.randn(1, 3, 2, 8)]
    results = []
    for tensor, more in (tensors, [t.bfloat16() for t in tensors]):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(
                na2d(tensor, tensor, tensor, 3, additional_keys=more, additional_values=more)
            )
    assert results[0].dtype == torch.bfloat16
    assert torch.equal(*results)


def test_autocast_leaves_fp64():
    qkv = torch.randn(1, 4, 5, 3, 2, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert na2d_qkvpacked(qkv, 3).dtype == torch.float64
