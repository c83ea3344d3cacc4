"""The operators registered with PyTorch: schemas, shape functions and kernels, without gradients.

An operator cannot return None: an empty tensor stands for what is not there. Called from here, one
returns None.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("nat_models", "DEF")
Results = Any  # a tensor, or a tuple of tensors with None for what is not there


def _define(
    schema: str, empty: Callable[..., Results], kernel: Callable[..., Results]
) -> Callable[..., Any]:
    """A new operator.

    Args:
        schema: Its name, arguments and results.
        empty: What it returns, not filled in.
        kernel: What fills it in; takes the arguments of `empty`.

    Returns:
        The operator; the dispatcher's way to it is skipped where nothing looks in between.
    """
    name = schema[: schema.index("(")]

    def fake(first: Tensor, *others: Any) -> Any:
        return _without_none(first, empty(first, *others))

    def registered(first: Tensor, *others: Any) -> Any:
        return _without_none(first, run(first, *others))

    def run(first: Tensor, *others: Any) -> Results:
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device_of(first):  # where Triton launches
                return kernel(first, *others)
        return kernel(first, *others)

    _library.define(schema)
    _library.impl(name, registered, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nat_models::{name}", fake, lib=_library)
    operator = getattr(torch.ops.nat_models, name).default

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():  # it makes copies where it writes what is copied
            return operator(*[x.contiguous() if isinstance(x, Tensor) else x for x in arguments])
        if torch._C._len_torch_dispatch_stack() > 0:
            return operator(*arguments)
        return run(*arguments)

    return call


def _without_none(like: Tensor, results: Results) -> Any:
    if isinstance(results, Tensor):
        return results
    return tuple(like.new_empty(0) if x is None else x for x in results)


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, whatever the strides of `like`."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _add_layer_norm_empty(
    x: Tensor, branch: Tensor | None, gamma: Any, keep: Any, weight: Any, bias: Any, eps: float,
    dtype: torch.dtype, for_gradient: bool,
) -> Results:  # fmt: skip
    total = standardized = rstd = None
    if branch is not None:
        total = _empty(x, torch.promote_types(x.dtype, branch.dtype))
    if for_gradient:
        sum_dtype = x.dtype if total is None else total.dtype
        standardized = _empty(x, min(dtype, sum_dtype, key=lambda dtype: dtype.itemsize))
        rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return total, _empty(x, dtype), standardized, rstd


def _add_layer_norm(
    x: Tensor, branch: Any, gamma: Any, keep: Any, weight: Tensor, bias: Tensor, eps: float,
    *others: Any,
) -> Results:  # fmt: skip
    from nat_models.fused.kernels import layer_norm

    results = _add_layer_norm_empty(x, branch, gamma, keep, weight, bias, eps, *others)
    if x.numel() > 0:
        branch = _contiguous(branch)
        layer_norm.forward(x.contiguous(), branch, gamma, keep, weight, bias, eps, *results)
    return results


def _add_layer_norm_backward_empty(
    standardized: Tensor, rstd: Any, branch: Any, gamma: Tensor | None, keep: Any, weight: Tensor,
    bias: Tensor | None, grad_total: Any, grad_normalized: Tensor, dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
) -> Results:  # fmt: skip
    return (
        _empty(standardized, dtype),
        None if branch_dtype is None else _empty(standardized, branch_dtype),
        None if bias is None else _empty(grad_normalized, grad_normalized.dtype),
        weight.new_empty((2 if gamma is None else 3, *weight.shape), dtype=torch.float32),
    )


def _add_layer_norm_backward(
    standardized: Tensor, rstd: Tensor, branch: Any, gamma: Any, keep: Any, weight: Tensor,
    bias: Any, grad_total: Any, grad_normalized: Tensor, *dtypes: Any,
) -> Results:  # fmt: skip
    from nat_models.fused.kernels import layer_norm

    others = gamma, keep, weight, bias
    results = _add_layer_norm_backward_empty(
        standardized, rstd, branch, *others, grad_total, grad_normalized, *dtypes
    )
    if standardized.numel() == 0:
        results[-1].zero_()
    else:
        layer_norm.backward(
            standardized, rstd, _contiguous(branch), *others,
            _contiguous(grad_total), grad_normalized.contiguous(), *results,
        )  # fmt: skip
    return results


def _linear_gelu_empty(
    x: Tensor, weight: Tensor, bias: Tensor, with_hidden: bool
) -> tuple[Tensor | None, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape) if with_hidden else None, x.new_empty(shape)


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, with_hidden: bool) -> Results:
    from nat_models.fused.kernels import linear_gelu

    hidden, output = _linear_gelu_empty(x, weight, bias, with_hidden)
    if x.numel() > 0:
        linear_gelu.forward(_aligned(x), _aligned(weight), bias, hidden, output)
    return hidden, output


def _gelu_linear_backward_empty(grad_output: Tensor, weight: Tensor, hidden: Tensor) -> Results:
    grad_bias = hidden.new_empty(hidden.shape[-1], dtype=torch.float32)
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape), grad_bias


def _gelu_linear_backward(grad_output: Tensor, weight: Tensor, hidden: Tensor) -> Results:
    from nat_models.fused.kernels import linear_gelu

    buffers = torch.empty_like(hidden), torch.empty_like(hidden)
    if hidden.numel() == 0:
        return *buffers, hidden.new_zeros(hidden.shape[-1], dtype=torch.float32)
    grad_bias = linear_gelu.backward(_aligned(grad_output), _aligned(weight), hidden, *buffers)
    return *buffers, grad_bias


def _small_linear_empty(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _small_linear(
    x: Tensor, weight: Tensor, bias: Any, norm_weight: Any, norm_bias: Any, eps: float,
    has_gelu: bool, gamma: Any, residual: Any,
) -> Tensor:  # fmt: skip
    from nat_models.fused.kernels import small_linear

    output = _small_linear_empty(x, weight)
    if x.numel() > 0:
        norm = norm_weight, norm_bias, eps
        addition = gamma, _contiguous(residual)
        small_linear.forward(
            x.contiguous(), weight.contiguous(), bias, *norm, has_gelu, *addition, output
        )
    return output


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """Contiguous, at a multiple of 16 bytes, as descriptors of blocks demand."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


add_layer_norm = _define(
    "add_layer_norm(Tensor x, Tensor? branch, Tensor? gamma, Tensor? keep, Tensor weight, "
    "Tensor bias, float eps, ScalarType dtype, bool for_gradient) "
    "-> (Tensor total, Tensor normalized, Tensor standardized, Tensor rstd)",
    _add_layer_norm_empty,
    _add_layer_norm,
)
add_layer_norm_backward = _define(
    "add_layer_norm_backward(Tensor standardized, Tensor rstd, Tensor? branch, Tensor? gamma, "
    "Tensor? keep, Tensor weight, Tensor? bias, Tensor? grad_total, Tensor grad_normalized, "
    "ScalarType dtype, ScalarType? branch_dtype) "
    "-> (Tensor grad_x, Tensor grad_branch, Tensor normalized, Tensor grad_parameters)",
    _add_layer_norm_backward_empty,
    _add_layer_norm_backward,
)
linear_gelu = _define(
    "linear_gelu(Tensor x, Tensor weight, Tensor bias, bool with_hidden) "
    "-> (Tensor hidden, Tensor output)",
    _linear_gelu_empty,
    _linear_gelu,
)
gelu_linear_backward = _define(
    "gelu_linear_backward(Tensor grad_output, Tensor weight, Tensor hidden) "
    "-> (Tensor grad_hidden, Tensor activated, Tensor grad_bias)",
    _gelu_linear_backward_empty,
    _gelu_linear_backward,
)
small_linear = _define(
    "small_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, "
    "float eps, bool has_gelu, Tensor? gamma, Tensor? residual) -> Tensor",
    _small_linear_empty,
    _small_linear,
)
