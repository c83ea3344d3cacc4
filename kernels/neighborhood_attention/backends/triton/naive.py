"""The naive backend: each step a launch of its own, without tensor cores; the plainest baseline.

See `unfused` for the steps. A program owns a few neighboring tokens of the map and meets their
windows some tokens at a time: products are sums over blocks [tokens, neighbors, head dimension],
read in whole vectors. To give keys and values their gradients, a program owns keys and gathers from
the queries that attend to them (the inverse window), so no atomic operation is needed.

It stands for the first kernels of "Neighborhood Attention Transformer" (arXiv 2204.07143).
"""

from functools import partial
from typing import Any

import triton
import triton.language as tl

from neighborhood_attention.backends.triton import unfused
from neighborhood_attention.backends.triton.launch import Launch, Problem
from neighborhood_attention.backends.triton.slots import (
    groups_of,
    in_group,
    in_rows,
    map_tokens,
    on_map,
    slot_keys,
    weights_of,
)
from neighborhood_attention.backends.triton.window import (
    attending_end,
    attending_start,
    store_tokens,
    token_index,
    token_offsets,
    window_start,
)
from neighborhood_attention.geometry import Neighborhood

# Of a block [tokens, neighbors, head dimension].
NEIGHBORS = 8
BLOCK_ELEMENTS = 2048
NUM_WARPS = 4


def launch(
    kernel: Any, problem: Problem, window: Neighborhood, of_keys: bool, arguments: dict[str, Any]
) -> Launch:
    """A launch of one of the kernels below."""
    batch, *_, heads, _ = problem.query.shape
    tokens = max(1, BLOCK_ELEMENTS // (NEIGHBORS * arguments["BLOCK_D"]))
    blocks = triton.cdiv(problem.spatial.numel(), tokens)
    arguments = arguments | {"blocks": blocks, "TOKENS": tokens, "NEIGHBORS": NEIGHBORS}
    return Launch(kernel, batch * blocks * heads, arguments, num_warps=NUM_WARPS)


@triton.jit
def _locate(blocks, heads):
    """Image, head and block of tokens of this program; the head runs fastest."""
    program = tl.program_id(0)
    image = (program // heads // blocks).to(tl.int64)
    return image, (program % heads).to(tl.int64), program // heads % blocks


@triton.jit
def _load_vectors(tensor, offsets, mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[tokens, neighbors, BLOCK_D] in fp32; zeros where there is no element."""
    d = tl.arange(0, BLOCK_D)[None, None, :]
    mask = mask[:, :, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (d < HEAD_DIM)
    return tl.load(tensor + offsets[:, :, None] + d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _products_kernel(
    rows, columns, rpb, lse, weights,
    row_strides, column_strides, size, heads, blocks, scale,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TOKENS: tl.constexpr, NEIGHBORS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Some queries with the keys of their windows. Grid: (images * blocks * heads,)."""
    WINDOW: tl.constexpr = KERNEL_SIZE[0] * KERNEL_SIZE[1] * KERNEL_SIZE[2]
    image, head, block = _locate(blocks, heads)
    token, is_token = map_tokens(block * TOKENS, size, TOKENS)
    token = in_rows(token)
    query = in_group(token, DILATION)
    group, length = groups_of(token, size, DILATION)
    is_token = is_token[:, None]
    first_token = image * size[0] * size[1] * size[2] * heads + head
    columns += image * column_strides[0] + head * column_strides[4]
    rows += image * row_strides[0] + head * row_strides[4]
    row_offsets = token_offsets(token, row_strides, WIDE)
    q = _load_vectors(rows, row_offsets, is_token, HEAD_DIM, BLOCK_D)
    row_lse = None
    if lse is not None:
        row_lse = tl.load(
            lse + first_token + token_index(token, size, heads, WIDE), mask=is_token, other=0.0
        )
    weights += first_token * WINDOW + token_index(token, size, heads * WINDOW, WIDE)

    for first in range(0, WINDOW, NEIGHBORS):
        slot = first + tl.arange(0, NEIGHBORS)[None, :]
        key, attends = slot_keys(query, slot, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        attends &= is_token
        offsets = token_offsets(on_map(key, group, DILATION), column_strides, WIDE)
        k = _load_vectors(columns, offsets, attends, HEAD_DIM, BLOCK_D)
        dots = tl.sum(q * k, 2)
        result = weights_of(dots, scale, rpb, row_lse, head, query, key, attends, KERNEL_SIZE)
        tl.store(weights + slot, result.to(weights.dtype.element_ty), mask=attends)


@triton.jit
def _sums_kernel(
    weights, columns, sums,
    column_strides, sum_strides, size, heads, blocks, scale,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TOKENS: tl.constexpr, NEIGHBORS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """For some queries, sums over their windows. Grid: (images * blocks * heads,)."""
    WINDOW: tl.constexpr = KERNEL_SIZE[0] * KERNEL_SIZE[1] * KERNEL_SIZE[2]
    image, head, block = _locate(blocks, heads)
    flat_token, is_token = map_tokens(block * TOKENS, size, TOKENS)
    token = in_rows(flat_token)
    query = in_group(token, DILATION)
    group, length = groups_of(token, size, DILATION)
    columns += image * column_strides[0] + head * column_strides[4]
    sums += image * sum_strides[0] + head * sum_strides[4]
    weights += (image * size[0] * size[1] * size[2] * heads + head) * WINDOW
    weights += token_index(token, size, heads * WINDOW, WIDE)
    total = tl.zeros((TOKENS, NEIGHBORS, BLOCK_D), tl.float32)

    for first in range(0, WINDOW, NEIGHBORS):
        slot = first + tl.arange(0, NEIGHBORS)[None, :]
        key, attends = slot_keys(query, slot, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        attends &= is_token[:, None]
        p = tl.load(weights + slot, mask=attends, other=0.0).to(tl.float32)
        offsets = token_offsets(on_map(key, group, DILATION), column_strides, WIDE)
        total += p[:, :, None] * _load_vectors(columns, offsets, attends, HEAD_DIM, BLOCK_D)

    offsets = token_offsets(flat_token, sum_strides, WIDE)
    store_tokens(sums, offsets, is_token, tl.sum(total, 1) * scale, HEAD_DIM, BLOCK_D)


@triton.jit
def _attending(
    key, length, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, IS_CAUSAL: tl.constexpr
):
    """On one axis, the queries [start, end) that attend to each key."""
    start = attending_start(key, KERNEL_SIZE, STRIDE, IS_CAUSAL)
    return start, attending_end(key, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)


@triton.jit
def _key_sums_kernel(
    weights, rows, sums,
    row_strides, sum_strides, size, heads, blocks, scale,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TOKENS: tl.constexpr, NEIGHBORS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """For some keys, sums over the queries that attend to them. Grid: (images * blocks * heads,).

    Along the last axis several queries at a time, along the others one by one.
    """
    WINDOW: tl.constexpr = KERNEL_SIZE[0] * KERNEL_SIZE[1] * KERNEL_SIZE[2]
    image, head, block = _locate(blocks, heads)
    flat_token, is_token = map_tokens(block * TOKENS, size, TOKENS)
    token = in_rows(flat_token)
    key = in_group(token, DILATION)
    group, length = groups_of(token, size, DILATION)
    start_d, end_d = _attending(key[0], length[0], KERNEL_SIZE[0], STRIDE[0], IS_CAUSAL[0])
    start_h, end_h = _attending(key[1], length[1], KERNEL_SIZE[1], STRIDE[1], IS_CAUSAL[1])
    start_w, end_w = _attending(key[2], length[2], KERNEL_SIZE[2], STRIDE[2], IS_CAUSAL[2])
    row_block = is_token[:, None]
    count_d = tl.max(tl.where(row_block, end_d - start_d, 0))
    count_h = tl.max(tl.where(row_block, end_h - start_h, 0))
    count_w = tl.max(tl.where(row_block, end_w - start_w, 0))
    rows += image * row_strides[0] + head * row_strides[4]
    sums += image * sum_strides[0] + head * sum_strides[4]
    weights += (image * size[0] * size[1] * size[2] * heads + head) * WINDOW
    total = tl.zeros((TOKENS, NEIGHBORS, BLOCK_D), tl.float32)

    for line in range(count_d * count_h):
        d = start_d + line // count_h
        h = start_h + line % count_h
        is_line = row_block & (d < end_d) & (h < end_h)
        slot_d = key[0] - window_start(d, length[0], KERNEL_SIZE[0], STRIDE[0], IS_CAUSAL[0])
        slot_h = key[1] - window_start(h, length[1], KERNEL_SIZE[1], STRIDE[1], IS_CAUSAL[1])
        slot_line = (slot_d * KERNEL_SIZE[1] + slot_h) * KERNEL_SIZE[2]
        for first in range(0, count_w, NEIGHBORS):
            w = start_w + first + tl.arange(0, NEIGHBORS)[None, :]
            attends = is_line & (w < end_w)
            start = window_start(w, length[2], KERNEL_SIZE[2], STRIDE[2], IS_CAUSAL[2])
            query_token = on_map((d, h, w), group, DILATION)
            index = token_index(query_token, size, heads * WINDOW, WIDE) + slot_line + key[2]
            p = tl.load(weights + index - start, mask=attends, other=0.0).to(tl.float32)
            offsets = token_offsets(query_token, row_strides, WIDE)
            total += p[:, :, None] * _load_vectors(rows, offsets, attends, HEAD_DIM, BLOCK_D)

    offsets = token_offsets(flat_token, sum_strides, WIDE)
    store_tokens(sums, offsets, is_token, tl.sum(total, 1) * scale, HEAD_DIM, BLOCK_D)


METHOD = unfused.Method(_products_kernel, _sums_kernel, _key_sums_kernel, launch)
supports = unfused.supports
forward = partial(unfused.forward, METHOD)
backward = partial(unfused.backward, METHOD)
