"""The public functions: they check arguments, follow autocast and call the registered operators.

Shapes: B batch, H height, W width, heads, D head dimension of query and key, D_v of the value.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from neighborhood_attention import checks, ops
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

    Otherwise as `na2d`.
    """
    axes = kernel_size, stride, dilation, is_causal
    tensors = query, key, value, rpb, additional_keys, additional_values
    return _attention(1, tensors, axes, scale, return_lse, backend)


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
        key: [B, H, W, key_heads, D]; key_heads divides heads, and query head h uses key head
            h // (heads // key_heads): grouped-query attention (arXiv 2305.13245), or with one key
            head multi-query attention (arXiv 1911.02150).
        value: [B, H, W, key_heads, D_v].
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
            scaled logit. Any of the four dtypes; its gradient has that dtype.
        additional_keys: [B, S, key_heads, D], any S; every query attends to them too, in the same
            softmax with the same scale, without a mask or a bias.
        additional_values: [B, S, key_heads, D_v]; given with additional_keys.
        return_lse: Also return the log-sum-exp of the logits.
        backend: One of `list_backends()`; default: "fused" on a GPU where it can run, else
            "reference". A backend that is named and cannot run raises, it never falls back.

    Returns:
        [B, H, W, heads, D_v] in the dtype of `query`; with `return_lse` also [B, H, W, heads] in
        fp32 (fp64 for fp64), natural logarithm.

    Raises:
        ValueError: A shape, size or name breaks one of the rules above.
        TypeError: An argument has the wrong type or dtype.
        NotImplementedError: The backend named does not support this combination. So does a
            derivative in forward mode or under `torch.func`, and a backward with create_graph=True.
    """
    axes = kernel_size, stride, dilation, is_causal
    tensors = query, key, value, rpb, additional_keys, additional_values
    return _attention(2, tensors, axes, scale, return_lse, backend)


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

    Otherwise as `na2d`.
    """
    axes = kernel_size, stride, dilation, is_causal
    tensors = query, key, value, rpb, additional_keys, additional_values
    return _attention(3, tensors, axes, scale, return_lse, backend)


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
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    axes: _Axes,
    scale: float | None,
    return_lse: bool,
    backend: str | None,
) -> Tensor | tuple[Tensor, Tensor]:
    query, key, value, rpb, additional_keys, additional_values = tensors
    query, key, value = checks.autocast(query, key, value)
    checks.check_heads_last("query", query, dims)
    checks.check_key(query, key)
    checks.check_value(query, key, value)
    if additional_keys is not None or additional_values is not None:
        additional_keys, additional_values = checks.autocast(additional_keys, additional_values)
        checks.check_additional(query, key, value, additional_keys, additional_values)
    settings = _checked_settings(query, query.shape[1:-2], axes, scale, rpb, backend)
    output, lse = ops.attention(
        query, key, value, rpb, additional_keys, additional_values, *settings
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
    (qkv,) = checks.autocast(qkv)
    checks.check_tensor("qkv", qkv)
    if qkv.dim() != dims + 4 or qkv.shape[-3] != 3:
        layout = f"[B, {checks.SPATIAL[dims]}, 3, heads, D]"
        raise ValueError(f"qkv: expected {layout}, got shape {tuple(qkv.shape)}")
    checks.check_heads("qkv", qkv)
    settings = _checked_settings(qkv, qkv.shape[1:-3], axes, scale, rpb, backend)
    output, lse = ops.attention_qkvpacked(qkv, rpb, *settings)
    return (output, lse) if return_lse else output


def _checked_settings(
    query: Tensor,
    spatial: Sequence[int],
    axes: _Axes,
    scale: float | None,
    rpb: Tensor | None,
    backend: str | None,
) -> tuple[Any, ...]:
    """The operators' arguments behind the tensors, in the order of their schema."""
    window = checks.make_neighborhood(len(spatial), *axes)
    checks.check_fits(window, spatial)
    if rpb is not None:
        checks.check_bias(rpb, query, window)
    check_name(backend)
    return window.flat, checks.checked_scale("scale", scale, query.shape[-1]), backend
