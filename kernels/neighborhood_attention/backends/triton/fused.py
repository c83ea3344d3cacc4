"""The fused backend: 1-D, 2-D and 3-D on a GPU, one kernel forward, three backward or more."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.triton import fused_backward, fused_forward
from neighborhood_attention.backends.triton.launch import with_contiguous_heads
from neighborhood_attention.geometry import Neighborhood

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
_NOTHING = nullcontext()
MIN_CAPABILITY = (8, 0)  # Triton's own limit


def supports(inputs: Inputs, window: Neighborhood) -> str | None:
    """Why this backend cannot run the problem; None when it can."""
    query = inputs.query
    if query.is_cuda:
        if not _has_capability(query.device):
            return f"needs an NVIDIA GPU of compute capability {MIN_CAPABILITY} or more"
    elif not triton.knobs.runtime.interpret:
        return f"needs tensors on a GPU, got {query.device.type}; use backend='reference'"
    if query.dtype not in _DTYPES:
        return f"supports fp16, bf16 and fp32, not {query.dtype}; use backend='reference'"
    head_dim = max(query.shape[-1], inputs.value.shape[-1])
    if head_dim > MAX_HEAD_DIM:
        return f"supports head dimensions up to {MAX_HEAD_DIM}, not {head_dim}"
    return None


@cache
def _has_capability(device: torch.device) -> bool:
    # Triton knows no limit of registers on AMD's GPUs.
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def forward(inputs: Inputs, window: Neighborhood, scale: float) -> tuple[Tensor, Tensor]:
    """See `fused_forward`."""
    with _on_device_of(inputs.query):
        return fused_forward.forward(_launchable(inputs), window, scale)


def forward_packed(
    qkv: Tensor, rpb: Tensor | None, window: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """See `fused_forward`."""
    with _on_device_of(qkv):
        return fused_forward.forward_packed(with_contiguous_heads(qkv), rpb, window, scale)


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
    """See `fused_backward`."""
    if grad_output.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    grad_output = with_contiguous_heads(grad_output)
    with _on_device_of(inputs.query):
        fused_backward.backward(
            grad_output, grad_lse, _launchable(inputs), output, lse, window, scale, gradients
        )


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, which need not be that of the tensors."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device_of(tensor)


def _launchable(inputs: Inputs) -> Inputs:
    """Heads contiguous; no additional keys instead of zero of them."""
    query, key, value, rpb, keys, values = inputs
    if keys is None and query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
        return inputs
    query, key, value = map(with_contiguous_heads, (query, key, value))
    if keys is None or values is None or keys.shape[1] == 0:
        return Inputs(query, key, value, rpb)
    return Inputs(
        query, key, value, rpb, with_contiguous_heads(keys), with_contiguous_heads(values)
    )
