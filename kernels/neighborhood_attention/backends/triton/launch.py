"""The arguments that the kernels take in the same form."""

import torch
import triton
from torch import Tensor

from neighborhood_attention.geometry import Neighborhood


def window_arguments(window: Neighborhood) -> dict[str, int | bool]:
    """The window: KERNEL_SIZE_H, KERNEL_SIZE_W, STRIDE_H and so on."""
    return {
        f"{name.upper()}_{axis}": value
        for name in ("kernel_size", "stride", "dilation", "is_causal")
        for axis, value in zip("HW", getattr(window, name), strict=True)
    }


def with_contiguous_heads(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, copied where the head dimension is strided (as in the gradient of a sum)."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def block_arguments(query: Tensor, *others: Tensor) -> dict[str, int | str | bool]:
    """Block of the head dimension, precision of fp32 products, width of offsets within an image."""
    height, width, heads, head_dim = query.shape[1:]
    tf32 = query.is_cuda and torch.backends.cuda.matmul.fp32_precision == "tf32"
    extent = max(height * t.stride(1) + width * t.stride(2) for t in (query, *others))
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),  # tensor cores take no less
        "PRECISION": "tf32" if tf32 else "ieee",
        "WIDE": max(extent, height * width * heads * head_dim) >= 2**31,
    }
