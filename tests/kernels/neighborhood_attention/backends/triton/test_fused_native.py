"""The fused kernels at real sizes, and whatever the interpreter cannot show: on a GPU alone."""

import pytest
import torch
from oracle import Case, check, inputs, run

from neighborhood_attention import na2d, na2d_qkvpacked
from neighborhood_attention.backends.triton import fused_backward, fused_forward, tiles

pytestmark = pytest.mark.gpu
fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16

PROBLEMS = [
    (Case((7, 7), (7, 7), batch=3, head_dim=32), [bf16, fp16]),
    (Case((56, 56), (7, 7), dilation=(8, 8), batch=1, head_dim=32), [bf16]),
    (Case((16, 24), (3, 3), dilation=(2, 3), head_dim=32), [bf16, fp16]),
    (Case((56, 56), (7, 7), batch=2, head_dim=32), [bf16, fp16]),
    (Case((24, 24), (11, 11), head_dim=32), [bf16]),
    (Case((37, 40), (7, 5), dilation=(2, 3), head_dim=32), [fp16]),
    (Case((19, 22), (5, 4), stride=(2, 3), is_causal=(True, False), head_dim=32), [bf16]),
    (Case((19, 22), (4, 5), stride=(1, 2), is_causal=(False, True)), [fp32]),
    (Case((19, 22), (5, 7), head_dim=20), [bf16, fp32]),
    (Case((19, 22), (5, 7), head_dim=64), [bf16, fp32]),
    (Case((19, 22), (5, 7), head_dim=128), [bf16, fp32]),
    (Case((19, 22), (5, 7), head_dim=256), [bf16, fp32]),
]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{dtype}")
        for case, dtypes in PROBLEMS
        for dtype in dtypes
    ],
)
def test_agrees_with_the_definition(case, dtype):
    check(na2d_qkvpacked, case, dtype, "cuda", backend="fused")


@pytest.mark.parametrize("head_dim", [16, 32])
def test_agrees_with_the_definition_in_tf32(head_dim, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    case = Case((19, 22), (5, 7), head_dim=head_dim)
    check(na2d_qkvpacked, case, fp32, "cuda", tolerance=2e-3, backend="fused")


# 32 channels of 16 bits or 16 of 32 bits: the largest heads that WINDOWED and WHOLE_GROUP meet.
@pytest.mark.parametrize(("dtype", "head_dim"), [(fp16, 32), (bf16, 32), (fp32, 16)], ids=str)
@pytest.mark.parametrize("name", ["WINDOWED", "WHOLE_GROUP", "LARGE_HEADS"])
def test_every_configuration_agrees_with_the_definition(name, dtype, head_dim, monkeypatch):
    for module in (fused_forward, fused_backward):
        monkeypatch.setattr(module, "choose_tiles", lambda query, window: getattr(tiles, name))
    case = Case((19, 22), (5, 7), head_dim=head_dim)
    check(na2d_qkvpacked, case, dtype, "cuda", backend="fused")


def test_it_is_the_default_on_a_gpu():
    qkv = torch.randn(1, 9, 9, 3, 1, 32, device="cuda", dtype=bf16)
    assert torch.equal(na2d_qkvpacked(qkv, 3), na2d_qkvpacked(qkv, 3, backend="fused"))


def test_autocast_casts_query_key_and_value_and_leaves_the_bias():
    qkv, rpb = torch.randn(1, 9, 9, 3, 2, 32, device="cuda"), torch.randn(2, 5, 5, device="cuda")
    with torch.autocast("cuda", bf16):
        output = na2d_qkvpacked(qkv, 3, rpb=rpb)
    assert torch.equal(output, na2d_qkvpacked(qkv.to(bf16), 3, rpb=rpb))


# A stride below 2^31 whose multiples exceed it, and one beyond.
@pytest.mark.parametrize("stride", [2**30 + 64, 2**31 + 64])
@pytest.mark.parametrize("axis", [1, 2, 4], ids=["rows", "columns", "heads"])
def test_offsets_beyond_2_31_elements_are_reached(axis, stride):
    case = Case((3, 3), (3, 3), batch=1, heads=3, head_dim=16)
    qkv, rpb = inputs(case, fp16, "cuda")
    grads = torch.randn_like(qkv[:, :, :, 0]), torch.randn(1, 3, 3, 3, device="cuda")
    strides = list(qkv.stride())
    strides[axis] = stride
    wide = torch.empty(2 * stride + qkv.numel(), dtype=fp16, device="cuda")
    wide = wide.as_strided(qkv.shape, strides).copy_(qkv)
    for a, b in zip(
        run(na2d_qkvpacked, case, wide, rpb, *grads, backend="fused"),
        run(na2d_qkvpacked, case, qkv, rpb, *grads, backend="fused"),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_images_beyond_2_31_elements_are_served():
    # The output, and each gradient, has 2^31 elements, all zero but for the last corner.
    small = torch.randn(4, 1, 5, 5, 2, 256, device="cuda", dtype=fp16)
    small[3, :, :2] = small[3, :, :, :2] = 0  # these queries see other keys in the large image
    large = torch.zeros(4, 1, 2**11, 2**11, 2, 256, device="cuda", dtype=fp16)
    large[:, :, -5:, -5:] = small
    results = []
    for *parts, grad in (small, large):
        parts = [part.requires_grad_() for part in parts]
        output = na2d(*parts, 3, backend="fused")
        grads = torch.autograd.grad(output, parts, grad)
        results.append([output[:, -3:, -3:], *(x[:, -5:, -5:] for x in grads)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_on_a_gpu_that_is_not_the_current_one():
    qkv = torch.randn(1, 9, 9, 3, 1, 32, device="cuda:1", requires_grad=True)
    output = na2d_qkvpacked(qkv, 3, backend="fused")
    output.sum().backward()
    assert torch.equal(output.cpu(), na2d_qkvpacked(qkv.to("cuda:0"), 3, backend="fused").cpu())
