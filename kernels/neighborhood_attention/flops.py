"""FLOP counts for `torch.utils.flop_counter.FlopCounterMode`; importing this registers them.

A module of its own, since PyTorch's counter imports Triton.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

_operators = torch.ops.neighborhood_attention
_Shape = Sequence[int]


def _flops(
    query: _Shape, value: _Shape, additional: _Shape | None, window: _Shape, backward: bool
) -> int:
    """The matrix products between queries and their keys: of queries and keys, of values.

    The backward computes the scores once more, the gradients of query and key (together three
    products over D), of the probabilities and of the values (two over D_v).
    """
    kernel_size = window[: len(query) - 3]
    keys = prod(kernel_size) + (additional[1] if additional else 0)
    channels = 3 * query[-1] + 2 * value[-1] if backward else query[-1] + value[-1]
    return 2 * prod(query[:-1]) * keys * channels


def _packed_flops(qkv: _Shape, window: _Shape, backward: bool) -> int:
    query = (*qkv[:-3], *qkv[-2:])
    return _flops(query, query, None, window, backward)


@register_flop_formula(_operators.attention)
def _attention(
    query: Any, key: Any, value: Any, rpb: Any, additional_keys: Any, additional_values: Any,
    window: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _flops(query, value, additional_keys, window, backward=False)


@register_flop_formula(_operators.attention_backward)
def _attention_backward(
    query: Any, key: Any, value: Any, rpb: Any, additional_keys: Any, additional_values: Any,
    window: Any, *_: Any, **__: Any,
) -> int:  # fmt: skip
    return _flops(query, value, additional_keys, window, backward=True)


@register_flop_formula(_operators.attention_qkvpacked)
def _packed(qkv: Any, rpb: Any, window: Any, *_: Any, **__: Any) -> int:
    return _packed_flops(qkv, window, backward=False)


@register_flop_formula(_operators.attention_qkvpacked_backward)
def _packed_backward(qkv: Any, rpb: Any, window: Any, *_: Any, **__: Any) -> int:
    return _packed_flops(qkv, window, backward=True)


def _half_flops(query: _Shape, window: _Shape, channels: int) -> int:
    return 2 * prod(query[:-1]) * prod(window[: len(query) - 3]) * channels


@register_flop_formula(_operators.scores)
def _scores(query: Any, key: Any, rpb: Any, window: Any, *_: Any, **__: Any) -> int:
    return _half_flops(query, window, query[-1])


@register_flop_formula(_operators.scores_backward)
def _scores_backward(
    grad_scores: Any, query: Any, key: Any, rpb: Any, window: Any, *_: Any, **__: Any
) -> int:
    return _half_flops(query, window, 2 * query[-1])


@register_flop_formula(_operators.apply)
def _apply(probabilities: Any, value: Any, window: Any, *_: Any, **__: Any) -> int:
    return _half_flops(probabilities, window, value[-1])


@register_flop_formula(_operators.apply_backward)
def _apply_backward(
    grad_output: Any, probabilities: Any, value: Any, window: Any, *_: Any, **__: Any
) -> int:
    return _half_flops(probabilities, window, 2 * value[-1])
