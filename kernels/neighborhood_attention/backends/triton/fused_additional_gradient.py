"""Gradient of the additional keys and values, which every query of an image attends to.

A program owns a block of additional keys and walks over a share of the image's queries; the shares
are added up afterwards, in a fixed order. The formulas are those of `fused_backward`.
"""

from math import ceil, prod
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from neighborhood_attention.backends.triton.launch import Launch, Problem
from neighborhood_attention.backends.triton.products import product
from neighborhood_attention.backends.triton.window import (
    load_additional,
    load_tokens,
    store_tokens,
    token_offsets,
)

# Queries of a share at least, programs to aim at: each share costs a partial sum.
SHARE = 1024
PROGRAMS = 2048


class AdditionalGradient:
    """Fills the gradient of a problem's additional keys and values."""

    def __init__(self, problem: Problem, count: int, settings: dict[str, Any]) -> None:
        batch, key_heads = problem.query.shape[0], problem.key.shape[-2]
        largest = max(settings["BLOCK_D"], settings["BLOCK_V"]) * problem.query.dtype.itemsize
        block = 32 if largest <= 256 else 16
        tokens, programs = prod(problem.spatial), batch * key_heads * ceil(count / block)
        self._shares = min(ceil(tokens / SHARE), ceil(PROGRAMS / max(1, programs)))
        self._launch = Launch(
            _additional_gradient_kernel,
            programs * self._shares,
            {
                **settings, "batch": batch, "shares": self._shares,
                "share_size": ceil(tokens / self._shares / block) * block,
                "BLOCK_K": block, "BLOCK_Q": block,
            },
            num_warps=4, num_stages=1,
        )  # fmt: skip

    def fill(
        self, grad_keys: Tensor, grad_values: Tensor, query: Tensor, grad_output: Tensor,
        keys: Tensor, values: Tensor, lse: Tensor, delta: Tensor,
    ) -> None:  # fmt: skip
        """Fill the gradients of `keys` and `values`."""
        partial_keys = lse.new_empty(self._shares, *keys.shape)
        partial_values = lse.new_empty(self._shares, *values.shape)
        self._launch(query, grad_output, keys, values, lse, delta, partial_keys, partial_values)
        grad_keys.copy_(partial_keys.sum(0))
        grad_values.copy_(partial_values.sum(0))


@triton.jit
def _additional_gradient_kernel(
    query, grad_output, additional_key, additional_value, lse, delta, grad_key, grad_value,
    query_strides, grad_output_strides,
    additional_key_strides, additional_value_strides, additional_count,
    batch, shares, share_size, size, heads, heads_per_key, scale,
    BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of keys, one share of queries. Grid: (images * shares * blocks * key heads,).

    Writes [shares, images, keys, key heads, dimension] in fp32.
    """
    program = tl.program_id(0)
    key_heads = heads // heads_per_key
    key_head = (program % key_heads).to(tl.int64)
    program //= key_heads
    blocks = tl.cdiv(additional_count, BLOCK_K)
    first_key = program % blocks * BLOCK_K
    program //= blocks
    share = program % shares
    image = (program // shares).to(tl.int64)
    tokens = size[0] * size[1] * size[2]

    query += image * query_strides[0]
    grad_output += image * grad_output_strides[0]
    k = load_additional(
        additional_key, additional_key_strides, image, key_head, first_key, additional_count,
        BLOCK_K, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    v = load_additional(
        additional_value, additional_value_strides, image, key_head, first_key, additional_count,
        BLOCK_K, VALUE_DIM, BLOCK_V,
    )  # fmt: skip
    dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)

    for head in range(key_head * heads_per_key, (key_head + 1) * heads_per_key):
        end = tl.minimum((share + 1) * share_size, tokens)
        for first in range(share * share_size, end, BLOCK_Q):
            i = first + tl.arange(0, BLOCK_Q)
            is_query = i < tokens
            token = (i // (size[1] * size[2]), i // size[2] % size[1], i % size[2])
            query_offsets = token_offsets(token, query_strides, WIDE)
            grad_offsets = token_offsets(token, grad_output_strides, WIDE)
            row = (image * tokens + i) * heads + head
            q = load_tokens(
                query + head * query_strides[4], query_offsets, is_query, HEAD_DIM, BLOCK_D
            )
            do = load_tokens(
                grad_output + head * grad_output_strides[4], grad_offsets, is_query,
                VALUE_DIM, BLOCK_V,
            )  # fmt: skip
            row_lse = tl.load(lse + row, mask=is_query, other=0.0) * 1.4426950408889634
            row_delta = tl.load(delta + row, mask=is_query, other=0.0)

            dots = product(k, tl.trans(q), PRECISION)
            p = tl.exp2(dots * (scale * 1.4426950408889634) - row_lse[None, :])
            p = tl.where(is_query[None, :], p, 0.0)
            dp = product(v, tl.trans(do), PRECISION)
            dv = product(p.to(do.dtype), do, PRECISION, dv)
            ds = p * (dp - row_delta[None, :])
            dk = product(ds.to(q.dtype), q, PRECISION, dk)

    row = (share.to(tl.int64) * batch + image) * additional_count
    keys = first_key + tl.arange(0, BLOCK_K)
    row = (row + keys) * key_heads + key_head
    is_key = keys < additional_count
    store_tokens(grad_key, row * HEAD_DIM, is_key, dk * scale, HEAD_DIM, BLOCK_D)
    store_tokens(grad_value, row * VALUE_DIM, is_key, dv, VALUE_DIM, BLOCK_V)
