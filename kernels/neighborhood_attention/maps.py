"""Attention probabilities as maps, for pictures and inspection."""

from collections.abc import Sequence

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
        query: [B, H, W, heads, D].
        key: As `query`.
        kernel_size: As in `na2d`; so are stride, dilation, is_causal, scale and rpb.
        stride: See above.
        dilation: See above.
        is_causal: See above.
        scale: See above.
        rpb: See above.
        positions: P positions (h, w) of queries.

    Returns:
        Probabilities [B, heads, P, H, W] in fp32 (fp64 for fp64): zero outside each window.

    Raises:
        ValueError: As `na2d`; a position lies outside the map.
        TypeError: As `na2d`.
    """
    checks.check_heads_last("query", query, 2)
    checks.check_heads_last("key", key, 2)
    checks.check_alike(query, {"key": key})
    batch, *spatial, heads, head_dim = query.shape
    window = checks.make_neighborhood(2, kernel_size, stride, dilation, is_causal)
    checks.check_fits(window, spatial)
    checks.check_bias(rpb, query, window)
    scale = checks.checked_scale("scale", scale, head_dim)
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    maps = torch.zeros(batch, heads, len(positions), *spatial, dtype=dtype, device=query.device)
    for p, position in enumerate(positions):
        checks.check_position(f"positions[{p}]", position, spatial)
        h, w = position
        (rows, bias_rows), (columns, bias_columns) = (
            _axis_window(window, axis, i, spatial[axis]) for axis, i in enumerate(position)
        )
        logits = torch.einsum(
            "bnd,bhwnd->bnhw", query[:, h, w].to(dtype) * scale, key[:, rows, columns].to(dtype)
        )
        if rpb is not None:
            logits = logits + rpb[:, bias_rows, bias_columns].to(dtype)
        maps[:, :, p, rows, columns] = logits.flatten(2).softmax(-1).view_as(logits)
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
