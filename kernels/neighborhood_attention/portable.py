"""Neighborhood attention in PyTorch's own operators, for export to formats that know no others.

Every query's window is gathered, which takes `prod(kernel_size)` times the memory of the input.
Sizes may be symbolic.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neighborhood_attention.geometry import (
    Neighborhood,
    bias_index,
    group_length,
    window_end,
    window_start,
)

__all__ = ["attention_qkvpacked"]


def attention_qkvpacked(
    qkv: Tensor, rpb: Tensor | None, flat_window: Sequence[int], scale: float
) -> Tensor:
    """Output of `na2d_qkvpacked` and its likes for other numbers of axes.

    Args:
        qkv: [B, *spatial, 3, heads, D].
        rpb: [heads, 2 * kernel_size - 1, ...].
        flat_window: `Neighborhood.flat`.
        scale: Factor of the dot products.

    Returns:
        [B, *spatial, heads, D].
    """
    window = Neighborhood.from_flat(tuple(flat_window))
    query, key, value = qkv.unbind(-3)
    bias = qkv.new_zeros(1, *[1] * window.dims) if rpb is None else rpb.to(qkv.dtype)
    for axis in range(window.dims):
        keys, places, attends = _axis_windows(window, axis, qkv.shape[1 + axis], qkv.device)
        # The axes before this one have become two each: queries, and their windows.
        key, value = (_pick(x, 1 + 2 * axis, keys) for x in (key, value))
        bias = _pick(bias, 1 + 2 * axis, torch.zeros_like(places) if rpb is None else places)
        shape = [1] * bias.dim()
        shape[1 + 2 * axis : 3 + 2 * axis] = attends.shape
        bias = bias.masked_fill(~attends.view(shape), -torch.inf)
    key, value = (_windows_last(x.movedim(-2, 1), window.dims) for x in (key, value))
    bias = _windows_last(bias.unsqueeze(0).unsqueeze(-1), window.dims).squeeze(-1)
    scores = (key @ (query * scale).movedim(-2, 1).unsqueeze(-1)).squeeze(-1) + bias
    output = scores.softmax(-1).unsqueeze(-2) @ value
    return output.squeeze(-2).movedim(1, -2)


def _axis_windows(
    window: Neighborhood, axis: int, size: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For each query of an axis, [size, kernel_size]: keys, places in the bias, which count."""
    kernel_size, stride, dilation, is_causal = (
        setting[axis]
        for setting in (window.kernel_size, window.stride, window.dilation, window.is_causal)
    )
    position: Any = torch.arange(size, device=device).unsqueeze(1)  # of ints by its users
    group, query = position % dilation, position // dilation
    length = group_length(group, size, dilation)
    start: Any = window_start(query, length, kernel_size, stride, is_causal)
    key: Any = start + torch.arange(kernel_size, device=device)
    attends = key < window_end(query, start, kernel_size, is_causal)
    key = torch.where(attends, key, query)
    place: Any = bias_index(query, key, kernel_size)
    return key * dilation + group, place, attends


def _pick(x: Tensor, dim: int, positions: Tensor) -> Tensor:
    """Replace an axis by the two of `positions`."""
    picked: Tensor = x.index_select(dim, positions.flatten()).unflatten(dim, positions.shape)
    return picked


def _windows_last(x: Tensor, dims: int) -> Tensor:
    """[B, N, S_0, K_0, S_1, K_1, ..., D] to [B, N, S_0, S_1, ..., K_0 * K_1 * ..., D]."""
    queries, windows = (range(first, 2 + 2 * dims, 2) for first in (2, 3))
    return x.permute(0, 1, *queries, *windows, -1).flatten(2 + dims, -2)
