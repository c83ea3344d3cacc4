"""The public functions: they check arguments, follow autocast and call the registered operators.

Shapes: B batch, H height, W width, heads, D head dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neighborhood_attention import checks
from neighborhood_attention.backends import check_name

# Kernel size, stride, dilation, causal: for all axes or for each.
_Axes = tuple[int | Sequence[int], int | Sequence[int], int | Sequence[int], bool | Sequence[bool]]


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int],
    stride: int | tuple[int] = 1,
    dilation: int | tuple[int] = 1,
    is_causal: bool | tuple[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """1-D neighborhood attention over [B, L, heads, D]; `rpb` is [heads, 2 * kernel_size - 1].

    Otherwise as `na2d`. `backend="fused"` does not run it yet.
    """
    axes = kernel_size, stride, dilation, is_causal
    additional = additional_keys, additional_values
    return _attention(1, query, key, value, axes, scale, rpb, additional, return_lse, backend)


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """2-D neighborhood attention: each token attends to the window of keys around it.

    `softmax(scale * query @ key^T + rpb) @ value` over the `kernel_size` nearest keys of each axis.
    A window that would cross a border is shifted inside, so that all are equally large.

    Args:
        query: [B, H, W, heads, D]; fp16, bf16, fp32 or fp64; any strides. Autocast casts it to its
            dtype, unless it is fp64.
        key: As `query`.
        value: As `query`.
        kernel_size: Window size, for both axes or for each; odd or even; kernel_size * dilation <=
            axis length.
        stride: Queries that share one window, 1 <= stride <= kernel_size; the output keeps the
            input's size.
        dilation: Distance between neighboring keys.
        is_causal: Attend to no key behind the query on this axis; the window is then truncated at
            the start.
        scale: Factor of the dot products; default 1 / sqrt(D).
        rpb: Relative positional bias [heads, 2 * kernel_size - 1, 2 * kernel_size - 1]; the
            entry at [key - query + kernel_size - 1], counted in dilation steps, is added to the
            scaled logit. Any floating dtype; its gradient has that dtype.
        additional_keys: Not supported yet.
        additional_values: Not supported yet.
        return_lse: Also return the log-sum-exp of the logits.
        backend: "reference" or "fused"; default: "fused" on a GPU where it can run, else
            "reference". A backend that is named and cannot run raises, it never falls back.

    Returns:
        [B, H, W, heads, D] in the dtype of `query`; with `return_lse` also [B, H, W, heads] in fp32
        (fp64 for fp64), natural logarithm.

    Raises:
        ValueError: A shape, size or name breaks one of the rules above.
        TypeError: An argument has the wrong type or dtype.
        NotImplementedError: The backend named does not support this combination; no backend
            supports additional keys and values. The backward raises it for create_graph=True.
    """
    axes = kernel_size, stride, dilation, is_causal
    additional = additional_keys, additional_values
    return _attention(2, query, key, value, axes, scale, rpb, additional, return_lse, backend)


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | tuple[int, int, int],
    stride: int | tuple[int, int, int] = 1,
    dilation: int | tuple[int, int, int] = 1,
    is_causal: bool | tuple[bool, bool, bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """3-D neighborhood attention over [B, D, H, W, heads, head_dim]; `rpb` has an axis for each.

    Otherwise as `na2d`. `backend="fused"` does not run it yet.
    """
    axes = kernel_size, stride, dilation, is_causal
    additional = additional_keys, additional_values
    return _attention(3, query, key, value, axes, scale, rpb, additional, return_lse, backend)


def na1d_qkvpacked(
    qkv: Tensor,
    kernel_size: int | tuple[int],
    stride: int | tuple[int] = 1,
    dilation: int | tuple[int] = 1,
    is_causal: bool | tuple[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`na1d` of a packed projection [B, L, 3, heads, D]; see `na2d_qkvpacked`."""
    axes = kernel_size, stride, dilation, is_causal
    return _attention_qkvpacked(1, qkv, axes, scale, rpb, return_lse, backend)


def na2d_qkvpacked(
    qkv: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    dilation: int | tuple[int, int] = 1,
    is_causal: bool | tuple[bool, bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`na2d` of a packed projection [B, H, W, 3, heads, D].

    Nothing is permuted or copied, and the gradient is one packed tensor.

    The other arguments, the results and the errors are those of `na2d`.
    """
    axes = kernel_size, stride, dilation, is_causal
    return _attention_qkvpacked(2, qkv, axes, scale, rpb, return_lse, backend)


def na3d_qkvpacked(
    qkv: Tensor,
    kernel_size: int | tuple[int, int, int],
    stride: int | tuple[int, int, int] = 1,
    dilation: int | tuple[int, int, int] = 1,
    is_causal: bool | tuple[bool, bool, bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`na3d` of a packed projection [B, D, H, W, 3, heads, head_dim]; see `na2d_qkvpacked`."""
    axes = kernel_size, stride, dilation, is_causal
    return _attention_qkvpacked(3, qkv, axes, scale, rpb, return_lse, backend)


def _attention(
    dims: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: _Axes,
    scale: float | None,
    rpb: Tensor | None,
    additional: tuple[Tensor | None, Tensor | None],
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    if any(tensor is not None for tensor in additional):
        raise NotImplementedError("additional_keys and additional_values are not supported yet")
    query, key, value = (
        _to_autocast_dtype(name, tensor)
        for name, tensor in (("query", query), ("key", key), ("value", value))
    )
    checks.check_heads_last("query", query, dims)
    checks.check_heads_last("key", key, dims)
    checks.check_heads_last("value", value, dims)
    checks.check_alike(query, {"key": key, "value": value})
    arguments = _operator_arguments(query, axes, scale, rpb, backend)
    output, lse = torch.ops.neighborhood_attention.attention(
        query, key, value, rpb, None, None, *arguments
    )
    return (output, lse) if return_lse else output


def _attention_qkvpacked(
    dims: int,
    qkv: Tensor,
    axes: _Axes,
    scale: float | None,
    rpb: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    qkv = _to_autocast_dtype("qkv", qkv)
    if qkv.dim() != dims + 4 or qkv.shape[-3] != 3:
        layout = f"[B, {checks.SPATIAL[dims]}, 3, heads, D]"
        raise ValueError(f"qkv: expected {layout}, got shape {tuple(qkv.shape)}")
    query = qkv.select(-3, 0)
    checks.check_heads_last("qkv", query, dims)
    arguments = _operator_arguments(query, axes, scale, rpb, backend)
    output, lse = torch.ops.neighborhood_attention.attention_qkvpacked(qkv, rpb, *arguments)
    return (output, lse) if return_lse else output


def _to_autocast_dtype(name: str, tensor: Tensor) -> Tensor:
    checks.check_tensor(name, tensor)
    device = tensor.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _operator_arguments(
    query: Tensor, axes: _Axes, scale: float | None, rpb: Tensor | None, backend: str | None
) -> tuple[Any, ...]:
    """The operators' arguments behind the tensors, checked, in the order of their schema."""
    window = checks.make_neighborhood(query.dim() - 3, *axes)
    checks.check_fits(window, query.shape[1:-2])
    checks.check_bias(rpb, query, window)
    check_name(backend)
    scale = checks.checked_scale("scale", scale, query.shape[-1])
    return window.flat, scale, backend
