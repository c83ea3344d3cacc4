"""The fused operations as differentiable functions, and what they do where they are not used."""

from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from nat_models.fused import ops

# Where each is used: nowhere before it has been measured to be the faster there. Inductor,
# PyTorch's compiler, fuses additions and norms by itself.
USED = {
    "add_layer_norm": {"eager": False, "compiled": False},
    "linear_gelu": {"eager": False, "compiled": False},
    "mlp": {"eager": False, "compiled": False},
}
_HALF = torch.bfloat16, torch.float16
_DTYPES = *_HALF, torch.float32
_MAX_CHANNELS = 4096


class Branch(NamedTuple):
    """What is still to be added to a map [B, ..., C]: gamma * keep * values."""

    values: Tensor  # [B, ..., C]
    gamma: Tensor | None = None  # layer scale (arXiv:2103.17239), [C]
    keep: Tensor | None = None  # factors of stochastic depth (arXiv:1603.09382), [B]; no gradient


def is_used(operation: str, x: Tensor) -> bool:
    """Whether an operation of `USED` runs fused on `x`: on a GPU, where nothing looks inside it."""
    mode = "compiled" if torch.compiler.is_compiling() else "eager"
    return (
        USED[operation][mode]
        and isinstance(x, Tensor)  # not a symbol of torch.fx
        and _runs_on(operation, x.device)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm (arXiv:1607.06450) over the last axis, `torch.nn.functional.layer_norm`.

    Args:
        x: [..., C].
        weight: Scale, [C].
        bias: Shift, [C].
        eps: Added to the variance.
    """
    if not _norm_is_fused(x, weight, bias):
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    dtype = x.dtype if _autocast_dtype(x) is None else torch.float32
    return _add_layer_norm(x, None, weight, bias, eps, dtype)[1]


def add_layer_norm(
    x: Tensor, branch: Branch | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The addition of a residual branch, and the LayerNorm of the sum, which the next one takes.

    Under autocast the norm may be in autocast's dtype instead of fp32: the linear layer that a
    branch begins with would cast it to that.

    Args:
        x: [B, ..., C].
        branch: What to add; None for nothing.
        weight: Scale of the norm, [C].
        bias: Shift of the norm, [C].
        eps: Added to the variance.

    Returns:
        The sum, in the dtype of its terms, and its norm.
    """
    if not _norm_is_fused(x, weight, bias, *branch or ()):
        x = add(x, branch)
        return x, F.layer_norm(x, weight.shape, weight, bias, eps)
    dtype = _autocast_dtype(x)
    if dtype is None:
        dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.values.dtype)
    total, normalized = _add_layer_norm(x, branch, weight, bias, eps, dtype)
    return x if branch is None else total, normalized


def add(x: Tensor, branch: Branch | None) -> Tensor:
    """The sum of `add_layer_norm` alone."""
    if branch is None:
        return x
    values, gamma, keep = branch
    if gamma is not None:
        values = values * gamma
    if keep is not None:
        values = values * keep.view(-1, *[1] * (values.dim() - 1))
    return x + values


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer and the GELU (arXiv:1606.08415) of its result: [..., K] to [..., N].

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N].
    """
    if not _product_is_fused("linear_gelu", x, weight):
        return F.gelu(F.linear(x, weight, bias))
    x, weight, bias = _autocast(x, weight, bias)
    if _needs_gradient(x, weight, bias):
        return _LinearGelu.apply(x, weight, bias)  # type: ignore[no-any-return]
    return ops.linear_gelu(x, weight, bias, False)[1]  # type: ignore[no-any-return]


def mlp(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None) -> Tensor:
    """`linear_gelu` and a second linear layer, whose backward takes the GELU's in the same pass.

    Args:
        x: [..., K].
        weight1: [N, K].
        bias1: [N].
        weight2: [M, N].
        bias2: [M].
    """
    tensors = x, weight1, bias1, weight2, bias2
    if not _needs_gradient(*tensors) or not _product_is_fused("mlp", x, weight1, weight2):
        return F.linear(linear_gelu(x, weight1, bias1), weight2, bias2)
    return _Mlp.apply(*_autocast(*tensors))  # type: ignore[no-any-return]


def _product_is_fused(operation: str, x: Tensor, *weights: Tensor) -> bool:
    cast = _autocast_dtype(x)
    dtypes = {cast or t.dtype for t in (x, *weights)}
    return (
        is_used(operation, x)
        and len(dtypes) == 1
        and dtypes <= {*_HALF}
        and all(size % 16 == 0 for weight in weights for size in weight.shape)
    )


def _autocast(*tensors: Any) -> tuple[Any, ...]:
    cast = _autocast_dtype(tensors[0])
    return tensors if cast is None else tuple(t if t is None else t.to(cast) for t in tensors)


def _norm_is_fused(x: Tensor, *others: Tensor | None) -> bool:
    return (
        is_used("add_layer_norm", x)
        and x.shape[-1] <= _MAX_CHANNELS
        and all(t is None or t.dtype in _DTYPES for t in (x, *others))
    )


def _add_layer_norm(
    x: Tensor, branch: Branch | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    arguments = x, *(branch or (None, None, None)), weight, bias, eps, dtype
    if _needs_gradient(*arguments[:6]):
        return _AddLayerNorm.apply(*arguments)  # type: ignore[no-any-return]
    return ops.add_layer_norm(*arguments)  # type: ignore[no-any-return]


def _needs_gradient(*tensors: Any) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _runs_on(operation: str, device: torch.device) -> bool:
    return _has_kernels(operation, device)


@cache
def _has_kernels(operation: str, device: torch.device) -> bool:
    """Whether there are kernels for a device: products need the shared memory of H100 or B200."""
    if device.type != "cuda" or torch.version.hip is not None or find_spec("triton") is None:
        return False
    major, _ = torch.cuda.get_device_capability(device)
    return major >= 8 if operation == "add_layer_norm" else major in (9, 10)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


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


class _LinearGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        hidden, output = ops.linear_gelu(x, weight, bias, True)
        ctx.save_for_backward(x, weight, hidden)
        ctx.bias_dtype = bias.dtype
        return output  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        x, weight, hidden = ctx.saved_tensors
        grad_hidden, grad_bias = ops.gelu_backward(hidden, grad_output)
        gradients = _linear_backward(grad_hidden, x, weight, *ctx.needs_input_grad[:2])
        return *gradients, grad_bias.to(ctx.bias_dtype)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None
    ) -> Tensor:
        hidden, activated = ops.linear_gelu(x, weight1, bias1, True)
        ctx.save_for_backward(x, weight1, hidden, activated, weight2)
        ctx.bias_dtype = bias1.dtype
        return F.linear(activated, weight2, bias2)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second_derivative()
        x, weight1, hidden, activated, weight2 = ctx.saved_tensors
        needed = ctx.needs_input_grad
        _, grad_weight2 = _linear_backward(grad_output, activated, weight2, False, needed[3])
        grad_hidden, grad_bias1 = ops.gelu_linear_backward(grad_output, weight2, hidden)
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
