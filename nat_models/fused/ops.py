"""The operators registered with PyTorch: schemas, shape functions and kernels, without gradients.

An operator cannot return None: an empty tensor stands for what is not there.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("nat_models", "DEF")


def _define(schema: str, fake: Callable[..., Any], kernel: Callable[..., Any]) -> Any:
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nat_models::{name}", fake, lib=_library)
    return getattr(torch.ops.nat_models, name).default


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current GPU, which need not be that of the tensors."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device_of(tensor)


def _add_layer_norm_fake(
    x: Tensor, branch: Tensor | None, gamma: Any, keep: Any, weight: Any, bias: Any, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if branch is None:
        total = x.new_empty(0)
    else:
        total = torch.empty(x.shape, dtype=_promoted(x, branch), device=x.device)
    return total, torch.empty(x.shape, dtype=dtype, device=x.device)


def _add_layer_norm(
    x: Tensor, branch: Any, gamma: Any, keep: Any, weight: Tensor, bias: Tensor, eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from nat_models.fused.kernels import layer_norm

    results = _add_layer_norm_fake(x, branch, gamma, keep, weight, bias, eps, dtype)
    if x.numel() > 0:
        with _on_device_of(x):
            layer_norm.forward(
                x.contiguous(), _contiguous(branch), gamma, keep, weight, bias, eps, *results
            )
    return results


def _add_layer_norm_backward_fake(
    total: Tensor, branch: Tensor | None, gamma: Tensor | None, keep: Any, weight: Tensor,
    eps: float, grad_total: Any, grad_normalized: Tensor, dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty(total.shape, dtype=dtype, device=total.device),
        total.new_empty(0)
        if branch_dtype is None
        else torch.empty(total.shape, dtype=branch_dtype, device=total.device),
        weight.new_empty((2 if gamma is None else 3, *weight.shape), dtype=torch.float32),
    )


def _add_layer_norm_backward(
    total: Tensor, branch: Any, gamma: Tensor | None, keep: Any, weight: Tensor, eps: float,
    grad_total: Any, grad_normalized: Tensor, dtype: torch.dtype, branch_dtype: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from nat_models.fused.kernels import layer_norm

    grad_x = torch.empty(total.shape, dtype=dtype, device=total.device)
    grad_branch = None
    if branch_dtype is not None:
        grad_branch = torch.empty(total.shape, dtype=branch_dtype, device=total.device)
    if total.numel() == 0:
        parameters = weight.new_zeros((2 if gamma is None else 3, *weight.shape)).float()
    else:
        with _on_device_of(total):
            parameters = layer_norm.backward(
                total.contiguous(), _contiguous(branch), gamma, keep, weight, eps,
                _contiguous(grad_total), grad_normalized.contiguous(), grad_x, grad_branch,
            )  # fmt: skip
    return grad_x, total.new_empty(0) if grad_branch is None else grad_branch, parameters


def _linear_gelu_fake(
    x: Tensor, weight: Tensor, bias: Tensor, with_hidden: bool
) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    hidden = x.new_empty(shape) if with_hidden else x.new_empty(0)
    return hidden, x.new_empty(shape)


def _linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, with_hidden: bool
) -> tuple[Tensor, Tensor]:
    from nat_models.fused.kernels import linear_gelu

    hidden, output = _linear_gelu_fake(x, weight, bias, with_hidden)
    if x.numel() > 0:
        with _on_device_of(x):
            linear_gelu.forward(
                x.contiguous(), weight.contiguous(), bias, hidden if with_hidden else None, output
            )
    return hidden, output


def _gelu_backward_fake(hidden: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape[-1], dtype=torch.float32)


def _gelu_backward(hidden: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    from nat_models.fused.kernels import linear_gelu

    grad_hidden = torch.empty_like(hidden)
    if hidden.numel() == 0:
        return grad_hidden, hidden.new_zeros(hidden.shape[-1], dtype=torch.float32)
    with _on_device_of(hidden):
        grad_bias = linear_gelu.backward(hidden, grad_output.contiguous(), grad_hidden)
    return grad_hidden, grad_bias


def _gelu_linear_backward_fake(
    grad_output: Tensor, weight: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    return _gelu_backward_fake(hidden, grad_output)


def _gelu_linear_backward(
    grad_output: Tensor, weight: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    from nat_models.fused.kernels import linear_gelu

    grad_hidden = torch.empty_like(hidden)
    if hidden.numel() == 0:
        return grad_hidden, hidden.new_zeros(hidden.shape[-1], dtype=torch.float32)
    with _on_device_of(hidden):
        grad_bias = linear_gelu.backward_of_two(
            grad_output.contiguous(), weight.contiguous(), hidden, grad_hidden
        )
    return grad_hidden, grad_bias


def _promoted(x: Tensor, branch: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, branch.dtype)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


add_layer_norm = _define(
    "add_layer_norm(Tensor x, Tensor? branch, Tensor? gamma, Tensor? keep, Tensor weight, "
    "Tensor bias, float eps, ScalarType dtype) -> (Tensor total, Tensor normalized)",
    _add_layer_norm_fake,
    _add_layer_norm,
)
add_layer_norm_backward = _define(
    "add_layer_norm_backward(Tensor total, Tensor? branch, Tensor? gamma, Tensor? keep, "
    "Tensor weight, float eps, Tensor? grad_total, Tensor grad_normalized, ScalarType dtype, "
    "ScalarType? branch_dtype) -> (Tensor, Tensor, Tensor)",
    _add_layer_norm_backward_fake,
    _add_layer_norm_backward,
)
linear_gelu = _define(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias, bool with_hidden) "
    "-> (Tensor hidden, Tensor output)",
    _linear_gelu_fake,
    _linear_gelu,
)
gelu_backward = _define(
    "gelu_backward(Tensor hidden, Tensor grad_output) -> (Tensor grad_hidden, Tensor grad_bias)",
    _gelu_backward_fake,
    _gelu_backward,
)
gelu_linear_backward = _define(
    "gelu_linear_backward(Tensor grad_output, Tensor weight, Tensor hidden) "
    "-> (Tensor grad_hidden, Tensor grad_bias)",
    _gelu_linear_backward_fake,
    _gelu_linear_backward,
)
