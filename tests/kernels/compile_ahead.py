"""Compiles a case's kernels into Triton's cache, in a process of its own, without launching one."""

import torch

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.triton import (
    fused_backward,
    fused_direct_forward,
    fused_forward,
)
from neighborhood_attention.geometry import Neighborhood
from neighborhood_attention.tune.ahead import compile_only


def compile_case(case, dtype):
    """Forward and backward; the tensors take no memory, since none is written."""
    inputs = Inputs(
        **{
            name: torch.empty(shape, dtype=torch.float32 if name == "rpb" else dtype)
            for name, shape in case.shapes().items()
        }
    )
    fused_direct_forward.is_worth_it = lambda problem: False  # as in the tests' own process
    window, scale = Neighborhood(*case.window), case.head_dim**-0.5
    with compile_only():
        output, lse = fused_forward.forward(inputs, window, scale)
        fused_backward.backward(output, lse, inputs, output, lse, window, scale, inputs)
