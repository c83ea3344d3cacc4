"""The fused kernels at real sizes, and whatever the interpreter cannot show: on a GPU alone."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import windowed
from oracle import Case, check, inputs, random_gradients, random_tensors, results, run

from neighborhood_attention import (
    na1d,
    na1d_qkvpacked,
    na2d,
    na2d_qkvpacked,
    na3d,
    na3d_qkvpacked,
)
from neighborhood_attention.backends.triton import fused_backward, fused_forward, tile_table, tiles
from neighborhood_attention.backends.triton.tile import Tiles

pytestmark = pytest.mark.gpu
fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
PACKED = {1: na1d_qkvpacked, 2: na2d_qkvpacked, 3: na3d_qkvpacked}

PROBLEMS = [
    (Case((7, 7), (7, 7), batch=3, head_dim=32), [bf16, fp16]),
    (Case((7, 7), (7, 7), batch=3, head_dim=16), [bf16, fp16, fp32]),
    (Case((14, 14), (7, 7), dilation=(2, 2), batch=3, head_dim=32), [bf16, fp16]),
    (Case((16, 15), (5, 7), dilation=(2, 2), batch=3, head_dim=16, rpb=False), [bf16, fp32]),
    (Case((28, 14), (7, 7), batch=3, head_dim=32), [bf16, fp16]),
    (Case((28, 28), (7, 7), batch=3, head_dim=16), [bf16, fp32]),
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
    (Case((1000,), (63,), dilation=(3,), head_dim=64), [bf16, fp32]),
    (Case((517,), (32,), stride=(5,), is_causal=(True,), head_dim=128), [fp16]),
    (Case((7, 9, 11), (3, 5, 4), dilation=(2, 1, 2), head_dim=32), [bf16, fp32]),
    (Case((8, 9, 10), (3, 4, 3), stride=(1, 3, 2), is_causal=(True, False, True)), [fp16]),
]
# Grouped heads, value dimensions and additional keys: less than a strip, and several.
UNPACKED = [
    (Case((14, 14), (7, 7), heads=6, key_heads=2, head_dim=32), [bf16, fp32]),
    (Case((130,), (9,), heads=6, key_heads=1, head_dim=64, rpb=False), [fp16]),
    # Whole groups: transposed products of every shape that they meet.
    (Case((13, 15), (5, 7), dilation=(2, 2), head_dim=32, value_dim=16), [bf16, fp16]),
    (Case((13, 15), (5, 7), dilation=(2, 2), head_dim=16, value_dim=32), [bf16, fp16]),
    (Case((13, 17), (5, 5), head_dim=32, value_dim=96), [bf16]),
    (Case((13, 17), (5, 5), head_dim=80, value_dim=24), [fp16, fp32]),
    *(
        (Case((70,), (9,), heads=4, key_heads=2, head_dim=32, additional=n), [bf16, fp16, fp32])
        for n in (1, 5, 300)
    ),
    (Case((30, 40), (7, 7), head_dim=32, additional=5), [bf16, fp32]),
    (Case((5, 6, 7), (3, 3, 3), value_dim=40, key_heads=1, additional=300), [fp16, fp32]),
    (Case((40, 40), (3, 3), head_dim=256, additional=40, batch=1), [bf16, fp32]),
]


def parameters(problems):
    """Each with its dtypes, named."""
    return [
        pytest.param(case, dtype, id=f"{case}-{dtype}")
        for case, dtypes in problems
        for dtype in dtypes
    ]


@pytest.mark.parametrize(("case", "dtype"), parameters(PROBLEMS))
def test_a_packed_projection_agrees_with_the_definition(case, dtype):
    check(PACKED[len(case.spatial)], case, dtype, "cuda", backend="fused")


@pytest.mark.parametrize(("case", "dtype"), parameters(UNPACKED))
def test_agrees_with_the_definition(case, dtype):
    check(FUNCTIONS[len(case.spatial)], case, dtype, "cuda", backend="fused")


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
def test_agrees_with_the_definition_in_tf32(head_dim, tf32):
    case = Case((19, 22), (5, 7), head_dim=head_dim, additional=5)
    check(na2d, case, fp32, "cuda", tolerance=2e-3, backend="fused")


# The largest heads that each meets, of 16 bits and of fp32.
CONFIGURATIONS = {
    "WINDOWED": (32, None),
    "NARROW": (32, None),
    "WHOLE_GROUP": (32, 32),
    "LIGHT": (64, 16),
    "HEAVY": (None, 64),
    "HEAVIEST": (None, 64),
    "LARGE_HALF": (128, None),
    "LARGE_SINGLE": (None, 128),
    "HUGE": (256, 256),
}
SHAPES = [
    Case((70,), (9,), dilation=(3,), heads=4, key_heads=2, additional=5),
    Case((19, 22), (5, 7), batch=1),
    Case((15, 14), (5, 7), dilation=(2, 2)),
    Case((5, 9, 10), (3, 3, 4), is_causal=(True, False, False), batch=1),
]


@pytest.fixture
def configure(monkeypatch):
    """configure(NAME, axes): these tiles, without the rings that test_fused_ring_forward.py has."""

    def configure(name, dims):
        chosen = getattr(tiles, name)
        if isinstance(chosen, dict):
            chosen = chosen[dims]
        chosen = replace(chosen, ring_forward=None)
        for module in (fused_forward, fused_backward):
            monkeypatch.setattr(module, "choose_tiles", lambda problem, window: chosen)

    clear_prepared()
    yield configure
    clear_prepared()


def clear_prepared():
    """Forget the launches of all problems."""
    for module in (fused_forward, fused_backward):
        module._prepare.cache_clear()


@pytest.mark.parametrize("case", SHAPES, ids=["1d", "2d", "groups of 8", "3d"])
@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        (name, head_dim, dtype)
        for name, of_half_and_single in CONFIGURATIONS.items()
        for head_dim, dtypes in zip(of_half_and_single, ([fp16, bf16], [fp32]), strict=True)
        for dtype in dtypes
        if head_dim is not None
    ],
    ids=str,
)
def test_every_configuration_agrees_with_the_definition(name, head_dim, dtype, case, configure):
    dims = len(case.spatial)
    configure(name, dims)
    case = replace(case, head_dim=head_dim, value_dim=0)
    check(FUNCTIONS[dims], case, dtype, "cuda", backend="fused")


ENTRIES = [
    (key, dtype)
    for key in tile_table.table()
    for dtype in ((bf16, fp16) if key.precision == "half" else (fp32,))
]


@pytest.mark.parametrize(
    ("key", "dtype"), ENTRIES, ids=["-".join(map(str, (*key, dtype))) for key, dtype in ENTRIES]
)
@pytest.mark.parametrize("in_ring", [True, False], ids=["ring", "no ring"])
def test_the_tiles_of_the_table_agree_with_the_definition(
    in_ring, key, dtype, request, monkeypatch
):
    """On another GPU than the entry's, those by the rule."""
    if not in_ring:
        entry = tile_table.table()[key]
        monkeypatch.setitem(tile_table.table(), key, {**entry, "ring_forward": None})
        request.addfinalizer(clear_prepared)
        clear_prepared()
    torch.set_float32_matmul_precision("high" if key.precision == "tf32" else "highest")
    dilation = 1 + key.is_dilated
    spatial = tuple(length * dilation for length in key.group)
    case = Case(
        spatial, key.kernel_size, dilation=(dilation,) * len(spatial), head_dim=key.head_dim
    )
    tolerance = 2e-3 if key.precision == "tf32" else None
    windowed.check(FUNCTIONS[len(spatial)], case, dtype, "cuda", 1000, tolerance, backend="fused")


def test_every_configuration_is_tested():
    found = {
        name
        for name, value in vars(tiles).items()
        if isinstance(value, Tiles) or (isinstance(value, dict) and set(value) == {1, 2, 3})
    }
    assert found == set(CONFIGURATIONS)


@pytest.mark.parametrize("dtype", [bf16, fp16, fp32], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case((56, 56), (7, 7), batch=8, head_dim=32),
        Case((3000,), (33,), heads=4, key_heads=2, head_dim=64, additional=40),
        Case((9, 20, 21), (3, 5, 5), dilation=(1, 2, 2), head_dim=32),
    ],
    ids=str,
)
def test_equal_inputs_give_equal_bits(case, dtype):
    tensors = random_tensors(case.shapes(), dtype, "cuda")
    grads = random_gradients(case, dtype, "cuda")
    function = FUNCTIONS[len(case.spatial)]
    function = partial(function, **case.settings, return_lse=True, backend="fused")
    first = results(function, tensors, grads)
    for _ in range(3):
        for name, found in results(function, tensors, grads).items():
            assert torch.equal(found, first[name]), name


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
def test_offsets_beyond_2_31_elements_are_reached(axis, stride, much_memory):
    case = Case((3, 3), (3, 3), batch=1, heads=3, head_dim=16)
    qkv, rpb = inputs(case, fp16, "cuda")
    grads = torch.randn_like(qkv[:, :, :, 0]), torch.randn(1, 3, 3, 3, device="cuda")
    strides = list(qkv.stride())
    strides[axis] = stride
    much_memory()
    wide = torch.empty(2 * stride + qkv.numel(), dtype=fp16, device="cuda")
    wide = wide.as_strided(qkv.shape, strides).copy_(qkv)
    for a, b in zip(
        run(na2d_qkvpacked, case, wide, rpb, *grads, backend="fused"),
        run(na2d_qkvpacked, case, qkv, rpb, *grads, backend="fused"),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_images_beyond_2_31_elements_are_served(much_memory):
    much_memory()
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
    for a, b in zip(*results, strict=True):  # a large map has other tiles, so other roundings
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_it_runs_on_a_gpu_that_is_not_the_current_one():
    qkv = torch.randn(1, 9, 9, 3, 1, 32, device="cuda:1", requires_grad=True)
    output = na2d_qkvpacked(qkv, 3, backend="fused")
    output.sum().backward()
    assert torch.equal(output.cpu(), na2d_qkvpacked(qkv.to("cuda:0"), 3, backend="fused").cpu())
