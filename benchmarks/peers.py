"""What computes neighborhood attention, or what it is compared with, behind one interface.

A provider prepares a problem: it gets the packed projection, arranges tensors as suits it best, and
offers the calls to measure. Arranging is not measured: of a peer only what it cannot do without.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from math import prod
from typing import Any, Protocol

import torch
from measuring import graph_time
from problem import OPERATORS, Exact, Problem, Tensors
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from neighborhood_attention import portable

GENERATIONS = "naive", "gemm", "fused"  # our backends on Triton
# Nothing larger is tried: elements of a mask or of its gradient, bytes of gathered windows.
MASK_ELEMENTS = 2**32
GATHERED_BYTES = 2**34
# FlexAttention's blocks have 128 tokens.
FLEX_TILES = {1: (128,), 2: (8, 16), 3: (4, 4, 8)}
# For "forward" and "backward" the time in "us", its "range", "way" and "errors"; "failures".
Measured = dict[str, Any]


class Call(Protocol):
    """A way to compute a problem. Tensors are in a layout of its own."""

    label: str

    def arrange(self, tensor: Tensor) -> Tensor:
        """From the standard layout [B, *map, heads, D]."""

    def restore(self, tensor: Tensor) -> Tensor:
        """To the standard layout."""

    def forward(self) -> Tensor:
        """The output."""

    def backward(self, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of query, key, value, and of the bias where there is one."""


class Provider(Protocol):
    """One row of a table."""

    name: str
    compiler: str | None  # "triton", or "torch" for PyTorch's
    is_dense: bool  # another function: attention to the whole map

    def refuses(self, problem: Problem, bias: bool, backward: bool) -> str | None:
        """Why it cannot compute the problem."""

    def prepare(self, problem: Problem, tensors: Tensors) -> Iterator[Call]:
        """Its ways to compute a problem, the fastest of which counts."""


def results(call: Call, grad: Tensor | None) -> dict[str, Tensor]:
    """Of both passes, or of the forward; in standard layout."""
    found = {"output": call.restore(call.forward())}
    if grad is not None:
        *grads, rpb = (*call.backward(call.arrange(grad)), None)[:4]
        names = "grad_query", "grad_key", "grad_value"
        found |= {n: call.restore(g) for n, g in zip(names, grads, strict=True)}
        found |= {} if rpb is None else {"grad_rpb": rpb}
    return found


def measure(
    provider: Provider, problem: Problem, tensors: Tensors, exact: Exact, seconds: float = 0.1
) -> Measured:
    """Check each way, time it for some seconds, and keep the fastest of each pass.

    A way that takes twice as long as another is not called again. One with a wrong result, or
    one that raises, is named under `failures`.

    Raises:
        RuntimeError: The GPU can do no more.
    """
    found: Measured = {"failures": {}}
    passes = [
        name
        for name in ("forward", "backward")
        if not provider.refuses(problem, tensors.rpb is not None, name == "backward")
    ]
    for call in provider.prepare(problem, tensors) if passes else ():
        for name in passes:
            try:
                limit = 2 * _microseconds(found.get(name))
                entry = _checked_time(call, name, tensors, exact, seconds, limit)
                found[name] = min(entry, found.get(name), key=_microseconds)
            except Exception as error:
                if tensors.qkv.is_cuda:
                    torch.cuda.synchronize()  # raises where an error has broken everything
                reason = " ".join(str(error).split())[:200]
                found["failures"][f"{call.label} {name}"] = f"{type(error).__name__}: {reason}"
    return found


def _checked_time(
    call: Call, name: str, tensors: Tensors, exact: Exact, seconds: float, limit: float
) -> dict[str, Any]:
    errors = exact.errors(results(call, exact.grad if name == "backward" else None))
    if not all(error <= exact.tolerance for error in errors.values()):
        raise ArithmeticError(f"wrong results, relative errors {errors}")
    if name == "forward":
        timing = graph_time(call.forward, seconds, limit)
    else:
        grad = call.arrange(tensors.grad)
        timing = graph_time(lambda: call.backward(grad), seconds, limit)
    return {"us": timing.median, "range": timing[1:], "way": call.label, "errors": errors}


def _microseconds(entry: dict[str, Any] | None) -> float:
    return float("inf") if entry is None else entry["us"]


class Operator:
    """One of our backends, on the packed projection."""

    is_dense = False

    def __init__(self, name: str) -> None:
        self.name = name
        self.compiler = "triton" if name in GENERATIONS else None

    def refuses(self, problem: Problem, bias: bool, backward: bool) -> str | None:
        """Nothing."""

    def prepare(self, problem: Problem, tensors: Tensors) -> Iterator[Call]:
        """One way."""
        yield _OperatorCall(self.name, problem, tensors)


class _OperatorCall:
    def __init__(self, label: str, problem: Problem, tensors: Tensors) -> None:
        self.label = label
        self._arguments = tensors.qkv, tensors.rpb, *problem.settings, label
        self._results: tuple[Tensor, Tensor] | None = None

    def arrange(self, tensor: Tensor) -> Tensor:
        return tensor

    restore = arrange

    def forward(self) -> Tensor:
        return OPERATORS.attention_qkvpacked(*self._arguments)[0]

    def backward(self, grad: Tensor) -> tuple[Tensor, ...]:
        if self._results is None:
            self._results = OPERATORS.attention_qkvpacked(*self._arguments)
        has_bias = self._arguments[1] is not None
        grad_qkv, grad_rpb = OPERATORS.attention_qkvpacked_backward(
            *self._arguments, *self._results, grad, None, [True, has_bias]
        )
        return *grad_qkv.unbind(-3), *[grad_rpb] * has_bias


class Autograd:
    """A function of PyTorch's; `arrange` and `restore` change layouts."""

    def __init__(
        self,
        label: str,
        function: Callable[..., Tensor],
        tensors: Sequence[Tensor | None],
        arrange: Callable[[Tensor], Tensor],
        restore: Callable[[Tensor], Tensor],
        inference: Callable[..., Tensor] | None = None,
    ) -> None:
        self.label, self.arrange, self.restore = label, arrange, restore
        self._leaves = [x.detach().requires_grad_() for x in tensors if x is not None]
        self._function, self._inference = function, inference or function
        self._output: Tensor | None = None

    def forward(self) -> Tensor:
        """By `inference`, if there is one."""
        return self._inference(*self._leaves)

    def backward(self, grad: Tensor) -> tuple[Tensor, ...]:
        """By autograd, of a forward made at the first call."""
        if self._output is None:
            self._output = self._function(*self._leaves)
        return torch.autograd.grad(self._output, self._leaves, grad, retain_graph=True)


def compiled(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """By PyTorch's compiler, on a GPU."""
    # What a graph saves may be needed again: a backward is measured many times.
    functorch_config.donated_buffer = False
    return torch.compile(function, dynamic=False) if device.type == "cuda" else function


def heads_first(tensor: Tensor) -> Tensor:
    """[B, *map, heads, D] to [B, heads, tokens, D], contiguous."""
    return tensor.flatten(1, -3).transpose(1, 2).contiguous()


def heads_last(problem: Problem, tensor: Tensor) -> Tensor:
    """The way back."""
    return tensor.transpose(1, 2).reshape(problem.batch, *problem.map, *tensor.shape[1::2])


class DenseAttention:
    """PyTorch's fused attention over the whole map, by each of its kernels.

    Neighborhoods and bias are in a mask [heads, tokens, tokens], made before. `name="dense"`: no
    mask, which is another function, self-attention.
    """

    compiler = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_dense = name == "dense"

    def refuses(self, problem: Problem, bias: bool, backward: bool) -> str | None:
        """Masks, or their gradients, that are too large."""
        if self.is_dense:
            return "adds no bias" if bias else None
        copies = problem.batch if bias and backward else 1
        if copies * problem.heads * problem.tokens**2 > MASK_ELEMENTS:
            return "a mask of all pairs of tokens is too large"
        return None

    def prepare(self, problem: Problem, tensors: Tensors) -> Iterator[Call]:
        """A way for each kernel of PyTorch's."""
        inputs = [heads_first(x) for x in tensors.qkv.unbind(-3)]
        is_whole = self.is_dense or problem.kernel_size == problem.map
        mask = partial(_mask, problem, inputs[0])
        with torch.no_grad():
            made = None if is_whole and tensors.rpb is None else mask(tensors.rpb)
        for kernel in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):

            def attention(q, k, v, rpb=None, made=None, kernel=kernel):
                bias = made if rpb is None else mask(rpb)
                with sdpa_kernel(getattr(SDPBackend, kernel)), warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # an error tells as well that it cannot
                    return scaled_dot_product_attention(q, k, v, attn_mask=bias)

            yield Autograd(
                kernel.split("_")[0].lower(),
                partial(attention, made=made),
                [*inputs, tensors.rpb],
                heads_first,
                partial(heads_last, problem),
                lambda q, k, v, *_, attention=attention: attention(q, k, v, made=made),
            )


def _mask(problem: Problem, like: Tensor, rpb: Tensor | None) -> Tensor:
    """[1, heads or 1, tokens, tokens], rows aligned as PyTorch's kernels like them."""
    tokens, dtype, device = problem.tokens, like.dtype, like.device
    position = torch.arange(tokens, device=device)
    query, key = position[:, None], position[None]
    mask = torch.zeros(1, tokens, tokens, device=device, dtype=dtype)
    if rpb is not None:
        mask = rpb.to(dtype).flatten(1)[:, bias_places(problem, query, key)]
    mask = mask.masked_fill(~attends(problem, query, key), -torch.inf)
    return torch.nn.functional.pad(mask, (0, -tokens % 16))[None, ..., :tokens]


def coordinates(problem: Problem, token: Any) -> list[Any]:
    """Of a flat token, an axis each; arithmetic that PyTorch's compiler takes."""
    steps = [prod(problem.map[axis + 1 :]) for axis in range(problem.dims)]
    return [token // step % size for step, size in zip(steps, problem.map, strict=True)]


def attends(problem: Problem, query: Any, key: Any) -> Any:
    """Whether flat tokens attend to flat tokens; tensors."""
    result = query >= 0
    axes = zip(
        coordinates(problem, query), coordinates(problem, key), problem.map, problem.kernel_size,
        problem.dilation, strict=True,
    )  # fmt: skip
    for q, k, length, kernel_size, dilation in axes:
        group = q % dilation
        if dilation > 1:
            result = result & (k % dilation == group)
        if kernel_size * dilation == length:
            continue
        members = (length - group + dilation - 1) // dilation
        start = torch.minimum(
            (q // dilation - kernel_size // 2).clamp(min=0), members - kernel_size
        )
        place = k // dilation - start
        result = result & (place >= 0) & (place < kernel_size)
    return result


def bias_places(problem: Problem, query: Any, key: Any) -> Any:
    """Index into a head's flat bias; some valid one where tokens do not attend."""
    place = 0
    axes = zip(
        coordinates(problem, query), coordinates(problem, key), problem.kernel_size,
        problem.dilation, strict=True,
    )  # fmt: skip
    for q, k, kernel_size, dilation in axes:
        offset = (k // dilation - q // dilation + kernel_size - 1).clamp(0, 2 * kernel_size - 2)
        place = place * (2 * kernel_size - 1) + offset
    return place


class FlexAttention:
    """PyTorch's FlexAttention, compiled; bias by score_mod, its block mask made before.

    Tokens in rows, or tile by tile of each dilation group, so that a block is a compact region.
    """

    name, compiler, is_dense = "flex", "torch", False

    def refuses(self, problem: Problem, bias: bool, backward: bool) -> str | None:
        """Maps whose block mask takes too long to make."""
        return "more than 16384 tokens" if problem.tokens > 2**14 else None

    def prepare(self, problem: Problem, tensors: Tensors) -> Iterator[Call]:
        """A way for each order of tokens."""
        inputs = [heads_first(x) for x in tensors.qkv.unbind(-3)]
        device = inputs[0].device
        rows = torch.arange(problem.tokens, device=device)
        orders = {"rows": rows, "tiles": tiled_order(problem, FLEX_TILES[problem.dims]).to(device)}
        if problem.kernel_size == problem.map or torch.equal(orders["tiles"], rows):
            del orders["tiles"]
        for label, order in orders.items():
            places = order.argsort()
            yield Autograd(
                label,
                self._function(problem, order.int() if label == "tiles" else None, device),
                [*[x[:, :, order].contiguous() for x in inputs], tensors.rpb],
                lambda x, order=order: heads_first(x)[:, :, order].contiguous(),
                lambda x, places=places: heads_last(problem, x[:, :, places]),
            )

    def _function(
        self, problem: Problem, order: Tensor | None, device: torch.device
    ) -> Callable[..., Tensor]:
        def token(place: Any) -> Any:
            return place if order is None else order[place]

        def mask_mod(b: Any, h: Any, query: Any, key: Any) -> Any:
            return attends(problem, token(query), token(key))

        blocks = None
        if problem.kernel_size != problem.map:
            tokens = problem.tokens
            blocks = create_block_mask(mask_mod, None, None, tokens, tokens, device=device)

        def attention(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor | None = None) -> Tensor:
            def score_mod(score: Any, b: Any, h: Any, query: Any, key: Any) -> Any:
                return score + rpb[h, bias_places(problem, token(query), token(key))]

            if rpb is None:
                return flex_attention(q, k, v, block_mask=blocks)
            rpb = rpb.flatten(1)
            return flex_attention(q, k, v, score_mod=score_mod, block_mask=blocks)

        return compiled(attention, device)


def tiled_order(problem: Problem, tile: Sequence[int]) -> Tensor:
    """Tokens by dilation group, by tile in it, and in rows in the tile."""
    token = torch.arange(problem.tokens)
    axes = [
        (c % d, c // d // t, c // d % t)
        for c, d, t in zip(coordinates(problem, token), problem.dilation, tile, strict=True)
    ]
    key = torch.zeros_like(token)
    for part in range(3):
        for values in axes:
            key = key * (int(values[part].max()) + 1) + values[part]
    return key.argsort()


class Gathered:
    """Windows gathered by indexing and two products in PyTorch's operators, compiled."""

    name, compiler, is_dense = "gathered", "torch", False

    def refuses(self, problem: Problem, bias: bool, backward: bool) -> str | None:
        """Windows that take too much memory, in fp32."""
        too_large = 8 * problem.elements * problem.window > GATHERED_BYTES
        return "gathered windows are too large" if too_large else None

    def prepare(self, problem: Problem, tensors: Tensors) -> Iterator[Call]:
        """One way."""
        flat, scale = problem.settings

        def attention(qkv: Tensor, rpb: Tensor | None = None) -> Tensor:
            return portable.attention_qkvpacked(qkv, rpb, flat, scale)

        function = compiled(attention, tensors.qkv.device)
        yield _Packed(self.name, function, tensors[:2], lambda x: x, lambda x: x)


class _Packed(Autograd):
    def backward(self, grad: Tensor) -> tuple[Tensor, ...]:
        grad_qkv, *rest = super().backward(grad)
        return *grad_qkv.unbind(-3), *rest


class Natten:
    """NATTEN's fused kernels with their default tiles, where it is installed."""

    name, compiler, is_dense = "natten", None, False

    def refuses(self, problem: Problem, bias: bool, backward: bool) -> str | None:
        """Any bias."""
        if find_spec("natten") is None:
            return "not installed"
        return "adds no bias" if bias else None

    def prepare(self, problem: Problem, tensors: Tensors) -> Iterator[Call]:
        """A way for each of its backends; those of other GPUs raise."""
        import natten

        function = getattr(natten, f"na{problem.dims}d")
        window = {"kernel_size": problem.kernel_size, "dilation": problem.dilation}
        inputs = [x.contiguous() for x in tensors.qkv.unbind(-3)]
        for backend in ("cutlass-fna", "hopper-fna", "blackwell-fna"):
            call = partial(function, **window, backend=backend)
            yield Autograd(backend, call, inputs, lambda x: x, lambda x: x)


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in [
        *map(Operator, (*GENERATIONS, "reference")),
        FlexAttention(), DenseAttention("sdpa"), DenseAttention("dense"), Gathered(), Natten(),
    ]
}  # fmt: skip
