"""When PyTorch's dispatcher may be left out: it converts settings and results to C++ and back.

That takes longer than all that is left to do between a call and the launch of its kernels.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, profiler


def _bits(*names: str) -> int:
    """Of a set of dispatch keys, as PyTorch represents it."""
    bits = 0
    for name in names:
        bits |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return bits


# Dense tensors have these keys alone: no view that is lazily negated, no wrapper of a transform.
_PLAIN = _bits(
    "CPU", "AutogradCPU", "AutocastCPU", "CUDA", "AutogradCUDA", "AutocastCUDA", "ADInplaceOrView"
)
# What a thread adds to them, unless a mode or a tracer is active.
_ALWAYS = _bits("BackendSelect", "ADInplaceOrView")
_TYPES = {Tensor, nn.Parameter}

_keys = torch._C._dispatch_keys
_thread_keys = torch._C._dispatch_tls_local_include_set
_count_function_modes = torch._C._len_torch_function_stack
_is_profiling = torch._C._autograd._profiler_enabled


def needs_gradient(tensors: Iterable[Tensor | None]) -> bool:
    """Whether what is computed of them is to be differentiable."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_idle(tensors: Iterable[Tensor | None]) -> bool:
    """Whether it would do nothing but call the operator's kernel, or that for its gradient.

    It does more while a compiler, a tracer, a transform, a mode or a profiler looks on. Not seen
    are an ExecutionTraceObserver by itself, and kernels that others register for the operator.
    """
    if torch.compiler.is_compiling():  # first: TorchDynamo cannot trace the others
        return False
    if (
        _thread_keys().raw_repr() & ~_ALWAYS
        or _count_function_modes()
        or profiler._is_profiler_enabled  # in any thread
        or _is_profiling()
        or forward_ad._current_level >= 0
    ):
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _TYPES or _keys(tensor).raw_repr() & ~_PLAIN:
            return False
    return True
