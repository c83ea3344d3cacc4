"""The fused operations as differentiable functions; `use` tells what they take."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nat_models.fused import ops
from nat_models.fused.use import autocast_dtype


class Branch(NamedTuple):
    """What is still to be added to a map [B, ..., C]: gamma * keep * values."""

    values: Tensor  # [B, ..., C]
    gamma: Tensor | None = None  # layer scale (arXiv:2103.17239), [C]
    keep: Tensor | None = None  # factors of stochastic depth (arXiv:1603.09382), [B]; no gradient


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm (arXiv:1607.06450) over the last axis, `torch.nn.functional.layer_norm`.

    Args:
        x: [..., C].
        weight: Scale, [C].
        bias: Shift, [C].
        eps: Added to the variance.
    """
    dtype = x.dtype if autocast_dtype(x) is None else torch.float32
    return _add_layer_norm(x, None, None, None, weight, bias, eps, dtype)[1]


def add_layer_norm(
    x: Tensor, branch: Branch | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The addition of a residual branch, and the LayerNorm of the sum, which the next one takes.

    Under autocast the norm is in autocast's dtype instead of fp32: the linear layer that a branch
    begins with would cast it to that.

    Args:
        x: [B, ..., C].
        branch: What to add; None for nothing.
        weight: Scale of the norm, [C].
        bias: Shift of the norm, [C].
        eps: Added to the variance.

    Returns:
        The sum, in the dtype of its terms, and its norm.
    """
    dtype = autocast_dtype(x)
    if branch is None:
        return x, _add_layer_norm(x, None, None, None, weight, bias, eps, dtype or x.dtype)[1]
    dtype = dtype or torch.promote_types(x.dtype, branch.values.dtype)
    return _add_layer_norm(x, *branch, weight, bias, eps, dtype)


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
    arguments: tuple[Any, ...] = x, weight1, bias1, weight2, bias2
    cast = autocast_dtype(x)
    if cast is not None:
        arguments = tuple(t if t is None else t.to(cast) for t in arguments)
    if _needs_gradient(*arguments):
        return _Mlp.apply(*arguments)  # type: ignore[no-any-return]
    return F.linear(ops.linear_gelu(*arguments[:3], False)[1], *arguments[3:])


def _add_layer_norm(*arguments: Any) -> tuple[Tensor, Tensor]:
    if _needs_gradient(*arguments[:6]):
        return _AddLayerNorm.apply(*arguments)  # type: ignore[no-any-return]
    return ops.add_layer_norm(*arguments)  # type: ignore[no-any-return]


def _needs_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "a fused operation has no second derivative: create_graph=True is not supported"
        )


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Any, gamma: Any, keep: Any, weight: Tensor, bias: Tensor,
        eps: float, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        total, normalized = ops.add_layer_norm(x, branch, gamma, keep, weight, bias, eps, dtype)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        ctx.dtypes = x.dtype, None if branch is None else branch.dtype, weight.dtype, bias.dtype
        ctx.save_for_backward(
            x if branch is None else total, None if gamma is None else branch, gamma, keep, weight
        )
        return total, normalized

    @staticmethod
    def backward(ctx: Any, grad_total: Any, grad_normalized: Any) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        total, branch, gamma, keep, weight = ctx.saved_tensors
        x_dtype, branch_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if grad_normalized is None:  # nothing has used the norm
            grad_normalized = torch.zeros_like(total)
        # Where the branch is added as it is, one gradient is that of both.
        is_shared = gamma is None and keep is None and branch_dtype == x_dtype
        grad_x, grad_branch, parameters = ops.add_layer_norm_backward(
            total, branch, gamma, keep, weight, ctx.eps,
            None if branch_dtype is None else grad_total, grad_normalized, x_dtype,
            None if is_shared else branch_dtype,
        )  # fmt: skip
        return (
            grad_x,
            grad_x if is_shared else grad_branch if branch_dtype is not None else None,
            parameters[2].to(gamma.dtype) if gamma is not None else None,
            None,
            parameters[0].to(weight_dtype),
            parameters[1].to(bias_dtype),
            None,
            None,
        )


class _Mlp(torch.autograd.Function):
    """The backward goes through the second layer and the GELU in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None
    ) -> Tensor:
        hidden, activated = ops.linear_gelu(x, weight1, bias1, True)
        ctx.save_for_backward(x, weight1, hidden, weight2)
        ctx.bias_dtype = bias1.dtype
        return F.linear(activated, weight2, bias2)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        x, weight1, hidden, weight2 = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad_hidden, activated, grad_bias1 = ops.gelu_linear_backward(grad_output, weight2, hidden)
        _, grad_weight2 = _linear_backward(grad_output, activated, weight2, False, needed[3])
        gradients = _linear_backward(grad_hidden, x, weight1, *needed[:2])
        grad_bias2 = grad_output.flatten(0, -2).sum(0) if needed[4] else None
        return *gradients, grad_bias1.to(ctx.bias_dtype), grad_weight2, grad_bias2


def _linear_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, x_needed: bool, weight_needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a linear layer's input and weight."""
    rows = grad_output.flatten(0, -2)
    return (
        (rows @ weight).view(x.shape) if x_needed else None,
        rows.T @ x.flatten(0, -2) if weight_needed else None,
    )
