"""Neighborhood attention in separate steps, with the attention weights in memory.

The weights are [B, *spatial, heads, window], in the inputs' dtype, the window's keys in the map's
order (see `slots`). With w = window slots of a query:

    forward    s = scale * q k^T + bias               products
               p = softmax(s) ; lse                   softmax, in place
               output = p v                           sums
    backward   p = exp(scale * q k^T + bias - lse)    products
               dp = dO v^T                            products
               ds = p * (dp - sum(p * dp) + dlse)     softmax's gradient, in place
               dv = p^T dO ; dk = scale * ds^T q      sums for keys
               dq = scale * ds k                      sums
               dbias                                  see `unfused_bias_gradient`

An operator keeps its output and lse alone, so the backward makes the probabilities once more, where
implementations that keep them would save one launch. Nothing needs an atomic operation. What tells
the methods apart is how they multiply: see `naive` and `gemm`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.triton import fused
from neighborhood_attention.backends.triton.launch import (
    CACHED_PROBLEMS,
    Launch,
    Layout,
    Problem,
    describe,
    layout,
    window_arguments,
    with_contiguous_heads,
)
from neighborhood_attention.backends.triton.unfused_bias_gradient import BiasGradient
from neighborhood_attention.backends.triton.unfused_softmax import Softmax
from neighborhood_attention.geometry import Neighborhood

MAX_WINDOW = 2**15  # a program of the softmax holds a row


@dataclass(frozen=True)
class Method:
    """The kernels that multiply; their first arguments are the tensors, in this order."""

    products: Any  # rows, columns, rpb or None, lse or None, weights
    sums: Any  # weights, columns, sums
    key_sums: Any  # weights, rows, sums
    # From kernel, problem, window, whether its programs own keys, and arguments.
    launch: Callable[[Any, Problem, Neighborhood, bool, dict[str, Any]], Launch]


def supports(inputs: Inputs, window: Neighborhood) -> str | None:
    """Why this backend cannot run the problem; None when it can."""
    if inputs.key.shape[-2] != inputs.query.shape[-2]:
        return "supports no grouped heads: key and value need as many heads as the query"
    if inputs.additional_keys is not None and inputs.additional_keys.shape[1] > 0:
        return "supports no additional keys"
    if window.size > MAX_WINDOW:
        return f"supports windows of up to {MAX_WINDOW} keys, not {window.size}"
    return fused.supports(inputs, window)


def forward(
    method: Method, inputs: Inputs, window: Neighborhood, scale: float
) -> tuple[Tensor, Tensor]:
    """Output in the dtype of the query, log-sum-exp in fp32; the inputs may be strided."""
    query, key, value, rpb, *_ = inputs = _launchable(inputs)
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    if output.numel() > 0:
        launches = _prepare_forward(method, describe(inputs), layout(output), window, scale)
        with torch.cuda.device_of(query):
            weights = _new_weights(query, window, -torch.inf)
            launches.logits(query, key, rpb, None, weights)
            launches.softmax.normalize(weights, lse)
            launches.output(weights, value, output)
    return output, lse


def backward(
    method: Method,
    grad_output: Tensor,
    grad_lse: Tensor | None,
    inputs: Inputs,
    output: Tensor,
    lse: Tensor,
    window: Neighborhood,
    scale: float,
    gradients: Inputs,
) -> None:
    """Fills the gradients, strided or not."""
    if grad_output.numel() == 0:
        for gradient in gradients:
            if gradient is not None:
                gradient.zero_()
        return
    query, key, value, rpb, *_ = inputs = _launchable(inputs)
    grad_output = with_contiguous_heads(grad_output)
    grads = tuple(map(layout, (grad_output, *gradients[:3])))
    launches = _prepare_backward(method, describe(inputs), grads, window, scale)
    with torch.cuda.device_of(query):
        weights, grad_weights = (_new_weights(query, window, 0.0) for _ in range(2))
        launches.probabilities(query, key, rpb, lse, weights)
        launches.grad_probabilities(grad_output, value, None, None, grad_weights)
        launches.softmax.gradient(
            weights, grad_weights, None if grad_lse is None else grad_lse.contiguous()
        )
        launches.grad_value(weights, grad_output, gradients.value)
        launches.grad_query(grad_weights, key, gradients.query)
        launches.grad_key(grad_weights, query, gradients.key)
        if gradients.rpb is not None:
            launches.bias_gradient.fill(gradients.rpb, grad_weights)


def _launchable(inputs: Inputs) -> Inputs:
    """Heads contiguous, and the bias."""
    query, key, value = map(with_contiguous_heads, inputs[:3])
    return Inputs(query, key, value, None if inputs.rpb is None else inputs.rpb.contiguous())


def _new_weights(query: Tensor, window: Neighborhood, fill: float) -> Tensor:
    """Uninitialised; filled where windows may be truncated, since kernels write what there is."""
    weights = query.new_empty((*query.shape[:-1], window.size))
    return weights.fill_(fill) if any(window.is_causal) else weights


@dataclass(frozen=True)
class _Forward:
    logits: Launch
    softmax: Softmax
    output: Launch


@dataclass(frozen=True)
class _Backward:
    probabilities: Launch
    grad_probabilities: Launch
    softmax: Softmax
    grad_value: Launch
    grad_query: Launch
    grad_key: Launch
    bias_gradient: BiasGradient


class _Launches:
    """Makes launches of a method's kernels; tensors are named."""

    def __init__(
        self, method: Method, problem: Problem, window: Neighborhood, **layouts: Layout
    ) -> None:
        self._method, self._problem, self._window = method, problem, window
        self._layouts = {"query": problem.query, "value": problem.value, **layouts}
        self.settings = {
            **problem.map_arguments(**layouts), **problem.head_arguments, **window_arguments(window)
        }  # fmt: skip
        weights = problem.spatial.numel() * problem.query.shape[-2] * window.size
        self.settings["WIDE"] |= weights >= 2**31

    def products(self, rows: str, columns: str, scale: float = 1.0) -> Launch:
        return self._launch(self._method.products, False, scale, row=rows, column=columns)

    def sums(self, columns: str, sums: str, scale: float = 1.0) -> Launch:
        return self._launch(self._method.sums, False, scale, column=columns, sum=sums)

    def key_sums(self, rows: str, sums: str, scale: float = 1.0) -> Launch:
        return self._launch(self._method.key_sums, True, scale, row=rows, sum=sums)

    def _launch(self, kernel: Any, of_keys: bool, scale: float, **names: str) -> Launch:
        strides = {
            f"{role}_strides": self.settings[f"{name}_strides"] for role, name in names.items()
        }
        is_value = set(names.values()) & {"value", "output", "grad_output", "grad_value"}
        head_dim = (self._problem.value if is_value else self._problem.query).shape[-1]
        arguments = {
            **self.settings, **strides, "scale": scale, "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        }  # fmt: skip
        return self._method.launch(kernel, self._problem, self._window, of_keys, arguments)


@lru_cache(CACHED_PROBLEMS)
def _prepare_forward(
    method: Method, description: tuple[Any, ...], output: Any, window: Neighborhood, scale: float
) -> _Forward:
    problem = Problem.of(description)
    launches = _Launches(method, problem, window, output=Layout(*output))
    return _Forward(
        logits=launches.products("query", "key", scale),
        softmax=Softmax(problem, window),
        output=launches.sums("value", "output"),
    )


@lru_cache(CACHED_PROBLEMS)
def _prepare_backward(
    method: Method, description: tuple[Any, ...], grads: tuple[Any, ...],
    window: Neighborhood, scale: float,
) -> _Backward:  # fmt: skip
    problem = Problem.of(description)
    names = "grad_output", "grad_query", "grad_key", "grad_value"
    layouts = {name: Layout(*grad) for name, grad in zip(names, grads, strict=True)}
    launches = _Launches(method, problem, window, **layouts)
    return _Backward(
        probabilities=launches.products("query", "key", scale),
        grad_probabilities=launches.products("grad_output", "value"),
        softmax=Softmax(problem, window),
        grad_value=launches.key_sums("grad_output", "grad_value"),
        grad_query=launches.sums("key", "grad_query", scale),
        grad_key=launches.key_sums("query", "grad_key", scale),
        bias_gradient=BiasGradient(problem, window, launches.settings),
    )
