"""The fused operations as differentiable functions; `use` tells what they take."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nat_models.fused import ops
from nat_models.fused.use import autocast_dtype
from neighborhood_attention.dispatcher import needs_gradient


class Branch(NamedTuple):
    """What is still to be added to a map [B, ..., C]: gamma * keep * values."""

    values: Tensor  # [B, ..., C]
    gamma: Tensor | None = None  # layer scale (arXiv:2103.17239), [C]
    keep: Tensor | None = None  # factors of stochastic depth (arXiv:1603.09382), [B]; no gradient


class Norm(NamedTuple):
    """A LayerNorm (arXiv:1607.06450) over the last axis."""

    weight: Tensor  # [C]
    bias: Tensor  # [C]
    eps: float  # added to the variance


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """LayerNorm of a map [..., C], `torch.nn.functional.layer_norm`."""
    dtype = x.dtype if autocast_dtype(x) is None else torch.float32
    return _add_layer_norm(x, None, norm, dtype)[1]


def add_layer_norm(x: Tensor, branch: Branch | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """The addition of a residual branch, and the LayerNorm of the sum, which the next one takes.

    Under autocast the norm is in autocast's dtype instead of fp32: the linear layer that a branch
    begins with would cast it to that.

    Args:
        x: [B, ..., C].
        branch: What to add; None for nothing.
        norm: What to make of the sum.

    Returns:
        The sum, in the dtype of its terms, and its norm.
    """
    total, normalized = _add_layer_norm(x, branch, norm, _dtype_of_norm(x, branch))
    return (x if branch is None else total), normalized


def add_norm_linear(
    x: Tensor, branch: Branch | None, norm: Norm, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm`, and a linear layer that takes the norm, which is not kept for a gradient.

    Args:
        x: [B, ..., C].
        branch: What to add; None for nothing.
        norm: What to make of the sum.
        weight: [N, C].
        bias: [N].

    Returns:
        The sum, and the linear layer's result.

    Raises:
        TypeError: The weight has another dtype than the norm, without autocast.
    """
    dtype = _dtype_of_norm(x, branch)
    if weight.dtype != dtype and autocast_dtype(x) is None:
        raise TypeError(f"weight: expected the norm's dtype {dtype}, got {weight.dtype}")
    arguments = weight, bias, *_addends(x, branch), *norm, dtype
    if needs_gradient(arguments[:-2]):
        total, output = _AddNormLinear.apply(*arguments)
    else:
        total, normalized, *_ = ops.add_layer_norm(*arguments[2:], False)
        output = F.linear(normalized, weight, bias)
    return (x if branch is None else total), output


def add_norm_mlp(
    x: Tensor, branch: Branch | None, norm: Norm,
    weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`add_layer_norm`, and an `mlp` that takes the norm, which is not kept for a gradient.

    Returns:
        The sum, and the MLP's result.
    """
    layers = weight1, bias1, weight2, bias2
    arguments = *layers, *_addends(x, branch), *norm, _dtype_of_norm(x, branch)
    if needs_gradient(arguments[:-2]):
        total, output = _AddNormMlp.apply(*arguments)
    else:
        total, normalized, *_ = ops.add_layer_norm(*arguments[4:], False)
        output = mlp(normalized, *layers)
    return (x if branch is None else total), output


def add(x: Tensor, branch: Branch | None) -> Tensor:
    """The sum of `add_layer_norm` alone, unfused."""
    if branch is None:
        return x
    values, gamma, keep = branch
    if gamma is not None:
        values = values * gamma
    if keep is not None:
        values = values * keep.view(-1, *[1] * (values.dim() - 1))
    return x + values


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """A linear layer, GELU (arXiv:1606.08415) and a second linear layer.

    Args:
        x: [..., K].
        weight1: [N, K].
        bias1: [N].
        weight2: [M, N].
        bias2: [M].
    """
    dtype = autocast_dtype(x) or x.dtype
    if needs_gradient((x, weight1, bias1, weight2, bias2)):
        return _Mlp.apply(x, weight1, bias1, weight2, bias2, dtype)  # type: ignore[no-any-return]
    x, weight1, weight2, bias2 = _cast(dtype, x, weight1, weight2, bias2)
    return F.linear(ops.linear_gelu(x, weight1, bias1, False)[1], weight2, bias2)


def small_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None = None,
    has_gelu: bool = False, gamma: Tensor | None = None, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """A linear layer of few rows, with what surrounds it, in one launch; without a gradient.

    `residual + gamma * gelu(linear(norm(x)))`, each part but the layer optional. Parameters may be
    read before earlier launches have ended that overlap: these must not write them.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].
        norm: What is made of `x` first.
        has_gelu: Whether a GELU (arXiv:1606.08415) follows.
        gamma: Layer scale, [N].
        residual: What the result is added to, [..., N].
    """
    arguments = x, weight, bias, *(norm or (None, None, 0.0)), has_gelu, gamma, residual
    return ops.small_linear(*arguments)  # type: ignore[no-any-return]


def _add_layer_norm(
    x: Tensor, branch: Branch | None, norm: Norm, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    arguments = *_addends(x, branch), *norm, dtype
    if needs_gradient(arguments[:-2]):
        return _AddLayerNorm.apply(*arguments)  # type: ignore[no-any-return]
    total, normalized, *_ = ops.add_layer_norm(*arguments, False)
    return total, normalized


def _addends(x: Tensor, branch: Branch | None) -> tuple[Any, ...]:
    return x, *(branch or (None, None, None))


def _dtype_of_norm(x: Tensor, branch: Branch | None) -> torch.dtype:
    """That of the linear layer after it."""
    addends = x.dtype if branch is None else torch.promote_types(x.dtype, branch.values.dtype)
    return autocast_dtype(x) or addends


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "a fused operation has no second derivative: create_graph=True is not supported"
        )


def _norm_forward(
    ctx: Any, x: Tensor, branch: Any, gamma: Any, keep: Any, weight: Tensor, bias: Tensor,
    eps: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
    """The sum, its norm, and what `_norm_backward` needs of tensors."""
    total, normalized, standardized, rstd = ops.add_layer_norm(
        x, branch, gamma, keep, weight, bias, eps, dtype, True
    )
    ctx.dtypes = x.dtype, None if branch is None else branch.dtype
    branch = None if gamma is None else branch
    return total, normalized, (standardized, rstd, branch, gamma, keep, weight, bias)


def _norm_backward(
    ctx: Any, kept: Any, grad_total: Tensor, grad_normalized: Tensor, norm_needed: bool
) -> tuple[Any, ...]:
    """The norm, if it is needed, and the gradients of what `_norm_forward` was given."""
    standardized, rstd, branch, gamma, keep, weight, bias = kept
    x_dtype, branch_dtype = ctx.dtypes
    has_branch = branch_dtype is not None
    # Where the branch is added as it is, one gradient is that of both.
    is_shared = gamma is None and keep is None and branch_dtype == x_dtype
    grad_x, grad_branch, normalized, parameters = ops.add_layer_norm_backward(
        standardized, rstd, branch, gamma, keep, weight, bias if norm_needed else None,
        grad_total if has_branch else None, grad_normalized, x_dtype,
        None if is_shared else branch_dtype,
    )  # fmt: skip
    if not has_branch or is_shared:
        grad_branch = grad_x if is_shared else None
    grad_weight, grad_bias, *grad_gamma = parameters.unbind()
    gradients = grad_x, grad_branch, *(grad_gamma or [None]), None, grad_weight, grad_bias
    return normalized, *gradients, None, None


class _AddLayerNorm(torch.autograd.Function):
    """PyTorch casts a gradient to the type of what it is of, here and below."""

    @staticmethod
    def forward(ctx: Any, *norm: Any) -> tuple[Tensor, Tensor]:
        total, normalized, kept = _norm_forward(ctx, *norm)
        ctx.save_for_backward(*kept)
        return total, normalized

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_normalized: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative()
        _, *gradients = _norm_backward(ctx, ctx.saved_tensors, grad_total, grad_normalized, False)
        return tuple(gradients)


class _AddNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Any, *norm: Any) -> tuple[Tensor, Tensor]:
        total, normalized, kept = _norm_forward(ctx, *norm)
        ctx.bias_dtype = None if bias is None else bias.dtype
        weight, bias = _cast(normalized.dtype, weight, bias)
        ctx.save_for_backward(weight, *kept)
        return total, F.linear(normalized, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_output: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative()
        weight, *kept = ctx.saved_tensors
        weight_needed, bias_needed, *_ = ctx.needs_input_grad
        rows = _rows(grad_output)
        normalized, *gradients = _norm_backward(ctx, kept, grad_total, rows @ weight, weight_needed)
        grad_weight = rows.T @ normalized if weight_needed else None
        grad_bias = rows.sum(0, dtype=ctx.bias_dtype) if bias_needed else None
        return grad_weight, grad_bias, *gradients


class _AddNormMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Any, *norm: Any
    ) -> tuple[Tensor, Tensor]:
        total, normalized, kept = _norm_forward(ctx, *norm)
        ctx.bias_dtype = None if bias2 is None else bias2.dtype
        weight1, weight2, bias2 = _cast(normalized.dtype, weight1, weight2, bias2)
        hidden, activated = ops.linear_gelu(normalized, weight1, bias1, True)
        ctx.save_for_backward(hidden, weight1, weight2, *kept)
        return total, F.linear(activated, weight2, bias2)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, grad_output: Tensor) -> tuple[Any, ...]:
        _refuse_second_derivative()
        hidden, weight1, weight2, *kept = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad_hidden, *others = _gelu_linear_backward(
            grad_output, weight2, hidden, ctx.bias_dtype, *needed[2:4]
        )
        normalized, *gradients = _norm_backward(
            ctx, kept, grad_total, grad_hidden @ weight1, needed[0]
        )
        grad_weight1 = grad_hidden.T @ normalized if needed[0] else None
        return grad_weight1, *others, *gradients


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Any,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.bias_dtype = None if bias2 is None else bias2.dtype
        x, weight1, weight2, bias2 = _cast(dtype, x, weight1, weight2, bias2)
        hidden, activated = ops.linear_gelu(x, weight1, bias1, True)
        ctx.save_for_backward(x, hidden, weight1, weight2)
        return F.linear(activated, weight2, bias2)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        x, hidden, weight1, weight2 = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad_hidden, *others = _gelu_linear_backward(
            grad_output, weight2, hidden, ctx.bias_dtype, *needed[3:5]
        )
        grad_x = (grad_hidden @ weight1).view(x.shape) if needed[0] else None
        return grad_x, grad_hidden.T @ _rows(x) if needed[1] else None, *others, None


def _gelu_linear_backward(
    grad_output: Tensor, weight: Tensor, hidden: Tensor, bias_dtype: torch.dtype | None,
    weight_needed: bool, bias_needed: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Through an MLP's second layer and the GELU in one pass.

    Returns:
        Gradients of `hidden`, as rows, of the first layer's bias, the second's weight and its bias.
    """
    grad_hidden, activated, grad_bias = ops.gelu_linear_backward(grad_output, weight, hidden)
    rows = _rows(grad_output)
    return (
        _rows(grad_hidden),
        grad_bias,
        rows.T @ _rows(activated) if weight_needed else None,
        rows.sum(0, dtype=bias_dtype) if bias_needed else None,
    )


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def _cast(dtype: torch.dtype, *tensors: Any) -> list[Any]:
    return [x if x is None else x.to(dtype) for x in tensors]
