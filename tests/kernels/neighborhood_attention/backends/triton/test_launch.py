from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from neighborhood_attention.backends import Inputs  # noqa: E402
from neighborhood_attention.backends.triton import tile_table  # noqa: E402
from neighborhood_attention.backends.triton.launch import (  # noqa: E402
    Launch,
    Layout,
    Problem,
    can_overlap,
    describe,
    describe_packed,
    layout,
    plan_arguments,
    window_arguments,
    with_contiguous_heads,
)
from neighborhood_attention.backends.triton.tile import Tile  # noqa: E402
from neighborhood_attention.backends.triton.tiles import TilePlan  # noqa: E402
from neighborhood_attention.geometry import Neighborhood  # noqa: E402


def describe_meta(query, key=None, value=None, additional=None):
    """The problem of tensors of these shapes."""
    shapes = query, key or query, value or key or query
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    pair = [None if additional is None else torch.empty(additional, device="meta")] * 2
    return Problem.of(describe(Inputs(*tensors, None, *pair)))


def test_the_window_has_three_axes():
    assert window_arguments(Neighborhood((3, 5), (1, 2), (4, 1), (False, True))) == {
        "KERNEL_SIZE": (1, 3, 5),
        "STRIDE": (1, 1, 2),
        "DILATION": (1, 4, 1),
        "IS_CAUSAL": (False, False, True),
    }


def test_the_plan_is_handed_over_by_axis():
    window = Neighborhood((3,), (1,), (2,), (False,))
    plan = TilePlan(Tile((1, 1, 4), (1, 1, 2), num_warps=1), window, (20,), of_keys=False)
    arguments = plan_arguments(plan)
    assert arguments["front"] == (0, 0, 1)  # the first tile's windows start at its own token
    assert (arguments["TILE"], arguments["STRIP"]) == ((1, 1, 4), (1, 1, 2))
    assert arguments["STRIPS"] == (1, 1, 3)  # 4 + 3 - 1 keys


def test_blocks_have_a_power_of_two_of_columns_and_no_less_than_16():
    for head_dim, block in ((5, 16), (16, 16), (20, 32), (256, 256)):
        arguments = describe_meta((1, 3, 3, 2, 16), value=(1, 3, 3, 2, head_dim)).head_arguments
        assert (arguments["HEAD_DIM"], arguments["BLOCK_D"]) == (16, 16)
        assert (arguments["VALUE_DIM"], arguments["BLOCK_V"]) == (head_dim, block)


@pytest.mark.parametrize(("key_heads", "heads_per_key"), [(6, 1), (2, 3), (1, 6)])
def test_query_heads_share_the_key_heads(key_heads, heads_per_key):
    arguments = describe_meta((1, 3, 6, 16), key=(1, 3, key_heads, 16)).head_arguments
    assert (arguments["heads"], arguments["heads_per_key"]) == (6, heads_per_key)


def precision(monkeypatch, capability, dtype=torch.float32):
    """Of products on such a GPU."""
    monkeypatch.setattr(tile_table, "capability", lambda _: capability)
    tensor = torch.empty(1, 3, 6, 16, dtype=dtype, device="meta")
    return Problem.of(describe(Inputs(tensor, tensor, tensor))).head_arguments["PRECISION"]


@pytest.mark.parametrize("capability", ["8.0", "9.0", "12.0"])
def test_products_of_fp32_are_three_in_tf32(capability, monkeypatch):
    assert precision(monkeypatch, capability) == "tf32x3"
    assert precision(monkeypatch, capability, torch.bfloat16) == "ieee"


@pytest.mark.parametrize("capability", [None, "7.5"])
def test_products_are_ieees_without_tf32(capability, tf32, monkeypatch):
    assert precision(monkeypatch, capability) == "ieee"


def test_products_follow_pytorchs_setting_of_tf32(tf32, monkeypatch):
    assert precision(monkeypatch, "8.0") == "tf32"


def test_additional_keys_are_counted_and_absent_ones_are_none():
    names = "additional_count", "additional_key_strides", "additional_value_strides"
    problem = describe_meta((2, 9, 4, 16), additional=(2, 5, 4, 16))
    values = 5, (5 * 4 * 16, 4 * 16, 16), (5 * 4 * 16, 4 * 16, 16)
    assert problem.additional_arguments == dict(zip(names, values, strict=True))
    assert describe_meta((2, 9, 4, 16)).additional_arguments == dict.fromkeys(names)


def test_missing_axes_have_size_1_and_stride_0():
    arguments = describe_meta((2, 9, 4, 16)).map_arguments()
    assert arguments["size"] == (1, 1, 9)
    assert arguments["query_strides"] == (9 * 64, 0, 0, 64, 16)


def test_offsets_are_wide_where_any_tensor_exceeds_2_31_elements():
    small = torch.empty(1, 3, 4, 2, 16, device="meta")
    spread = torch.empty_strided(small.shape, (1, 2**30, 32, 16, 1), device="meta")
    narrow = Problem.of(describe(Inputs(small, small, small)))
    assert not narrow.map_arguments(grad_query=Layout(*layout(small)))["WIDE"]
    assert narrow.map_arguments(grad_query=Layout(*layout(spread)))["WIDE"]
    assert Problem.of(describe(Inputs(small, spread, small))).map_arguments()["WIDE"]
    # An expanded tensor is small itself, but its output is not.
    expanded = torch.empty(1, 1, 1, 2, 256, device="meta").expand(1, 2**11, 2**11, 2, 256)
    assert Problem.of(describe(Inputs(*[expanded] * 3))).map_arguments()["WIDE"]
    wide_value = torch.empty(1, 1, 1, 2, 256, device="meta").expand(1, 2**11, 2**11, 2, 256)
    query = torch.empty(1, 1, 1, 2, 8, device="meta").expand(1, 2**11, 2**11, 2, 8)
    assert Problem.of(describe(Inputs(query, query, wide_value))).map_arguments()["WIDE"]


def test_equal_problems_are_equal_keys_and_others_are_not():
    tensors = [torch.empty(1, 3, 4, 2, 16) for _ in range(3)]
    problem = describe(Inputs(*tensors))
    assert hash(problem) == hash(describe(Inputs(*(x.clone() for x in tensors))))
    assert problem == describe(Inputs(*(x.clone() for x in tensors)))
    half = [x.half() for x in tensors]
    mixed = [tensors[0], half[1], half[2]]
    strided = [*tensors[:2], tensors[2].transpose(1, 2).contiguous().transpose(1, 2)]
    others = [describe(Inputs(*others)) for others in (half, mixed, strided)]
    assert len({problem, *others}) == 4


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("heads", [None, 2], ids=["plain", "rpb"])
def test_a_packed_problem_is_that_of_its_parts(dims, dtype, heads, tf32):
    spatial = 4, 5, 6
    rpb = None if heads is None else torch.empty(heads, *[5] * dims)
    qkv = torch.empty(2, *spatial[:dims], 2, 3, 8, dtype=dtype).transpose(-3, -2)
    packed = Problem.of(describe_packed(qkv, rpb))
    assert packed == Problem.of(describe(Inputs(*qkv.unbind(-3), rpb)))
    assert packed.spatial == spatial[:dims]


def test_tensors_with_strided_heads_are_copied_and_others_are_not():
    plain = torch.randn(1, 2, 3, 4, 5)
    view, strided = plain[..., 1:4], plain.transpose(-1, -2)
    assert with_contiguous_heads(plain) is plain
    assert with_contiguous_heads(view) is view
    copy = with_contiguous_heads(strided)
    assert torch.equal(copy, strided)
    assert copy.stride(-1) == 1


@triton.jit
def _scale_and_add(source, addend, target, sizes, factor, COUNT: tl.constexpr):
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    mask = i < sizes[0] * sizes[1]
    result = tl.load(source + i, mask=mask) * factor
    if addend is not None:
        result += tl.load(addend + i, mask=mask)
    tl.store(target + i, result, mask=mask)


ARGUMENTS = {"sizes": (3, 16), "factor": 2.0, "COUNT": 16, "unknown to this kernel": 0}


def buffers(device, offset=0):
    """Source, addend and target of 48 elements, the first behind `offset` others."""
    return [torch.randn(64, device=device)[offset : offset + 48], *torch.randn(2, 48).to(device)]


@pytest.fixture
def bound(monkeypatch):
    """Keywords of the launches that Triton bound itself."""
    calls = []
    run = triton.JITFunction.run

    def record(kernel, *args, **kwargs):
        calls.append(kwargs)
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(triton.JITFunction, "run", record)
    return calls


class Compiled:
    """A compiled kernel that records its launches instead of running them."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launches, self.launches_with_hooks = [], []

    def run(self, *arguments):
        assert arguments[3:9] == (STREAM, self.function, self.packed_metadata, None, None, None)
        self.launches.append((arguments[:3], arguments[9:]))

    def __getitem__(self, grid):
        return lambda *arguments: self.launches_with_hooks.append((grid, arguments))


STREAM = 7


@pytest.fixture
def driver(monkeypatch):
    """A GPU whose current stream is `STREAM`."""
    gpu = SimpleNamespace(get_current_device=lambda: 1, get_current_stream={1: STREAM}.get)
    monkeypatch.setattr(triton.runtime.driver, "_active", gpu)


def test_a_launch_is_bound_once_for_each_alignment(monkeypatch, driver):
    bound, compiled = [], Compiled()

    def run(kernel, *args, **kwargs):
        bound.append((args, kwargs))
        return compiled

    monkeypatch.setattr(triton.JITFunction, "run", run)
    kernel = triton.JITFunction(_scale_and_add.fn)  # whatever TRITON_INTERPRET says
    launch = Launch(kernel, 3, ARGUMENTS, num_warps=2)
    source, addend, target = buffers("cpu")
    prepared = [(3, 16), 2.0, 16]
    launch(source, addend, target)
    arguments, keywords = bound[0]
    assert arguments[0] is source
    assert list(arguments[3:]) == prepared
    assert keywords == {"grid": (3, 1, 1), "warmup": False, "num_warps": 2}

    other = buffers("cpu")
    assert launch.at([x.data_ptr() for x in other])
    assert len(bound) == 1
    assert compiled.launches == [((3, 1, 1), (*(x.data_ptr() for x in other), *prepared))]

    for tensors in (buffers("cpu", offset=1), (source, None, target)):
        launches = len(bound)
        assert not launch.at([0 if x is None else x.data_ptr() for x in tensors])
        launch(*tensors)
        launch(*tensors)
        assert len(bound) == launches + 1
    assert compiled.launches[-1][1][:3] == (source.data_ptr(), 0, target.data_ptr())
    assert not compiled.launches_with_hooks


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profilers_hooks_see_every_launch(name, monkeypatch, driver):
    compiled = Compiled()
    monkeypatch.setattr(triton.JITFunction, "run", lambda *_, **__: compiled)
    launch = Launch(triton.JITFunction(_scale_and_add.fn), 3, ARGUMENTS)
    tensors = buffers("cpu")
    launch(*tensors)
    hooks = getattr(triton.knobs.runtime, name)
    hooks.add(print)
    try:
        launch(*tensors)
    finally:
        hooks.remove(print)
    (found,) = compiled.launches_with_hooks
    assert found == ((3, 1, 1), (*(x.data_ptr() for x in tensors), (3, 16), 2.0, 16))
    launch(*tensors)
    assert compiled.launches == [found]
    monkeypatch.setattr(triton.knobs.runtime, name, print)
    launch(*tensors)
    assert compiled.launches_with_hooks == [found, found]


@pytest.mark.interpreter
def test_an_interpreted_launch_runs_each_time(device):
    launch = Launch(_scale_and_add, 3, ARGUMENTS)
    for tensors in (buffers(device), buffers(device, offset=1)):
        source, addend, target = tensors
        launch(*tensors)
        torch.testing.assert_close(target, 2 * source + addend)
        launch(source, None, target)
        torch.testing.assert_close(target, 2 * source)


@pytest.mark.parametrize(
    ("capability", "expected"), [("9.0", True), ("12.0", True), ("8.9", False), (None, False)]
)
def test_kernels_overlap_from_hopper_on(capability, expected, monkeypatch):
    monkeypatch.setattr(tile_table, "capability", {torch.device("cuda"): capability}.get)
    assert can_overlap(torch.device("cuda")) is expected


@pytest.mark.gpu
def test_a_repeated_launch_computes_the_same_without_triton_binding_it(bound):
    launch = Launch(_scale_and_add, 3, ARGUMENTS, num_warps=1)
    problems = [buffers("cuda"), buffers("cuda", 1), buffers("cuda", 4)]
    problems += [(source, None, target) for source, _, target in problems]
    for repeated in (False, True):
        bound.clear()
        for source, addend, target in problems:
            launch(source, addend, target.fill_(torch.nan))
            expected = 2 * source + (0 if addend is None else addend)
            torch.testing.assert_close(target, expected)
        # The third alignment is the first's: 16 bytes on.
        assert len(bound) == (0 if repeated else 4)


@pytest.mark.gpu
def test_a_captured_launch_replays(bound):
    launch = Launch(_scale_and_add, 3, ARGUMENTS)
    source, addend, target = buffers("cuda")
    launch(source, addend, target)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(source, addend, target)
    source.fill_(1.0)
    graph.replay()
    torch.testing.assert_close(target, 2 + addend)
    assert len(bound) == 1
