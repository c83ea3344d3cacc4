"""Compiles a case's kernels into Triton's cache, in a process of its own, without launching one."""

import torch
import triton

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.triton import fused_backward, fused_forward, tile_table
from neighborhood_attention.geometry import Neighborhood

_run = triton.JITFunction.run


def _compile_only(kernel, *args, grid, warmup, **options):
    _run(kernel, *args, grid=grid, warmup=True, **options)


def compile_case(case, dtype):
    """Forward and backward; the tensors take no memory, since none is written."""
    triton.JITFunction.run = _compile_only
    tile_table.capability = lambda _: "{}.{}".format(*torch.cuda.get_device_capability())
    inputs = Inputs(
        **{
            name: torch.empty(shape, dtype=torch.float32 if name == "rpb" else dtype)
            for name, shape in case.shapes().items()
        }
    )
    window, scale = Neighborhood(*case.window), case.head_dim**-0.5
    output, lse = fused_forward.forward(inputs, window, scale)
    fused_backward.backward(output, lse, inputs, output, lse, window, scale, inputs)
