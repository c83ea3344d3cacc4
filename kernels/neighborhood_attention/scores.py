"""The two halves of neighborhood attention, for whoever needs the scores or probabilities.

They hold a number for each pair of a query and a key of its window, which the fused operator never
does. `neighborhood_apply(neighborhood_scores(...).softmax(-1), value, ...)` is `na1d`, `na2d` or
`na3d`. Both run on every device, in PyTorch's own operations.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neighborhood_attention import checks
from neighborhood_attention.backends import Inputs, reference_scores
from neighborhood_attention.geometry import Neighborhood
from neighborhood_attention.ops import (
    autograd_kernel,
    below_autograd,
    define,
    empty,
    refuse_second_derivative,
    set_autograd_kernel,
)


def neighborhood_scores(
    query: Tensor,
    key: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
) -> Tensor:
    """Logits of each query with the keys of its window: `scale * query @ key^T + rpb`.

    Args:
        query: [B, L, heads, D], [B, H, W, heads, D] or [B, D, H, W, heads, head_dim].
        key: As `query`; its heads may be fewer, see `na2d`.
        kernel_size: As in `na2d`; so are stride, dilation, is_causal, scale and rpb.
        stride: See above.
        dilation: See above.
        is_causal: See above.
        scale: See above.
        rpb: See above.

    Returns:
        [B, *spatial, heads, K] in fp32 (fp64 for fp64), K the product of the kernel sizes. The keys
        of a window stand in the map's order, row by row, the first one first. On a causal axis a
        window is truncated: the entries behind its last key are -inf.

    Raises:
        ValueError: As `na2d`.
        TypeError: As `na2d`.
        NotImplementedError: Under derivatives of `torch.func`; in a backward for create_graph=True.
    """
    query, key = checks.autocast(query, key)
    window, scale = checks.checked_scores(
        query, key, kernel_size, stride, dilation, is_causal, scale, rpb
    )
    scores: Tensor = _scores(query, key, rpb, window.flat, scale)
    return scores


def neighborhood_apply(
    probabilities: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
) -> Tensor:
    """Sum of the values of each query's window, weighted by its probabilities.

    Args:
        probabilities: [B, *spatial, heads, K], in the layout of `neighborhood_scores`; any of the
            four dtypes. Entries without a key are not read.
        value: [B, *spatial, key_heads, D_v]; key_heads divides heads.
        kernel_size: As in `na2d`; so are stride, dilation and is_causal.
        stride: See above.
        dilation: See above.
        is_causal: See above.

    Returns:
        [B, *spatial, heads, D_v] in the dtype of `value`.

    Raises:
        ValueError: As `na2d`; K is not the product of the kernel sizes.
        TypeError: As `na2d`.
        NotImplementedError: Under derivatives of `torch.func`; in a backward for create_graph=True.
    """
    (value,) = checks.autocast(value)
    dims = checks.check_dims("value", value)
    checks.check_heads_last("value", value, dims)
    window = checks.make_neighborhood(dims, kernel_size, stride, dilation, is_causal)
    checks.check_fits(window, value.shape[1:-2])
    checks.check_probabilities(probabilities, value, window)
    output: Tensor = _apply(probabilities, value, window.flat)
    return output


def _scores_kernel(
    query: Tensor, key: Tensor, rpb: Tensor | None, window: list[int], scale: float
) -> Tensor:
    neighborhood = Neighborhood.from_flat(tuple(window))
    scores: Tensor = reference_scores.scores(Inputs(query, key, key, rpb), neighborhood, scale)
    return scores


def _scores_fake(
    query: Tensor, key: Tensor, rpb: Tensor | None, window: list[int], scale: float
) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    size = Neighborhood.from_flat(tuple(window)).size
    return torch.empty((*query.shape[:-1], size), dtype=dtype, device=query.device)


def _scores_backward_kernel(
    grad_scores: Tensor, query: Tensor, key: Tensor, rpb: Tensor | None,
    window: list[int], scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _scores_backward_fake(grad_scores, query, key, rpb, window, scale)
    grad_query, grad_key, grad_rpb = gradients
    buffers = Inputs(grad_query, grad_key, grad_key, None if rpb is None else grad_rpb)
    neighborhood = Neighborhood.from_flat(tuple(window))
    inputs = Inputs(query, key, key, rpb)
    reference_scores.scores_backward(inputs, grad_scores, neighborhood, scale, buffers)
    return gradients


def _scores_backward_fake(
    grad_scores: Tensor, query: Tensor, key: Tensor, rpb: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    grad_rpb = query.new_empty(0) if rpb is None else empty(rpb)
    return empty(query), empty(key), grad_rpb


def _apply_kernel(probabilities: Tensor, value: Tensor, window: list[int]) -> Tensor:
    inputs = Inputs(probabilities, value, value)
    output: Tensor = reference_scores.apply(inputs, Neighborhood.from_flat(tuple(window)))
    return output


def _apply_fake(probabilities: Tensor, value: Tensor, window: list[int]) -> Tensor:
    shape = (*probabilities.shape[:-1], value.shape[-1])
    return torch.empty(shape, dtype=value.dtype, device=value.device)


def _apply_backward_kernel(
    grad_output: Tensor, probabilities: Tensor, value: Tensor, window: list[int]
) -> tuple[Tensor, Tensor]:
    gradients = _apply_backward_fake(grad_output, probabilities, value, window)
    inputs = Inputs(probabilities, value, value)
    neighborhood = Neighborhood.from_flat(tuple(window))
    reference_scores.apply_backward(inputs, grad_output, neighborhood, *gradients)
    return gradients


def _apply_backward_fake(
    grad_output: Tensor, probabilities: Tensor, value: Tensor, window: list[int]
) -> tuple[Tensor, Tensor]:
    return empty(probabilities), empty(value)


_scores = define(
    "scores(Tensor query, Tensor key, Tensor? rpb, int[] window, float scale) -> Tensor",
    _scores_kernel, _scores_fake,
)  # fmt: skip
_scores_backward = define(
    "scores_backward(Tensor grad_scores, Tensor query, Tensor key, Tensor? rpb, int[] window, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    _scores_backward_kernel, _scores_backward_fake,
)  # fmt: skip
_apply = define(
    "apply(Tensor probabilities, Tensor value, int[] window) -> Tensor", _apply_kernel, _apply_fake
)
_apply_backward = define(
    "apply_backward(Tensor grad_output, Tensor probabilities, Tensor value, int[] window) "
    "-> (Tensor, Tensor)",
    _apply_backward_kernel, _apply_backward_fake,
)  # fmt: skip


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Any, *arguments: Any) -> Any:
        *tensors, ctx.window, ctx.scale = arguments
        ctx.save_for_backward(*tensors)
        return below_autograd(_scores, keys, arguments)

    @staticmethod
    def backward(ctx: Any, grad_scores: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        query, key, rpb = ctx.saved_tensors
        grads = _scores_backward(grad_scores, query, key, rpb, ctx.window, ctx.scale)
        return None, *grads[:2], None if rpb is None else grads[2], None, None


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Any, *arguments: Any) -> Any:
        *tensors, ctx.window = arguments
        ctx.save_for_backward(*tensors)
        return below_autograd(_apply, keys, arguments)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        return None, *_apply_backward(grad_output, *ctx.saved_tensors, ctx.window), None


set_autograd_kernel("scores", autograd_kernel(3, _scores, _Scores))
set_autograd_kernel("apply", autograd_kernel(2, _apply, _Apply))
