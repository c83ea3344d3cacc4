"""The fused backend: one kernel forward, four backward, for 2-D problems on a GPU."""

import torch
import triton
from torch import Tensor

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.triton import fused_backward, fused_forward
from neighborhood_attention.geometry import Neighborhood

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(inputs: Inputs, window: Neighborhood) -> str | None:
    """Why this backend cannot run the problem; None when it can."""
    query, key, value = inputs[:3]
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
    if value.shape[-1] != query.shape[-1]:
        return f"supports one head dimension so far, not {query.shape[-1]} and {value.shape[-1]}"
    if key.shape[-2] != query.shape[-2]:
        return f"supports a key head for each query head so far, not {key.shape[-2]} in all"
    if inputs.additional_keys is not None:
        return "does not support additional keys so far"
    return None


def forward(inputs: Inputs, window: Neighborhood, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    with torch.cuda.device_of(inputs.query):  # Triton launches on the current GPU
        return fused_forward.forward(*inputs[:4], window, scale)


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    inputs: Inputs,
    output: Tensor,
    lse: Tensor,
    window: Neighborhood,
    scale: float,
    gradients: Inputs,
) -> None:
    """Fills the gradients."""
    with torch.cuda.device_of(inputs.query):
        grad_rpb = fused_backward.backward(
            grad_output, grad_lse, *inputs[:4], output, lse, window, scale, *gradients[:3]
        )
    if gradients.rpb is not None and grad_rpb is not None:
        gradients.rpb.copy_(grad_rpb)
