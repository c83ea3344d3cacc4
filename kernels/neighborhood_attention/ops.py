"""The operators registered with PyTorch: schemas, kernels, shape functions and gradients.

Two pairs do all the work: `attention` takes query, key and value as three tensors,
`attention_qkvpacked` takes the packed projection. They serve every number of spatial axes, hand the
work to a backend, and trust their arguments: the public functions have checked them.
"""

from typing import Any

import torch
from torch import Tensor

from neighborhood_attention.backends import choose
from neighborhood_attention.geometry import Neighborhood

_SETTINGS = (
    "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, float scale, str? backend"
)


def _define(name: str, schema: str) -> str:
    qualified = f"neighborhood_attention::{name}"
    torch.library.define(qualified, schema)
    return qualified


_ATTENTION = _define(
    "attention",
    f"(Tensor query, Tensor key, Tensor value, Tensor? rpb, {_SETTINGS}) -> (Tensor, Tensor)",
)
_ATTENTION_BACKWARD = _define(
    "attention_backward",
    "(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? rpb, "
    f"Tensor output, Tensor lse, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
_PACKED = _define(
    "attention_qkvpacked", f"(Tensor qkv, Tensor? rpb, {_SETTINGS}) -> (Tensor, Tensor)"
)
_PACKED_BACKWARD = _define(
    "attention_qkvpacked_backward",
    "(Tensor grad_output, Tensor? grad_lse, Tensor qkv, Tensor? rpb, "
    f"Tensor output, Tensor lse, {_SETTINGS}) -> (Tensor, Tensor)",
)


def _unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.unbind(-3)
    return query, key, value


def _empty(like: Tensor) -> Tensor:
    """Contiguous, whatever the strides of `like`."""
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)


def _empty_bias(rpb: Tensor | None, query: Tensor) -> Tensor:
    """An operator cannot return None: an empty tensor stands for the gradient of no bias."""
    return query.new_empty(0) if rpb is None else _empty(rpb)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    *axes, scale, backend = settings
    window = Neighborhood(*map(tuple, axes))
    output, lse = choose(backend, query, rpb, window).forward(query, key, value, rpb, window, scale)
    return output, lse


def _attention_backward(
    grad_output: Tensor, grad_lse: Tensor | None,
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None,
    output: Tensor, lse: Tensor, *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    grads = _empty(query), _empty(key), _empty(value)
    grad_rpb = _fill_gradients(
        grads, grad_output, grad_lse, query, key, value, rpb, output, lse, *settings
    )
    return *grads, grad_rpb


def _attention_qkvpacked(qkv: Tensor, rpb: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    return _attention(*_unpack(qkv), rpb, *settings)


def _attention_qkvpacked_backward(
    grad_output: Tensor, grad_lse: Tensor | None,
    qkv: Tensor, rpb: Tensor | None,
    output: Tensor, lse: Tensor, *settings: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_qkv = _empty(qkv)
    grad_rpb = _fill_gradients(
        _unpack(grad_qkv), grad_output, grad_lse, *_unpack(qkv), rpb, output, lse, *settings
    )
    return grad_qkv, grad_rpb


def _fill_gradients(
    grads: tuple[Tensor, Tensor, Tensor], grad_output: Tensor, grad_lse: Tensor | None,
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None,
    output: Tensor, lse: Tensor, *settings: Any,
) -> Tensor:  # fmt: skip
    """Fills the gradients of query, key and value; returns the bias's."""
    *axes, scale, backend = settings
    window = Neighborhood(*map(tuple, axes))
    grad_rpb: Tensor | None = choose(backend, query, rpb, window).backward(
        grad_output, grad_lse, query, key, value, rpb, output, lse, window, scale, *grads
    )
    return _empty_bias(rpb, query) if grad_rpb is None else grad_rpb


@torch.library.register_fake(_ATTENTION)
def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _empty(query), torch.empty(query.shape[:-1], dtype=lse_dtype, device=query.device)


@torch.library.register_fake(_PACKED)
def _packed_fake(qkv: Tensor, rpb: Tensor | None, *_: Any) -> Any:
    return _attention_fake(*_unpack(qkv), rpb)


@torch.library.register_fake(_ATTENTION_BACKWARD)
def _attention_backward_fake(
    grad_output: Tensor, grad_lse: Tensor | None,
    query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty(query), _empty(key), _empty(value), _empty_bias(rpb, query)


@torch.library.register_fake(_PACKED_BACKWARD)
def _packed_backward_fake(
    grad_output: Tensor, grad_lse: Tensor | None, qkv: Tensor, rpb: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    return _empty(qkv), _empty_bias(rpb, qkv)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    split = len(inputs) - _SETTINGS.count(",") - 1
    ctx.set_materialize_grads(False)
    ctx.settings = inputs[split:]
    ctx.save_for_backward(*inputs[:split], *output)


def _gradients(
    operator: Any, ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None
) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "neighborhood attention has no second derivative: create_graph=True is not supported"
        )
    *inputs, output, lse = ctx.saved_tensors
    if grad_output is None and grad_lse is None:
        return (None,) * (len(inputs) + len(ctx.settings))
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    *grads, grad_rpb = operator(grad_output, grad_lse, *inputs, output, lse, *ctx.settings)
    return *grads, None if inputs[-1] is None else grad_rpb, *(None for _ in ctx.settings)


def _attention_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    return _gradients(torch.ops.neighborhood_attention.attention_backward, ctx, *grads)


def _packed_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    return _gradients(torch.ops.neighborhood_attention.attention_qkvpacked_backward, ctx, *grads)


for _name, _kernel in (
    (_ATTENTION, _attention),
    (_ATTENTION_BACKWARD, _attention_backward),
    (_PACKED, _attention_qkvpacked),
    (_PACKED_BACKWARD, _attention_qkvpacked_backward),
):
    torch.library.impl(_name, "CompositeExplicitAutograd", _kernel)

torch.library.register_autograd(_ATTENTION, _attention_gradients, setup_context=_save)
torch.library.register_autograd(_PACKED, _packed_gradients, setup_context=_save)
