"""Where the GPU's time goes: kernels sorted by their names into the parts of a model."""

import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first that matches. Inductor names a kernel by all that it fused: normalization goes before
# what is fused with it. Our own kernels are told by `attention_kernels`.
COMPONENTS = {
    "attention": r"flash|fmha|attention|sdpa|\bfna|natten",
    "optimizer": r"multi_tensor|adam",
    "convolution": r"convol|conv_|conv2d|fprop|dgrad|wgrad|implicit|nchw|nhwc",
    "normalization": r"layer_?norm|layer_norm|GammaBeta|batch_?norm",
    "matrix products": r"gemm|nvjet|cutlass|cublas|split_?k|_mm_|addmm|small_linear",
    "activation": r"gelu",
    "copies": r"copy|memcpy|memset",
    "other": r"",
}


def milliseconds_by_component(step: Callable[[], object], calls: int) -> dict[str, float]:
    """Time of a step's kernels on the GPU, mean of `calls` calls; 0 where there are none."""
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
    times = dict.fromkeys(COMPONENTS, 0.0)
    ours = attention_kernels()
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            elapsed = event.time_range.elapsed_us()
            times[component(event.name, ours)] += elapsed / 1e3 / calls
    return times


def component(kernel: str, attention: set[str]) -> str:
    """The part that a kernel belongs to.

    Args:
        kernel: Its name.
        attention: Names of neighborhood attention's own kernels.
    """
    if re.sub(r"_\d+$", "", kernel) in attention:
        return "attention"
    return next(
        name for name, words in COMPONENTS.items() if re.search(words, kernel, re.IGNORECASE)
    )


def attention_kernels() -> set[str]:
    """Names of the Triton kernels in the backends that were used so far."""
    package = "neighborhood_attention.backends.triton"
    modules: list[Any] = [module for name, module in sys.modules.items() if package in name]
    functions = [value for module in modules for value in vars(module).values()]
    # Gluon's are a subclass of Triton's.
    return {f.__name__ for f in functions if "JITFunction" in (c.__name__ for c in type(f).__mro__)}
