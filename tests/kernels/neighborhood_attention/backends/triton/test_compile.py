"""Every launch compiles for Hopper; that needs no GPU, and the interpreter misses such errors."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not available on this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from neighborhood_attention.backends.triton import fused_backward, fused_forward, tiles  # noqa: E402
from neighborhood_attention.geometry import Neighborhood  # noqa: E402

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 * 1024  # of a block, in bytes
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


def compile_launch(kernel, args, kwargs):
    """As Triton would: an argument of 1 is a constant, one divisible by 16 is known to be so."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    options = {name: values.pop(name) for name in OPTIONS if name in values}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    assert not values, f"unknown arguments {sorted(values)}"
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=HOPPER, options=options)


@pytest.fixture
def launches(monkeypatch):
    """Launches, recorded instead of run: (kernel, arguments, keywords) by the kernel's name."""
    found = {}

    def record(kernel, *args, grid, warmup, **kwargs):
        found[kernel.__name__] = (kernel, args, kwargs)

    monkeypatch.setattr(triton.JITFunction, "run", record)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("side", "dilation", "head_dim", "dtype", "choice"),
    [
        (56, 1, 32, torch.bfloat16, tiles.WINDOWED),
        (7, 1, 32, torch.float16, tiles.WHOLE_GROUP),
        (30, 4, 20, torch.float32, tiles.LARGE_HEADS),
    ],
    ids=["windowed", "whole group", "large heads"],
)
def test_all_kernels_compile_for_hopper(side, dilation, head_dim, dtype, choice, launches):
    window = Neighborhood((7, 7), (1, 1), (dilation, dilation), (False, False))
    query, key, value = torch.ones(2, side, side, 3, 2, head_dim, dtype=dtype).unbind(3)
    rpb = torch.ones(2, 13, 13)
    assert tiles.choose_tiles(query, window) is choice
    output, lse = fused_forward.forward(query, key, value, rpb, window, 0.5)
    grads = [torch.empty_like(x) for x in (query, key, value)]
    fused_backward.backward(output, lse, query, key, value, rpb, output, lse, window, 0.5, *grads)
    assert len(launches) == 6
    for kernel, args, kwargs in launches.values():
        compiled = compile_launch(kernel, args, kwargs)
        assert ".target sm_90" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= SHARED_MEMORY
