"""Attention probabilities as maps, for pictures and inspection."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neighborhood_attention import checks
from neighborhood_attention.geometry import (
    Neighborhood,
    bias_index,
    group_length,
    window_end,
    window_start,
)


def attention_maps(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    *,
    positions: Sequence[Sequence[int]],
) -> Tensor:
    """Attention of chosen queries, scattered to the full map.

    Args:
        query: [B, L, heads, D], [B, H, W, heads, D] or [B, D, H, W, heads, head_dim].
        key: As `query`; its heads may be fewer, see `na2d`.
        kernel_size: As in `na2d`; so are stride, dilation, is_causal, scale and rpb.
        stride: See above.
        dilation: See above.
        is_causal: See above.
        scale: See above.
        rpb: See above.
        positions: P positions of queries: (i,), (h, w) or (d, h, w).

    Returns:
        Probabilities [B, heads, P, *spatial] in fp32 (fp64 for fp64): zero outside each window.

    Raises:
        ValueError: As `na2d`; a position lies outside the map.
        TypeError: As `na2d`.
    """
    query, key = checks.autocast(query, key)
    window, scale = checks.checked_scores(
        query, key, kernel_size, stride, dilation, is_causal, scale, rpb
    )
    for p, position in enumerate(positions):
        checks.check_position(f"positions[{p}]", position, query.shape[1:-2])
    with torch.autocast(query.device.type, enabled=False):
        return _maps(query, key, window, scale, rpb, positions)


def _maps(
    query: Tensor, key: Tensor, window: Neighborhood, scale: float, rpb: Tensor | None,
    positions: Sequence[Sequence[int]],
) -> Tensor:  # fmt: skip
    batch, *spatial, heads, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    maps = query.new_zeros((batch, heads, len(positions), *spatial), dtype=dtype)
    everything: Any = slice(None)
    for p, position in enumerate(positions):
        axes = [_axis_window(window, a, i, spatial[a]) for a, i in enumerate(position)]
        keys, bias = [k for k, _ in axes], [b for _, b in axes]
        rows = (query[(everything, *position)].to(dtype) * scale).unflatten(1, (key.shape[-2], -1))
        logits = torch.einsum(
            "bgnd,bkgd->bgnk", rows, key[(everything, *keys)].flatten(1, -3).to(dtype)
        )
        logits = logits.flatten(1, 2)
        if rpb is not None:
            logits = logits + rpb[(everything, *bias)].flatten(1).to(dtype)
        target = maps[(everything, everything, p, *keys)]
        target.copy_(logits.softmax(-1).view(target.shape))
    return maps


def _axis_window(window: Neighborhood, axis: int, position: int, size: int) -> tuple[slice, slice]:
    """On one axis, the keys that a query attends to, and their entries of the bias."""
    kernel_size, stride, step, is_causal = (
        setting[axis]
        for setting in (window.kernel_size, window.stride, window.dilation, window.is_causal)
    )
    query, group = divmod(position, step)
    start = window_start(query, group_length(group, size, step), kernel_size, stride, is_causal)
    end = window_end(query, start, kernel_size, is_causal)
    offset = bias_index(query, start, kernel_size)
    keys = slice(start * step + group, (end - 1) * step + group + 1, step)
    return keys, slice(offset, offset + end - start)
