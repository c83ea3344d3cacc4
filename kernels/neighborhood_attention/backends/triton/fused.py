"""The fused backend: one kernel forward, four backward, for 2-D problems on a GPU."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import triton
from torch import Tensor

from neighborhood_attention.backends.triton import fused_backward, fused_forward
from neighborhood_attention.geometry import Neighborhood

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(query: Tensor, rpb: Tensor | None, window: Neighborhood) -> str | None:
    """Why this backend cannot run the problem; None when it can."""
    if not query.is_cuda and not triton.knobs.runtime.interpret:
        return f"needs tensors on a GPU, got {query.device.type}; use backend='reference'"
    if query.is_cuda and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(query.device)
        if capability < (8, 0):  # Triton's own limit
            return f"needs a GPU of compute capability 8.0 or more, not {capability}"
    if query.dtype not in _DTYPES:
        return f"supports fp16, bf16 and fp32, not {query.dtype}; use backend='reference'"
    if window.dims != 2:
        return f"supports 2-D problems so far, not {window.dims}-D"
    if query.shape[-1] > 256:
        return f"supports head dimensions up to 256, not {query.shape[-1]}"
    return None


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current GPU, which need not be that of the tensors."""

    @wraps(function)
    def call(tensor: Tensor, *others: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return function(tensor, *others)

    return call


forward = _on_its_device(fused_forward.forward)
backward = _on_its_device(fused_backward.backward)

__all__ = ["backward", "forward", "supports"]
