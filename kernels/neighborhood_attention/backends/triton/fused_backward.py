"""Fused neighborhood attention, backward. The log-sum-exp gives the probabilities once more:

    p = exp(scale * q k^T + bias - lse)
    dp = dO v^T ; delta = sum(dO * O) - dlse ; ds = p * (dp - delta)
    dq = scale * ds k ; dk = scale * ds^T q ; dv = p^T dO
    dbias[k - q] = sum of ds over images and positions

No kernel needs an atomic operation, so equal inputs give equal bits:

    query gradient   A program owns a tile of queries and walks over strips of keys, as in the
                     forward; it also stores delta.
    key gradient     A program owns a tile of keys and walks over strips of the queries that attend
                     to them. All products have the keys in rows: to transpose the result of a
                     product is slow on Hopper and, before Triton 3.7.1, wrong.
    bias gradient    See `fused_bias_gradient`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from neighborhood_attention.backends.triton.bias_table import build_bias_table
from neighborhood_attention.backends.triton.fused_bias_gradient import bias_gradient
from neighborhood_attention.backends.triton.launch import (
    block_arguments,
    window_arguments,
    with_contiguous_heads,
)
from neighborhood_attention.backends.triton.tiles import choose_tiles, plan_tiles
from neighborhood_attention.backends.triton.window import (
    block_tokens,
    group_length,
    load_tokens,
    locate_tile,
    masked_gradient,
    masked_scores,
    store_tokens,
    table_block,
    table_entry,
    tile_range,
    token_offsets,
)
from neighborhood_attention.geometry import Neighborhood


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    output: Tensor,
    lse: Tensor,
    window: Neighborhood,
    scale: float,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> Tensor | None:
    """Fills the gradient buffers, strided or not; returns the bias's gradient."""
    batch, height, width, heads, _ = query.shape
    tiles = choose_tiles(query, window)
    delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    tensors = with_contiguous_heads(query, key, value, grad_output)
    strides = [stride for tensor in tensors for stride in tensor.stride()[:4]]
    settings = {
        **window_arguments(window),
        **block_arguments(*tensors, grad_query, grad_key, grad_value),
    }

    plan = plan_tiles(tiles.query_gradient, window, (height, width), of_keys=False)
    table = build_bias_table(rpb, window, (height, width), plan, query)
    _query_gradient_kernel[(batch * plan.programs * heads,)](
        *tensors, output, lse, delta if grad_lse is None else grad_lse.contiguous(), delta,
        table, grad_query,
        *strides, *grad_query.stride()[:4], 0 if rpb is None else table.stride(0),
        height, width, heads, scale, HAS_GRAD_LSE=grad_lse is not None,
        **plan.arguments(), **settings, **plan.tile.options,
    )  # fmt: skip
    plan = plan_tiles(tiles.key_gradient, window, (height, width), of_keys=True)
    table = build_bias_table(rpb, window, (height, width), plan, query)
    _key_gradient_kernel[(batch * plan.programs * heads,)](
        *tensors, lse, delta, table, grad_key, grad_value,
        *strides, *grad_key.stride()[:4], *grad_value.stride()[:4],
        0 if rpb is None else table.stride(0),
        height, width, heads, scale,
        **plan.arguments(), **settings, **plan.tile.options,
    )  # fmt: skip
    if rpb is None:
        return None
    return bias_gradient(tensors, rpb, lse, delta, window, scale, tiles.bias_gradient)


@triton.jit
def _query_gradient_kernel(
    query, key, value, grad_output, output, lse, grad_lse, delta, table, grad_query,
    query_b, query_h, query_w, query_n, key_b, key_h, key_w, key_n,
    value_b, value_h, value_w, value_n,
    grad_output_b, grad_output_h, grad_output_w, grad_output_n,
    grad_query_b, grad_query_h, grad_query_w, grad_query_n, table_n,
    height, width, heads, scale, HAS_GRAD_LSE: tl.constexpr,
    row_tiles, column_tiles, front_h, back_h, front_w, back_w,
    KERNEL_SIZE_H: tl.constexpr, KERNEL_SIZE_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    IS_CAUSAL_H: tl.constexpr, IS_CAUSAL_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STRIP_H: tl.constexpr, STRIP_W: tl.constexpr,
    COLUMN_STRIPS: tl.constexpr, STRIPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of queries. Grid: (images * dilation groups * tiles * heads,)."""
    batch, head, group_h, group_w, tile_h, tile_w = locate_tile(
        heads, row_tiles, column_tiles, DILATION_H, DILATION_W
    )
    length_h = group_length(group_h, height, DILATION_H)
    length_w = group_length(group_w, width, DILATION_W)
    start_h, end_h = tile_range(
        tile_h, length_h, KERNEL_SIZE_H, STRIDE_H, IS_CAUSAL_H, TILE_H, False
    )
    start_w, _ = tile_range(tile_w, length_w, KERNEL_SIZE_W, STRIDE_W, IS_CAUSAL_W, TILE_W, False)
    entry = table_entry(
        tile_h, tile_w, group_h, group_w, height, width, length_h, length_w,
        front_h, back_h, front_w, back_w, DILATION_H, DILATION_W, TILE_H, TILE_W,
    )  # fmt: skip
    query_row, query_column, is_query = block_tokens(
        tile_h * TILE_H, tile_w * TILE_W, length_h, length_w, group_h, group_w,
        DILATION_H, DILATION_W, TILE_H, TILE_W,
    )  # fmt: skip

    query += batch * query_b + head * query_n
    key += batch * key_b + head * key_n
    value += batch * value_b + head * value_n
    grad_output += batch * grad_output_b + head * grad_output_n
    grad_query += batch * grad_query_b + head * grad_query_n
    first_token = batch * height * width * heads + head
    output += first_token * HEAD_DIM
    lse += first_token
    grad_lse += first_token
    delta += first_token
    table = table_block(table + head * table_n, entry, STRIPS, TILE_H * TILE_W, STRIP_H * STRIP_W)

    token = token_offsets(query_row, query_column, width * heads, heads, WIDE)
    query_offsets = token_offsets(query_row, query_column, query_h, query_w, WIDE)
    q = load_tokens(query, query_offsets, is_query, HEAD_DIM, BLOCK_D)
    grad_output_offsets = token_offsets(query_row, query_column, grad_output_h, grad_output_w, WIDE)
    do = load_tokens(grad_output, grad_output_offsets, is_query, HEAD_DIM, BLOCK_D)
    o = load_tokens(output, token * HEAD_DIM, is_query, HEAD_DIM, BLOCK_D)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_GRAD_LSE:
        row_delta -= tl.load(grad_lse + token, mask=is_query, other=0.0)
    tl.store(delta + token, row_delta, mask=is_query)
    row_lse = tl.load(lse + token, mask=is_query, other=0.0) * 1.4426950408889634
    dq = tl.zeros((TILE_H * TILE_W, BLOCK_D), tl.float32)

    for strip in range(tl.cdiv(end_h - start_h, STRIP_H) * COLUMN_STRIPS):
        key_row, key_column, is_key = block_tokens(
            start_h + strip // COLUMN_STRIPS * STRIP_H, start_w + strip % COLUMN_STRIPS * STRIP_W,
            length_h, length_w, group_h, group_w, DILATION_H, DILATION_W, STRIP_H, STRIP_W,
        )  # fmt: skip
        key_offsets = token_offsets(key_row, key_column, key_h, key_w, WIDE)
        k = load_tokens(key, key_offsets, is_key, HEAD_DIM, BLOCK_D)
        value_offsets = token_offsets(key_row, key_column, value_h, value_w, WIDE)
        v = load_tokens(value, value_offsets, is_key, HEAD_DIM, BLOCK_D)
        bias = tl.load(table + strip * (TILE_H * TILE_W * STRIP_H * STRIP_W)).to(tl.float32)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        p = tl.exp2(masked_scores(s, scale, bias) - row_lse[:, None])
        ds = masked_gradient(p, dp, bias, row_delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    grad_query_offsets = token_offsets(query_row, query_column, grad_query_h, grad_query_w, WIDE)
    store_tokens(grad_query, grad_query_offsets, is_query, dq * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_gradient_kernel(
    query, key, value, grad_output, lse, delta, table, grad_key, grad_value,
    query_b, query_h, query_w, query_n, key_b, key_h, key_w, key_n,
    value_b, value_h, value_w, value_n,
    grad_output_b, grad_output_h, grad_output_w, grad_output_n,
    grad_key_b, grad_key_h, grad_key_w, grad_key_n,
    grad_value_b, grad_value_h, grad_value_w, grad_value_n, table_n,
    height, width, heads, scale, row_tiles, column_tiles, front_h, back_h, front_w, back_w,
    KERNEL_SIZE_H: tl.constexpr, KERNEL_SIZE_W: tl.constexpr,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    IS_CAUSAL_H: tl.constexpr, IS_CAUSAL_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, STRIP_H: tl.constexpr, STRIP_W: tl.constexpr,
    COLUMN_STRIPS: tl.constexpr, STRIPS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of keys. Grid: (images * dilation groups * tiles * heads,)."""
    batch, head, group_h, group_w, tile_h, tile_w = locate_tile(
        heads, row_tiles, column_tiles, DILATION_H, DILATION_W
    )
    length_h = group_length(group_h, height, DILATION_H)
    length_w = group_length(group_w, width, DILATION_W)
    start_h, end_h = tile_range(
        tile_h, length_h, KERNEL_SIZE_H, STRIDE_H, IS_CAUSAL_H, TILE_H, True
    )
    start_w, _ = tile_range(tile_w, length_w, KERNEL_SIZE_W, STRIDE_W, IS_CAUSAL_W, TILE_W, True)
    entry = table_entry(
        tile_h, tile_w, group_h, group_w, height, width, length_h, length_w,
        front_h, back_h, front_w, back_w, DILATION_H, DILATION_W, TILE_H, TILE_W,
    )  # fmt: skip
    key_row, key_column, is_key = block_tokens(
        tile_h * TILE_H, tile_w * TILE_W, length_h, length_w, group_h, group_w,
        DILATION_H, DILATION_W, TILE_H, TILE_W,
    )  # fmt: skip

    query += batch * query_b + head * query_n
    key += batch * key_b + head * key_n
    value += batch * value_b + head * value_n
    grad_output += batch * grad_output_b + head * grad_output_n
    grad_key += batch * grad_key_b + head * grad_key_n
    grad_value += batch * grad_value_b + head * grad_value_n
    lse += batch * height * width * heads + head
    delta += batch * height * width * heads + head
    table = table_block(table + head * table_n, entry, STRIPS, TILE_H * TILE_W, STRIP_H * STRIP_W)

    key_offsets = token_offsets(key_row, key_column, key_h, key_w, WIDE)
    k = load_tokens(key, key_offsets, is_key, HEAD_DIM, BLOCK_D)
    value_offsets = token_offsets(key_row, key_column, value_h, value_w, WIDE)
    v = load_tokens(value, value_offsets, is_key, HEAD_DIM, BLOCK_D)
    dk = tl.zeros((TILE_H * TILE_W, BLOCK_D), tl.float32)
    dv = tl.zeros((TILE_H * TILE_W, BLOCK_D), tl.float32)

    for strip in range(tl.cdiv(end_h - start_h, STRIP_H) * COLUMN_STRIPS):
        query_row, query_column, is_query = block_tokens(
            start_h + strip // COLUMN_STRIPS * STRIP_H, start_w + strip % COLUMN_STRIPS * STRIP_W,
            length_h, length_w, group_h, group_w, DILATION_H, DILATION_W, STRIP_H, STRIP_W,
        )  # fmt: skip
        token = token_offsets(query_row, query_column, width * heads, heads, WIDE)
        query_offsets = token_offsets(query_row, query_column, query_h, query_w, WIDE)
        q = load_tokens(query, query_offsets, is_query, HEAD_DIM, BLOCK_D)
        grad_output_offsets = token_offsets(
            query_row, query_column, grad_output_h, grad_output_w, WIDE
        )
        do = load_tokens(grad_output, grad_output_offsets, is_query, HEAD_DIM, BLOCK_D)
        row_lse = tl.load(lse + token, mask=is_query, other=0.0) * 1.4426950408889634
        row_delta = tl.load(delta + token, mask=is_query, other=0.0)
        bias = tl.load(table + strip * (TILE_H * TILE_W * STRIP_H * STRIP_W)).to(tl.float32)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        p = tl.exp2(masked_scores(s, scale, bias) - row_lse[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        ds = masked_gradient(p, dp, bias, row_delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    grad_key_offsets = token_offsets(key_row, key_column, grad_key_h, grad_key_w, WIDE)
    store_tokens(grad_key, grad_key_offsets, is_key, dk * scale, HEAD_DIM, BLOCK_D)
    grad_value_offsets = token_offsets(key_row, key_column, grad_value_h, grad_value_w, WIDE)
    store_tokens(grad_value, grad_value_offsets, is_key, dv, HEAD_DIM, BLOCK_D)
