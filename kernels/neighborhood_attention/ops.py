"""The operators registered with PyTorch: schemas, kernels, shape functions and gradients.

Two pairs do all the work: `attention` takes query, key and value as three tensors,
`attention_qkvpacked` takes the packed projection. They serve every number of spatial axes, hand the
work to a backend, and trust their arguments: the public functions have checked them.

Arguments come in one order: tensors (those of `Inputs`, or qkv and rpb), then settings; a backward
adds the results with their gradients, and for each tensor whether its gradient is needed. An
operator cannot return None: an empty tensor stands for a gradient that is not there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from neighborhood_attention.backends import Inputs, choose
from neighborhood_attention.dispatcher import is_idle, needs_gradient
from neighborhood_attention.geometry import Neighborhood

_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? rpb, "
    "Tensor? additional_keys, Tensor? additional_values"
)
_PACKED_INPUTS = "Tensor qkv, Tensor? rpb"
_SETTINGS = "int[] window, float scale, str? backend"  # window: Neighborhood.flat
_RESULTS = "Tensor output, Tensor lse, Tensor grad_output, Tensor? grad_lse, bool[] needed"


_library = torch.library.Library("neighborhood_attention", "DEF")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """A new operator without a gradient."""
    name = schema[: schema.index("(")]
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"neighborhood_attention::{name}", fake, lib=_library)
    return getattr(torch.ops.neighborhood_attention, name).default


def set_autograd_kernel(name: str, kernel: Callable[..., Any]) -> None:
    """Make it the operator's for the dispatcher's key Autograd; it takes the keys first."""
    _library.impl(name, kernel, "Autograd", with_keyset=True)


def refuse_second_derivative() -> None:
    """For the start of a backward: raise if a graph of it is being made."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "neighborhood attention has no second derivative: create_graph=True is not supported"
        )


def refuse_transforms() -> None:
    """Raise where torch.func or forward-mode differentiation would be wrong without a word."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            "neighborhood attention has no derivative in forward mode or under torch.func's "
            "transforms: use torch.autograd"
        )


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _forward(Inputs(*arguments[:6]), *arguments[6:])


def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    rows, device = query.shape[:-1], query.device
    output = torch.empty((*rows, value.shape[-1]), dtype=query.dtype, device=device)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return output, torch.empty(rows, dtype=lse_dtype, device=device)


def _attention_backward(*arguments: Any) -> list[Tensor | None]:
    gradients = _attention_buffers(*arguments)
    _backward(Inputs(*gradients), Inputs(*arguments[:6]), *arguments[6:-1])
    return gradients


def _attention_buffers(*arguments: Any) -> list[Any]:
    """For query, key and value always; for additional keys and values both or neither."""
    inputs, needed = arguments[:6], arguments[-1]
    additional = needed[4] or needed[5]
    wanted = (True, True, True, needed[3], additional, additional)
    return [empty(x) if w else None for x, w in zip(inputs, wanted, strict=True)]


def _packed(
    qkv: Tensor, rpb: Tensor | None, flat_window: Sequence[int], scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    window = Neighborhood.from_flat(tuple(flat_window))
    # The choice does not depend on the axes: the whole stands for its parts.
    module = choose(backend, Inputs(qkv, qkv, qkv, rpb), window)
    if hasattr(module, "forward_packed"):
        output, lse = module.forward_packed(qkv, rpb, window, scale)
    else:
        output, lse = module.forward(_unpack(qkv, rpb), window, scale)
    return output, lse


def _packed_fake(qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _attention_fake(*qkv.unbind(-3))


def _packed_backward(qkv: Tensor, rpb: Tensor | None, *arguments: Any) -> list[Tensor | None]:
    gradients = _packed_buffers(qkv, rpb, *arguments)
    _backward(_unpack(*gradients), _unpack(qkv, rpb), *arguments[:-1])
    return gradients


def _packed_buffers(qkv: Tensor, rpb: Any, *arguments: Any) -> list[Any]:
    _, rpb_needed = arguments[-1]
    return [empty(qkv), empty(rpb) if rpb_needed else None]


def _unpack(qkv: Tensor, rpb: Tensor | None) -> Inputs:
    query, key, value = qkv.unbind(-3)
    return Inputs(query, key, value, rpb)


def _forward(
    inputs: Inputs, flat_window: list[int], scale: float, backend: str | None
) -> tuple[Tensor, Tensor]:
    window = Neighborhood.from_flat(tuple(flat_window))
    output, lse = choose(backend, inputs, window).forward(inputs, window, scale)
    return output, lse


def _backward(
    gradients: Inputs, inputs: Inputs, flat_window: list[int], scale: float, backend: str | None,
    output: Tensor, lse: Tensor, grad_output: Tensor, grad_lse: Tensor | None,
) -> None:  # fmt: skip
    window = Neighborhood.from_flat(tuple(flat_window))
    choose(backend, inputs, window).backward(
        grad_output, grad_lse, inputs, output, lse, window, scale, gradients
    )


def empty(like: Tensor) -> Tensor:
    """Contiguous, whatever the strides of `like`."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _without_none(gradients: Callable[..., list[Any]]) -> Callable[..., tuple[Tensor, ...]]:
    def full(*arguments: Any) -> tuple[Tensor, ...]:
        first, *others = gradients(*arguments)
        return first, *(first.new_empty(0) if x is None else x for x in others)

    return full


def below_autograd(operator: Any, keys: Any, arguments: tuple[Any, ...]) -> Any:
    """Run an operator from its kernel for the key Autograd."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


def autograd_kernel(
    count: int, operator: Any, function: type[torch.autograd.Function]
) -> Callable[..., Any]:
    """The operator's kernel for the dispatcher's key Autograd.

    That of `torch.library.register_autograd` takes twice the time, and gives derivatives of zero in
    forward mode.

    Args:
        count: How many arguments are tensors, the first ones.
        operator: Below autograd.
        function: Takes keys and arguments, where a tensor requires a gradient.
    """

    def kernel(keys: Any, *arguments: Any) -> Any:
        refuse_transforms()
        if needs_gradient(arguments[:count]):
            return function.apply(keys, *arguments)
        return below_autograd(operator, keys, arguments)

    return kernel


def _register(
    name: str, tensors: str, forward: Any, forward_fake: Any, backward: Any, buffers: Any
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Register an operator and its backward, which returns what `buffers` does.

    Returns:
        The operator as the public functions call it, without the dispatcher where that is idle.
    """
    count = tensors.count(",") + 1
    gradients = ", ".join(["Tensor"] * count)
    operator = define(f"{name}({tensors}, {_SETTINGS}) -> (Tensor, Tensor)", forward, forward_fake)
    operator_backward = define(
        f"{name}_backward({tensors}, {_SETTINGS}, {_RESULTS}) -> ({gradients})",
        _without_none(backward),
        _without_none(buffers),
    )

    class NeighborhoodAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keys: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
            results: tuple[Tensor, Tensor] = (
                forward(*arguments) if keys is None else below_autograd(operator, keys, arguments)
            )
            ctx.set_materialize_grads(False)
            ctx.settings = arguments[count:]
            ctx.save_for_backward(*arguments[:count], *results)
            return results

        @staticmethod
        def backward(ctx: Any, grad_output: Any, grad_lse: Any) -> tuple[Tensor | None, ...]:
            refuse_second_derivative()
            *inputs, output, lse = ctx.saved_tensors
            needed = ctx.needs_input_grad[1 : 1 + count]
            if grad_output is None and grad_lse is None:
                return (None,) * len(ctx.needs_input_grad)
            if grad_output is None:
                grad_output = torch.zeros_like(output)
            results = output, lse, grad_output, grad_lse
            run = backward if is_idle((*inputs, *results)) else operator_backward
            gradients = run(*inputs, *ctx.settings, *results, needed)
            gradients = [x if n else None for x, n in zip(gradients, needed, strict=True)]
            return None, *gradients, *(None for _ in ctx.settings)

    set_autograd_kernel(name, autograd_kernel(count, operator, NeighborhoodAttention))

    def call(*arguments: Any) -> Any:
        if not is_idle(arguments[:count]):
            return operator(*arguments)
        if needs_gradient(arguments[:count]):
            return NeighborhoodAttention.apply(None, *arguments)
        return forward(*arguments)

    return call


attention = _register(
    "attention", _INPUTS,
    _attention, _attention_fake, _attention_backward, _attention_buffers,
)  # fmt: skip
attention_qkvpacked = _register(
    "attention_qkvpacked", _PACKED_INPUTS,
    _packed, _packed_fake, _packed_backward, _packed_buffers,
)  # fmt: skip
