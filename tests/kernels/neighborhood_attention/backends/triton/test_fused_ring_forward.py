"""The forward with its keys in a ring, against the definition: on a GPU alone."""

from dataclasses import replace
from math import ceil

import pytest
import torch
from oracle import (
    TOLERANCE,
    Case,
    assert_close,
    attention,
    inputs,
    magnitudes,
    pairs,
    random_gradients,
    random_tensors,
    unpacked,
)

pytest.importorskip("triton")

import triton

from neighborhood_attention import na2d, na2d_qkvpacked
from neighborhood_attention.backends.triton import fused_forward, tiles
from neighborhood_attention.backends.triton.tile import Tile

pytestmark = pytest.mark.gpu
fp16, bf16 = torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)


@pytest.fixture(autouse=True)
def use(monkeypatch):
    """use(tile): of the ring from now on; else one of the rule's, whatever the map and the head.

    Programs walk as far as the tile says, however few they are.
    """
    chosen = []

    def choose(problem, window):
        columns = ceil(problem.spatial[-1] / window.dilation[-1])
        by_width = tiles.NARROW if 8 < columns <= 16 else tiles.WINDOWED
        ring = chosen[-1] if chosen else by_width.ring_forward
        return replace(by_width, ring_forward=replace(ring, programs=1))

    def use(tile):
        chosen.append(tile)
        fused_forward._prepare.cache_clear()

    monkeypatch.setattr(fused_forward, "choose_tiles", choose)
    fused_forward._prepare.cache_clear()
    yield use
    fused_forward._prepare.cache_clear()


@pytest.fixture
def launched():
    """Names of the kernels that were launched."""
    names, hooks = [], triton.knobs.runtime.launch_enter_hook

    def record(metadata):
        names.append(metadata.get()["name"])

    hooks.add(record)
    yield names
    hooks.remove(record)


@pytest.fixture
def forward(launched):
    """forward(case, tensors): output and log-sum-exp, by the kernel with the ring or without it."""

    def forward(case, tensors, *, in_ring=True, **options):
        launched.clear()
        function = na2d_qkvpacked if "qkv" in tensors else na2d
        options |= case.settings
        results = function(**tensors, **options, return_lse=True, backend="fused")
        assert ("_ring_forward_kernel" in launched) == in_ring
        return results

    return forward


def check(results, case, tensors, dtype, scale=None):
    """Output and log-sum-exp must agree with the definition."""
    scale = case.head_dim**-0.5 if scale is None else scale
    exact = {name: x.double() for name, x in unpacked(**tensors).items()}
    expected = attention(case, **exact, scale=scale)
    sizes = magnitudes(case, tensors, random_gradients(case, dtype, "cuda"), scale)
    for name, found, right in zip(("output", "lse"), results, expected, strict=True):
        assert_close(name, found, right, TOLERANCE[dtype], sizes[name])


CASES = [
    Case((7, 7), (7, 7), head_dim=32),
    Case((7, 7), (3, 5), head_dim=32, batch=3),
    Case((8, 9), (4, 2), head_dim=32, rpb=False),
    Case((9, 16), (5, 7), head_dim=32, heads=3),
    Case((13, 16), (9, 9), head_dim=32),
    Case((28, 14), (7, 7), head_dim=32),
    Case((23, 61), (7, 7), head_dim=32, rpb=False),
    Case((23, 61), (9, 9), head_dim=32),
    Case((23, 61), (2, 8), head_dim=32),
    Case((30, 17), (6, 4), head_dim=32),
    Case((10, 33), (3, 3), head_dim=32, batch=1, heads=5),
    Case((56, 56), (7, 7), head_dim=32),
    Case((23, 61), (5, 7), dilation=(3, 2), head_dim=32),
    Case((41, 40), (7, 3), dilation=(2, 3), head_dim=32, rpb=False),
    Case((27, 62), (9, 7), dilation=(3, 3), head_dim=32),
    Case((31, 20), (4, 6), dilation=(3, 2), head_dim=32),
    Case((57, 29), (7, 7), dilation=(8, 4), head_dim=32),
]


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_definition(case, dtype, forward):
    tensors = random_tensors(case.packed_shapes(), dtype, "cuda")
    check(forward(case, tensors), case, tensors, dtype)


@DTYPES
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "case",
    [
        Case((9, 16), (5, 7)),
        Case((23, 61), (7, 7), heads=3),
        Case((31, 41), (5, 4), dilation=(2, 3), rpb=False),
    ],
    ids=str,
)
def test_agrees_with_the_definition_for_all_heads(case, head_dim, dtype, forward):
    case = replace(case, head_dim=head_dim, value_dim=0)
    tensors = random_tensors(case.shapes(), dtype, "cuda")
    check(forward(case, tensors), case, tensors, dtype)


@pytest.mark.parametrize(
    ("tile", "strip", "warps"),
    [
        ((1, 2, 8), (1, 2, 16), 1),
        ((1, 2, 16), (1, 1, 16), 2),
        ((1, 1, 16), (1, 1, 16), 1),
        ((1, 4, 8), (1, 2, 16), 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("walk", [1, 4, 100])
def test_agrees_with_the_definition_in_all_tiles(walk, tile, strip, warps, use, forward):
    use(Tile(tile, strip, warps, num_stages=1, walk=walk))
    for case in (
        Case((37, 14), (7, 7), head_dim=32),
        Case((37, 31), (5, 6), dilation=(3, 2), head_dim=32),
    ):
        tensors = random_tensors(case.packed_shapes(), bf16, "cuda")
        check(forward(case, tensors), case, tensors, bf16)


@pytest.mark.parametrize("rows", [6, 7])
def test_few_rows_agree_with_the_definition(rows, launched):
    # All windows of 6 rows start in the first two of them: a ring's strips do not hold them.
    case = Case((rows, 20), (6, 6), head_dim=32)
    tensors = random_tensors(case.packed_shapes(), bf16, "cuda")
    results = na2d_qkvpacked(**tensors, **case.settings, return_lse=True, backend="fused")
    check(results, case, tensors, bf16)
    assert "_forward_kernel" in launched
    assert "_ring_forward_kernel" not in launched


def test_few_tiles_are_left_to_the_plain_kernel(launched, monkeypatch):
    monkeypatch.setattr(fused_forward, "choose_tiles", tiles.choose_tiles)
    for batch, kernel in ((1, "_forward_kernel"), (40, "_ring_forward_kernel")):
        launched.clear()
        case = Case((28, 28), (7, 7), head_dim=32, batch=batch)
        tensors = random_tensors(case.packed_shapes(), bf16, "cuda")
        na2d_qkvpacked(**tensors, **case.settings, backend="fused")
        assert kernel in launched


@DTYPES
@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
def test_the_scale_may_be_any(scale, dtype, forward):
    case = Case((19, 22), (5, 7), head_dim=32)
    tensors = random_tensors(case.packed_shapes(), dtype, "cuda")
    check(forward(case, tensors, scale=scale), case, tensors, dtype, scale)


@DTYPES
def test_query_heads_share_key_heads_of_equal_strides(dtype, forward):
    case = Case((19, 22), (5, 7), heads=6, key_heads=2, head_dim=32)
    tensors = random_tensors(case.shapes(), dtype, "cuda")
    for name in ("key", "value"):
        rows = torch.full_like(tensors["query"], torch.nan)
        rows[..., :2, :] = tensors[name]
        tensors[name] = rows[..., :2, :]
    check(forward(case, tensors), case, tensors, dtype)


def surround(tensor, channels):
    """As a slice of a larger tensor full of NaN, with so many channels before and after it."""
    edges = [1] * (tensor.dim() - 1) + [channels]
    sizes = [n + 2 * edge for n, edge in zip(tensor.shape, edges, strict=True)]
    larger = torch.full(sizes, torch.nan, dtype=tensor.dtype, device=tensor.device)
    inner = [slice(edge, -edge) for edge in edges]
    return larger[tuple(inner)].copy_(tensor)


@DTYPES
@pytest.mark.parametrize(
    "case",
    [
        Case((9, 16), (5, 7), head_dim=32),
        Case((23, 40), (7, 7), head_dim=16),
        Case((23, 40), (5, 4), dilation=(2, 3), head_dim=64),
    ],
    ids=str,
)
def test_memory_around_the_views_changes_nothing(case, dtype, forward):
    tensors = random_tensors(case.shapes(), dtype, "cuda")
    views = {n: surround(x, 1 if n == "rpb" else 16) for n, x in tensors.items()}
    for found, expected in zip(forward(case, views), forward(case, tensors), strict=True):
        assert torch.equal(found, expected)


@DTYPES
def test_columns_may_lie_before_rows(dtype, forward):
    case = Case((23, 40), (5, 4), dilation=(2, 3), head_dim=32)
    qkv, rpb = inputs(case, dtype, "cuda")
    turned = qkv.transpose(1, 2).contiguous().transpose(1, 2)
    results = (forward(case, {"qkv": x, "rpb": rpb}) for x in (turned, qkv))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@DTYPES
@pytest.mark.parametrize("channels", [1, 4])
def test_views_that_are_not_aligned_are_left_to_another_kernel(channels, dtype, forward):
    case = Case((23, 40), (5, 7), head_dim=32)
    tensors = random_tensors(case.shapes(), dtype, "cuda")
    views = {n: surround(x, 1 if n == "rpb" else channels) for n, x in tensors.items()}
    check(forward(case, views, in_ring=False), case, tensors, dtype)


@DTYPES
@pytest.mark.parametrize("is_packed", [True, False])
def test_an_address_that_is_not_aligned_is_served(is_packed, dtype, launched):
    """Whatever was launched before on aligned tensors, and by any kernel."""
    case = Case((23, 40), (5, 7), head_dim=32)
    shapes = case.packed_shapes() if is_packed else case.shapes()
    tensors = random_tensors(shapes, dtype, "cuda")
    moved = {
        name: torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
        for name, x in tensors.items()
    }
    moved = {
        name: x[1:].view(tensors[name].shape).copy_(tensors[name]) for name, x in moved.items()
    }
    function = na2d_qkvpacked if is_packed else na2d
    for given in (tensors, moved, tensors):
        results = function(**given, **case.settings, return_lse=True, backend="fused")
        check(results, case, tensors, dtype)
    assert "_ring_forward_kernel" in launched


@DTYPES
@pytest.mark.parametrize("axis", [1, 2], ids=["rows", "columns"])
def test_tokens_outside_a_window_however_large_change_nothing(axis, dtype, forward):
    # On this axis, queries before `near` see the keys before `far` alone.
    case = Case((24, 40), (5, 7), dilation=(1, 2), head_dim=32)
    kernel_size, dilation = case.kernel_size[axis - 1], case.dilation[axis - 1]
    near, far = (kernel_size // 2 + 1) * dilation, kernel_size * dilation
    tensors = random_tensors(case.shapes(), dtype, "cuda")
    huge = {name: x.clone() for name, x in tensors.items()}
    rest = case.spatial[axis - 1] - far
    huge["key"].narrow(axis, far, rest).fill_(torch.finfo(dtype).max / 4)
    huge["value"].narrow(axis, far, rest).fill_(torch.finfo(dtype).max)
    for found, expected in zip(forward(case, huge), forward(case, tensors), strict=True):
        assert torch.equal(found.narrow(axis, 0, near), expected.narrow(axis, 0, near))


@DTYPES
@pytest.mark.parametrize("name", ["query", "key"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (11, 17), (23, 39)], ids=str)
def test_scores_that_are_not_finite_are_not_hidden(place, value, name, dtype, forward):
    case = Case((24, 40), (5, 7), head_dim=32, rpb=False, batch=1)
    tensors = {n: torch.ones(s, dtype=dtype, device="cuda") for n, s in case.shapes().items()}
    tensors[name][(0, *place)] = value
    attends, _ = pairs(case.spatial, case.window)
    token = place[0] * 40 + place[1]
    touched = [token] if name == "query" else attends[:, token].nonzero().flatten().tolist()
    for result in forward(case, tensors):
        is_broken = ~result.reshape(24 * 40, -1).isfinite()
        assert torch.equal(is_broken.any(-1), is_broken.all(-1))
        assert is_broken.any(-1).nonzero().flatten().tolist() == touched


@DTYPES
@pytest.mark.parametrize("value", [-torch.inf, -1e30, 60000.0])
def test_a_bias_may_be_any(value, dtype, forward):
    case = Case((23, 40), (5, 7), head_dim=32)
    tensors = random_tensors(case.packed_shapes(), dtype, "cuda")
    tensors["rpb"][:, 4, 6] = value  # of the query's own token
    if value == -torch.inf:  # masked
        check(forward(case, tensors), case, tensors, dtype)
    else:
        output, lse = forward(case, tensors)
        assert output.isfinite().all()
        assert lse.isfinite().all()
        plain = tensors | {"rpb": tensors["rpb"].clamp(-1000, 1000)}
        torch.testing.assert_close(output, forward(case, plain)[0], rtol=0.02, atol=0.02)


def test_each_forward_waits_for_its_own_table(forward):
    case = Case((56, 56), (7, 7), head_dim=32, batch=4)
    qkv, _ = inputs(case, bf16, "cuda")
    biases = torch.randn(20, case.heads, 13, 13, device="cuda")
    expected = []
    for rpb in biases:
        torch.cuda.synchronize()
        expected += forward(case, {"qkv": qkv, "rpb": rpb})
    torch.cuda.synchronize()
    found = [x for rpb in biases for x in forward(case, {"qkv": qkv, "rpb": rpb})]
    assert all(x.isfinite().all() for x in expected)
    assert all(torch.equal(*results) for results in zip(found, expected, strict=True))


def test_a_captured_forward_replays(forward):
    case = Case((28, 28), (7, 7), head_dim=32)
    qkv, rpb = inputs(case, bf16, "cuda")
    tensors = {"qkv": qkv, "rpb": rpb}
    forward(case, tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward(case, tensors)
    qkv.normal_()
    rpb.normal_()
    for _ in range(3):
        graph.replay()
    for found, expected in zip(results, forward(case, tensors), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("axis", [0, 4], ids=["images", "heads"])
def test_offsets_beyond_2_31_elements_are_reached(axis, forward, much_memory):
    case = Case((9, 16), (3, 3), batch=3, heads=3, head_dim=16)
    qkv, rpb = inputs(case, fp16, "cuda")
    strides = list(qkv.stride())
    strides[axis] = 2**31 + 64
    much_memory()
    wide = torch.empty(2 * strides[axis] + qkv.numel(), dtype=fp16, device="cuda")
    wide = wide.as_strided(qkv.shape, strides).copy_(qkv)
    results = (forward(case, {"qkv": x, "rpb": rpb}) for x in (wide, qkv))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
