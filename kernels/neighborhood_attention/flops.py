"""FLOP counts for `torch.utils.flop_counter.FlopCounterMode`; importing this registers them.

A module of its own, since PyTorch's counter imports Triton.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_operators = torch.ops.neighborhood_attention


def _matmul_flops(shape: Sequence[int], kernel_size: Sequence[int], products: int) -> int:
    """FLOPs of `products` matrix products between each query and its window."""
    return 2 * products * prod(shape) * prod(kernel_size)


@register_flop_formula(_operators.attention)
def _attention_flops(
    query: Any, key: Any, value: Any, rpb: Any, kernel_size: Any, *_: Any, **__: Any
) -> int:
    return _matmul_flops(query, kernel_size, 2)


@register_flop_formula(_operators.attention_backward)
def _attention_backward_flops(
    grad_output: Any, grad_lse: Any, query: Any, key: Any, value: Any, rpb: Any,
    output: Any, lse: Any, kernel_size: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _matmul_flops(query, kernel_size, 5)


@register_flop_formula(_operators.attention_qkvpacked)
def _packed_flops(qkv: Any, rpb: Any, kernel_size: Any, *_: Any, **__: Any) -> int:
    return _matmul_flops((*qkv[:-3], *qkv[-2:]), kernel_size, 2)


@register_flop_formula(_operators.attention_qkvpacked_backward)
def _packed_backward_flops(
    grad_output: Any, grad_lse: Any, qkv: Any, rpb: Any,
    output: Any, lse: Any, kernel_size: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _matmul_flops((*qkv[:-3], *qkv[-2:]), kernel_size, 5)
