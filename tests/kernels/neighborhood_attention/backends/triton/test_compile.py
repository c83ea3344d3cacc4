"""Every launch compiles for Hopper; that needs no GPU, and the interpreter misses such errors."""

import random
import re
import subprocess
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton", reason="Triton is not available on this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from neighborhood_attention.backends import Inputs, load  # noqa: E402
from neighborhood_attention.backends.triton import (  # noqa: E402
    bias_table,
    fused_backward,
    fused_direct_forward,
    fused_forward,
    launch,
    tile_table,
    tiles,
)
from neighborhood_attention.backends.triton.launch import Problem, describe  # noqa: E402
from neighborhood_attention.backends.triton.tile_table import Key, table  # noqa: E402
from neighborhood_attention.geometry import Neighborhood  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
# Shared memory of a block, in bytes: of Hopper, and of the smallest GPUs (compute capability 8.6).
LARGE, SMALL = 227 * 1024, 99 * 1024
# Of a thread, in bytes: twice the registers that it has. Far beyond, ptxas gives up and spills all.
MOST_SPILLED = 2048
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
LOADS = re.compile(r"ld\.global|cp\.async\.c[ag]")
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


def specialised(kernel, args, kwargs):
    """What Triton compiles: an argument of 1 is a constant, one divisible by 16 known to be so."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: values.pop(name) for name in OPTIONS if name in values}
    signature, constants, attributes = {}, {}, {}

    def specialise(value, path, is_free=True):
        if not is_free:
            return "i32"
        if value is None or (isinstance(value, int) and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(specialise(entry, (*path, i)) for i, entry in enumerate(value))
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, torch.Tensor):
            return TYPES[value.dtype]
        return "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"

    for i, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            is_free = not parameter.do_not_specialize
            signature[parameter.name] = specialise(value, (i,), is_free)
    assert not values, f"unknown arguments {sorted(values)}"
    return signature, constants, attributes, options


def compile_launch(kernel, args, kwargs):
    *source, options = specialised(kernel, args, kwargs)
    language = GluonASTSource if kernel.is_gluon() else ASTSource
    return triton.compile(language(kernel, *source), target=HOPPER, options=options)


@pytest.fixture
def launches(monkeypatch):
    """Launches, recorded instead of run: (kernel, arguments, keywords)."""
    found = []

    def record(kernel, *args, grid, warmup, **kwargs):
        found.append((kernel, args, kwargs))

    monkeypatch.setattr(triton.JITFunction, "run", record)
    return found


bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
PROBLEMS = {  # spatial, dilation, head dimensions, additional keys, dtype
    "windowed": ((56, 56), 1, (32, 32), 0, bf16, tiles.WINDOWED),
    "narrow": ((28, 14), 1, (32, 32), 0, bf16, tiles.NARROW),
    "whole group": ((7, 7), 1, (32, 32), 0, fp16, tiles.WHOLE_GROUP),
    "whole group in fp32": ((14, 7), 2, (32, 32), 0, fp32, tiles.WHOLE_GROUP),
    "light sequence": ((1000,), 2, (40, 64), 5, bf16, tiles.LIGHT[1]),
    "light": ((30, 30), 1, (16, 16), 0, fp32, tiles.LIGHT[2]),
    "light volume": ((8, 14, 14), 1, (64, 64), 0, bf16, tiles.LIGHT[3]),
    "heavy": ((30, 30), 2, (20, 24), 0, fp32, tiles.HEAVY[2]),
    "heaviest sequence": ((1000,), 1, (64, 64), 300, fp32, tiles.HEAVIEST[1]),
    "heaviest volume": ((8, 14, 14), 1, (64, 64), 0, fp32, tiles.HEAVIEST[3]),
    "large": ((30, 30), 1, (128, 128), 40, fp32, tiles.LARGE_SINGLE[2]),
    "large sequence": ((1000,), 2, (128, 128), 5, fp32, tiles.LARGE_SINGLE[1]),
    "large of 16 bits": ((30, 30), 1, (128, 100), 40, bf16, tiles.LARGE_HALF[2]),
    "large volume": ((8, 14, 14), 1, (128, 128), 1, bf16, tiles.LARGE_HALF[3]),
    "huge": ((30, 30), 1, (256, 256), 40, fp32, tiles.HUGE[2]),
    "huge volume": ((8, 14, 14), 1, (256, 32), 0, fp32, tiles.HUGE[3]),
    "huge sequence": ((1000,), 1, (256, 256), 40, fp32, tiles.HUGE[1]),
}
TUNED = tiles.WINDOWED, tiles.NARROW, tiles.WHOLE_GROUP


def run_passes(name):
    """Forward and backward of a problem, in no table; with TF32, and kernels that overlap."""
    spatial, dilation, (head_dim, value_dim), additional, dtype, choice = PROBLEMS[name]
    dims, batch, heads = len(spatial), 2, 4
    key_heads = heads if choice is tiles.WHOLE_GROUP else 2
    window = Neighborhood((7,) * dims, (1,) * dims, (dilation,) * dims, (False,) * dims)
    sizes = {"key": head_dim, "value": value_dim}
    inputs = Inputs(
        torch.ones(batch, *spatial, heads, head_dim, dtype=dtype),
        *(torch.ones(batch, *spatial, key_heads, d, dtype=dtype) for d in sizes.values()),
        torch.ones(heads, *window.bias_shape),
        *(
            torch.ones(batch, additional, key_heads, d, dtype=dtype) if additional else None
            for d in sizes.values()
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_table, "capability", lambda device: "10.0")
        assert tiles.tiles_by_rule(Problem.of(describe(inputs)), window) is choice
        output, lse = fused_forward.forward(inputs, window, 0.5)
        fused_backward.backward(output, lse, inputs, output, lse, window, 0.5, inputs)


@pytest.mark.parametrize("name", ["windowed", "whole group", "heavy", "large"])
def test_nothing_comes_between_kernels_that_overlap(name, launches):
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if "empty" not in operation.__name__:  # else nothing is launched
                launches.append((operation,))
            return operation(*args, **(kwargs or {}))

    with Recorder():
        run_passes(name)
    names = [getattr(function, "__name__", None) for function, *_ in launches]
    followers = [after for before, after in pairwise(names) if before == "_build_kernel"]
    assert followers
    assert all(name.endswith("_kernel") for name in followers), followers
    # It waits for delta's kernel: at its start, or by the sums' reduction, which has waited.
    before = {before for before, after in pairwise(names) if after == "_key_gradient_kernel"}
    delta = {"windowed": "_reduce_kernel", "whole group": None}.get(name, "_query_gradient_kernel")
    assert before == ({delta} if delta else set())
    for kernel, *rest in launches:
        if rest and "WAITS_LAST" in kernel.arg_names:
            waits_last = rest[0][kernel.arg_names.index("WAITS_LAST")]
            assert waits_last == (delta == "_reduce_kernel")


@pytest.mark.slow
@pytest.mark.parametrize("name", PROBLEMS)
def test_all_kernels_compile_for_hopper(name, launches, tmp_path):
    run_passes(name)
    *_, additional, _, choice = PROBLEMS[name]
    names = [kernel.__name__ for kernel, *_ in launches]
    forward = "_forward_kernel"
    backward = ["_query_gradient_kernel", "_key_gradient_kernel", "_partial_kernel"]
    if choice is tiles.WHOLE_GROUP:
        forward, backward = "_whole_group_forward_kernel", ["_whole_group_kernel"]
    elif choice in TUNED:
        backward = ["_query_bias_gradient_kernel", "_key_gradient_kernel"]
    tables = ["_build_kernel"] * (1 + len(backward))
    backward += ["_additional_gradient_kernel"] * (additional > 0)
    assert sorted(names) == sorted([forward, *backward, *tables, "_reduce_kernel"])
    for kernel, args, kwargs in launches:
        compiled = compile_launch(kernel, args, kwargs)
        assert ".target sm_90" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= SMALL, kernel.__name__
        assert stack_bytes(compiled, tmp_path) <= MOST_SPILLED, kernel.__name__
        waits = kernel.__name__ != "_build_kernel" and (
            "table" in kernel.arg_names or kernel.__name__ == "_reduce_kernel"
        )
        assert compiled.metadata.launch_pdl == waits
        assert ("griddepcontrol.wait" in compiled.asm["ptx"]) == waits
        tells = "griddepcontrol.launch_dependents" in compiled.asm["ptx"]
        assert tells == (kernel.__name__ in ("_build_kernel", "_reduce_kernel"))
        if kernel.__name__ == "_reduce_kernel":
            before, _ = compiled.asm["ptx"].split("griddepcontrol.wait")
            assert "launch_dependents" not in before  # what it has waited for is done, for the next
            assert not re.search(LOADS, before)
        if kernel.__name__ == "_key_gradient_kernel":
            before, after = compiled.asm["ptx"].split("griddepcontrol.wait")
            waits_last = args[kernel.arg_names.index("WAITS_LAST")]
            assert waits_last == ("_reduce_kernel" in names and choice in TUNED)
            assert waits_last == (re.search(LOADS, after) is None)
            assert "st.global" not in before


RINGS = {  # spatial, tiles
    "windowed": ((56, 56), tiles.WINDOWED),
    "narrow": ((28, 14), tiles.NARROW),
}


def stack_bytes(compiled, folder):
    """What a thread spills."""
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    (stack,) = re.findall(r"STACK:(\d+)", usage.stdout)
    return int(stack)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("name", RINGS)
def test_the_kernel_with_a_ring_compiles_for_hopper(
    name, head_dim, dtype, launches, monkeypatch, tmp_path
):
    spatial, choice = RINGS[name]
    if head_dim > 32:  # more registers
        choice = replace(choice, ring_forward=replace(choice.ring_forward, max_registers=None))
        monkeypatch.setattr(fused_forward, "choose_tiles", lambda problem, window: choice)
    for module in (bias_table, launch):
        monkeypatch.setattr(module, "can_overlap", lambda device: True)
    fused_forward._prepare.cache_clear()
    window = Neighborhood((7, 7), (1, 1), (1, 1), (False, False))
    qkv = torch.empty(128, *spatial, 3, 4, head_dim, dtype=dtype, device="meta")
    rpb = torch.empty(4, *window.bias_shape, device="meta")
    fused_forward.forward_packed(qkv, rpb, window, 0.5)
    fused_forward._prepare.cache_clear()
    assert [kernel.__name__ for kernel, *_ in launches] == ["_build_kernel", "_ring_forward_kernel"]
    for kernel, args, kwargs in launches:
        compiled = compile_launch(kernel, args, kwargs)
        assert ".target sm_90" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= SMALL, kernel.__name__
        assert stack_bytes(compiled, tmp_path) <= 64, kernel.__name__
    assert "griddepcontrol.wait" in compiled.asm["ptx"]
    assert compiled.metadata.launch_pdl


def test_a_hundred_sizes_share_a_few_compilations(launches):
    window = Neighborhood((7, 7), (1, 1), (1, 1), (False, False))
    sizes = random.Random(0)
    for _ in range(100):
        height, width = sizes.randint(60, 900), sizes.randint(60, 900)
        qkv = torch.empty(2, height, width, 3, 2, 32, dtype=bf16, device="meta")
        inputs = Inputs(*qkv.unbind(3), torch.empty(2, *window.bias_shape, device="meta"))
        output, lse = fused_forward.forward(inputs, window, 0.5)
        fused_backward.backward(output, lse, inputs, output, lse, window, 0.5, inputs)
    compiled = {}
    for kernel, args, kwargs in launches:
        compiled.setdefault(kernel.__name__, set()).add(repr(specialised(kernel, args, kwargs)))
    tables = compiled.pop("_build_kernel")  # three kinds
    assert len(compiled) >= 3
    assert all(len(found) <= 16 for found in compiled.values())
    assert len(tables) <= 3 * 16


def test_a_hundred_sizes_in_several_batches_share_a_few_forwards(launches):
    window = Neighborhood((7, 7), (1, 1), (1, 1), (False, False))
    sizes = random.Random(0)
    for _ in range(100):
        batch, height, width = (
            sizes.choice((1, 8, 128)),
            sizes.randint(8, 120),
            sizes.randint(8, 120),
        )
        qkv = torch.empty(batch, height, width, 3, 2, 32, dtype=bf16, device="meta")
        fused_forward.forward_packed(qkv, None, window, 0.5)
    compiled = {}
    for kernel, args, kwargs in launches:
        compiled.setdefault(kernel.__name__, set()).add(repr(specialised(kernel, args, kwargs)))
    assert len(compiled["_ring_forward_kernel"]) <= 6


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in table() if key.capability == "9.0"], ids=str)
def test_the_tiles_of_the_table_compile_for_hopper(key, launches, monkeypatch):
    torch.set_float32_matmul_precision("high" if key.precision == "tf32" else "highest")
    dims, dilation = len(key.group), 1 + key.is_dilated
    window = Neighborhood(key.kernel_size, (1,) * dims, (dilation,) * dims, (False,) * dims)
    spatial = [length * dilation for length in key.group]
    dtype = bf16 if key.precision == "half" else fp32
    rows = torch.ones(2, *spatial, 4, key.head_dim, dtype=dtype)
    inputs = Inputs(rows, rows, rows, torch.ones(4, *window.bias_shape))
    here = Key.of(Problem.of(describe(inputs)), window)
    assert here == key._replace(capability=None)
    entry = table()[key]
    for out_of_use in ({}, {"ring_forward": None}):  # then the other forward
        monkeypatch.setitem(table(), here, {**entry, **out_of_use})
        fused_forward._prepare.cache_clear()
        fused_backward._prepare.cache_clear()
        output, lse = fused_forward.forward(inputs, window, 0.5)
        fused_backward.backward(output, None, inputs, output, lse, window, 0.5, inputs)
    shared = "_build_kernel", "_reduce_kernel"
    tiled = [launch for launch in launches if launch[0].__name__ not in shared]
    found = [settings_of(*launch) for launch in tiled]
    assert all((tile.tile, tile.options) in found for tile in entry.values() if tile is not None)
    for kernel, args, kwargs in tiled:
        assert compile_launch(kernel, args, kwargs).metadata.shared <= LARGE, kernel.__name__


def settings_of(kernel, args, kwargs):
    """The tile of a launch, and its options."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    return values["TILE"], {name: kwargs[name] for name in ("num_warps", "num_stages", "maxnreg")}


# Spatial, kernel size, dilation, head dimensions, whether there is a bias.
DIRECT = {
    "map": ((14, 14), 7, 1, (32, 32), True),
    "dilated": ((56, 56), 7, 8, (32, 32), True),
    "few keys": ((3, 3), 1, 1, (16, 16), False),
    "sequence of many keys": ((1000,), 240, 1, (24, 32), True),
    "volume": ((5, 6, 7), 3, 1, (64, 64), True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DIRECT)
def test_direct_forwards_compile_for_hopper(name, launches, tmp_path, monkeypatch):
    monkeypatch.setattr(tile_table, "capability", lambda device: "9.0")
    monkeypatch.setattr(fused_direct_forward, "is_worth_it", lambda problem: True)
    spatial, kernel_size, dilation, head_dims, has_bias = DIRECT[name]
    dims = len(spatial)
    window = Neighborhood((kernel_size,) * dims, (1,) * dims, (dilation,) * dims, (False,) * dims)
    query, value = (torch.ones(1, *spatial, 2, d, dtype=bf16) for d in head_dims)
    rpb = torch.ones(2, *window.bias_shape) if has_bias else None
    fused_forward._prepare.cache_clear()
    fused_forward.forward(Inputs(query, query, value, rpb), window, 0.5)
    fused_forward._prepare.cache_clear()
    [(kernel, args, kwargs)] = launches
    assert kernel.__name__ == "_direct_forward_kernel"
    assert kwargs["launch_pdl"]
    compiled = compile_launch(kernel, args, kwargs)
    before, _, after = compiled.asm["ptx"].partition("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in after  # not before: waiting programs take room
    assert "griddepcontrol.launch_dependents" not in before
    assert "ld.global" not in before
    assert "cp.async" not in before
    assert stack_bytes(compiled, tmp_path) == 0


UNFUSED = {  # spatial, window, dilation, head dimensions, dtype
    "map": ((56, 56), 7, 2, (32, 32), bf16),
    "volume": ((8, 14, 14), 5, 1, (64, 32), fp16),
    "map in fp32": ((56, 56), 7, 1, (64, 128), fp32),
    "huge heads": ((1000,), 63, 1, (256, 256), fp32),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNFUSED)
@pytest.mark.parametrize("backend", ["naive", "gemm"])
def test_all_unfused_kernels_compile_for_hopper(backend, name, launches, monkeypatch):
    monkeypatch.setattr(tile_table, "capability", lambda device: "9.0")
    spatial, kernel_size, dilation, head_dims, dtype = UNFUSED[name]
    dims = len(spatial)
    window = Neighborhood((kernel_size,) * dims, (1,) * dims, (dilation,) * dims, (False,) * dims)
    query, value = (torch.ones(2, *spatial, 4, d, dtype=dtype) for d in head_dims)
    inputs = Inputs(query, query, value, torch.ones(4, *window.bias_shape))
    module = load(backend)
    output, lse = module.forward(inputs, window, 0.5)
    module.backward(output, lse, inputs, output, lse, window, 0.5, inputs)
    assert [kernel.__name__ for kernel, *_ in launches] == [
        "_products_kernel", "_softmax_kernel", "_sums_kernel",
        *["_products_kernel"] * 2, "_gradient_kernel",
        "_key_sums_kernel", "_sums_kernel", "_key_sums_kernel", "_bias_gradient_kernel",
    ]  # fmt: skip
    for kernel, args, kwargs in launches:
        compiled = compile_launch(kernel, args, kwargs)
        assert compiled.metadata.shared <= SMALL, kernel.__name__
        multiplies = backend == "gemm" and kernel.__name__.endswith(
            ("products_kernel", "sums_kernel")
        )
        uses_tensor_cores = "mma" in compiled.asm["ptx"]
        assert uses_tensor_cores == (multiplies and head_dims != (256, 256)), kernel.__name__


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(fp16, 32), (bf16, 128), (fp32, 64)], ids=["fp16", "bf16", "fp32"]
)
def test_naive_reads_whole_vectors_and_sums_in_registers(dtype, head_dim, launches, tmp_path):
    window = Neighborhood((7, 7), (1, 1), (1, 1), (False, False))
    rows = torch.ones(2, 56, 56, 4, head_dim, dtype=dtype)
    inputs = Inputs(rows, rows, rows)
    naive = load("naive")
    output, lse = naive.forward(inputs, window, 0.5)
    naive.backward(output, lse, inputs, output, lse, window, 0.5, inputs)
    # Bytes: products change threads to be stored, maxima of the numbers of queries cross warps.
    shared = {"_products_kernel": 512, "_sums_kernel": 0, "_key_sums_kernel": 8}
    found = {kernel.__name__: (kernel, args, kwargs) for kernel, args, kwargs in launches}
    for name, most in shared.items():
        compiled = compile_launch(*found[name])
        assert compiled.metadata.shared <= most, name
        assert stack_bytes(compiled, tmp_path) <= 16, name
        assert "ld.global.v4.b32" in compiled.asm["ptx"], name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [fp16, fp32], ids=str)
def test_no_row_of_a_small_window_crosses_warps_in_the_softmax(dtype, launches):
    window = Neighborhood((7, 7), (1, 1), (1, 1), (False, False))
    rows = torch.ones(2, 56, 56, 4, 32, dtype=dtype)
    load("naive").forward(Inputs(rows, rows, rows), window, 0.5)
    (launch,) = (launch for launch in launches if launch[0].__name__ == "_softmax_kernel")
    assert "bar.sync" not in compile_launch(*launch).asm["ptx"]
