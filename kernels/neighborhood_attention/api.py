"""The public functions: they check arguments, follow autocast and call the registered operators.

Shapes: B batch, H height, W width, heads, D head dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neighborhood_attention import checks
from neighborhood_attention.backends import check_name
from neighborhood_attention.geometry import Neighborhood


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
    if additional_keys is not None or additional_values is not None:
        raise NotImplementedError("additional_keys and additional_values are not supported yet")
    query, key, value = (
        _to_autocast_dtype(name, tensor)
        for name, tensor in (("query", query), ("key", key), ("value", value))
    )
    checks.check_heads_last("query", query, 2)
    checks.check_heads_last("key", key, 2)
    checks.check_heads_last("value", value, 2)
    checks.check_alike(query, {"key": key, "value": value})
    window = _checked_window(query, kernel_size, stride, dilation, is_causal, rpb, backend)
    output, lse = torch.ops.neighborhood_attention.attention(
        query, key, value, rpb, *_operator_arguments(window, scale, query.shape[-1], backend)
    )
    return (output, lse) if return_lse else output


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
    qkv = _to_autocast_dtype("qkv", qkv)
    if qkv.dim() != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv: expected [B, H, W, 3, heads, D], got shape {tuple(qkv.shape)}")
    query = qkv.select(3, 0)
    checks.check_heads_last("qkv", query, 2)
    window = _checked_window(query, kernel_size, stride, dilation, is_causal, rpb, backend)
    output, lse = torch.ops.neighborhood_attention.attention_qkvpacked(
        qkv, rpb, *_operator_arguments(window, scale, query.shape[-1], backend)
    )
    return (output, lse) if return_lse else output


def _to_autocast_dtype(name: str, tensor: Tensor) -> Tensor:
    checks.check_tensor(name, tensor)
    device = tensor.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return tensor
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _checked_window(
    query: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
    rpb: Tensor | None,
    backend: str | None,
) -> Neighborhood:
    window = checks.make_neighborhood(query.dim() - 3, kernel_size, stride, dilation, is_causal)
    checks.check_fits(window, query.shape[1:-2])
    checks.check_bias(rpb, query, window)
    check_name(backend)
    return window


def _operator_arguments(
    window: Neighborhood, scale: float | None, head_dim: int, backend: str | None
) -> tuple[Any, ...]:
    """The operators' arguments behind the tensors, in the order of their schema."""
    scale = checks.checked_scale("scale", scale, head_dim)
    return window.kernel_size, window.stride, window.dilation, window.is_causal, scale, backend
