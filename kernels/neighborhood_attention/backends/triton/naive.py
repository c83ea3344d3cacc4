"""The naive backend: each step a launch of its own, without tensor cores; the plainest baseline.

See `unfused` for the steps. A program owns some neighboring tokens of the map and walks along the
lines of their windows, one neighbor of each token at a time. A thread reads vectors (of 16 bytes,
if 16 divides the channels) of the same channels: it adds up neighbors, and a warp channels. To
give keys and values their gradients, a program owns keys and gathers from the queries that attend
to them (the inverse window), so no atomic operation is needed.

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
    weights_of,
    windows_of,
)
from neighborhood_attention.backends.triton.window import (
    attending_end,
    attending_start,
    load_tokens,
    store_tokens,
    token_index,
    token_offsets,
    window_start,
)
from neighborhood_attention.geometry import Neighborhood

NUM_WARPS = 4
VECTORS = 2  # of a thread, in a block [tokens, head dimension]: warps then lie along tokens
# Fewer than threads: each thread reads the weights of its tokens, and none are exchanged.
MAX_TOKENS = 64
NEIGHBORS = 4  # whose products are stored together


def launch(
    kernel: Any, problem: Problem, window: Neighborhood, of_keys: bool, arguments: dict[str, Any]
) -> Launch:
    """A launch of one of the kernels below."""
    batch, *_, heads, _ = problem.query.shape
    # Triton knows of strides no more than whether 16 divides them.
    vector = 16 // problem.query.dtype.itemsize if arguments["HEAD_DIM"] % 16 == 0 else 1
    tokens = min(MAX_TOKENS, NUM_WARPS * 32 * VECTORS * vector // arguments["BLOCK_D"])
    neighbors = min(NEIGHBORS, triton.next_power_of_2(window.kernel_size[-1]))
    blocks = triton.cdiv(problem.spatial.numel(), tokens)
    arguments = arguments | {"blocks": blocks, "TOKENS": tokens, "NEIGHBORS": neighbors}
    return Launch(kernel, batch * blocks * heads, arguments, num_warps=NUM_WARPS)


@triton.jit
def _locate(blocks, heads):
    """Image, head and block of tokens of this program; the head runs fastest."""
    program = tl.program_id(0)
    image = (program // heads // blocks).to(tl.int64)
    return image, (program % heads).to(tl.int64), program // heads % blocks


@triton.jit
def _products_kernel(
    rows, columns, rpb, lse, weights,
    row_strides, column_strides, size, heads, blocks, scale,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TOKENS: tl.constexpr, NEIGHBORS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Some queries with the keys of their windows. Grid: (images * blocks * heads,).

    Neighboring slots are stored together: one by one, they would take an access to memory each.
    """
    WINDOW: tl.constexpr = KERNEL_SIZE[0] * KERNEL_SIZE[1] * KERNEL_SIZE[2]
    image, head, block = _locate(blocks, heads)
    token, is_token = map_tokens(block * TOKENS, size, TOKENS)
    query = in_group(token, DILATION)
    group, length = groups_of(token, size, DILATION)
    start, count = windows_of(query, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
    first_token = image * size[0] * size[1] * size[2] * heads + head
    columns += image * column_strides[0] + head * column_strides[4]
    rows += image * row_strides[0] + head * row_strides[4]
    offsets = token_offsets(token, row_strides, WIDE)
    q = load_tokens(rows, offsets, is_token, HEAD_DIM, BLOCK_D).to(tl.float32)
    row_lse = None
    if lse is not None:
        index = first_token + token_index(token, size, heads, WIDE)
        row_lse = tl.load(lse + index, mask=is_token, other=0.0)[:, None]
    weights += first_token * WINDOW
    row_slots = token_index(token, size, heads * WINDOW, WIDE)[:, None]
    first_key = in_rows(start)

    for line in range(KERNEL_SIZE[0] * KERNEL_SIZE[1]):
        d = line // KERNEL_SIZE[1]
        h = line % KERNEL_SIZE[1]
        is_line = is_token & (d < count[0]) & (h < count[1])
        for first in range(0, KERNEL_SIZE[2], NEIGHBORS):
            neighbor = tl.arange(0, NEIGHBORS)[None, :]
            dots = tl.zeros((TOKENS, NEIGHBORS), tl.float32)
            for n in tl.static_range(NEIGHBORS):
                attends = is_line & (first + n < count[2])
                key = (start[0] + d, start[1] + h, start[2] + first + n)
                offsets = token_offsets(on_map(key, group, DILATION), column_strides, WIDE)
                k = load_tokens(columns, offsets, attends, HEAD_DIM, BLOCK_D).to(tl.float32)
                dots = tl.where(neighbor == n, tl.sum(q * k, 1)[:, None], dots)
            w = first + neighbor
            attends = is_line[:, None] & (w < count[2][:, None])
            key = (first_key[0] + d, first_key[1] + h, first_key[2] + w)
            result = weights_of(
                dots, scale, rpb, row_lse, head, in_rows(query), key, attends, KERNEL_SIZE
            )
            slot = row_slots + line * KERNEL_SIZE[2] + w
            tl.store(weights + slot, result.to(weights.dtype.element_ty), mask=attends)


@triton.jit
def _sums_kernel(
    weights, columns, sums,
    column_strides, sum_strides, size, heads, blocks, scale,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr, TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """For some queries, sums over their windows. Grid: (images * blocks * heads,)."""
    WINDOW: tl.constexpr = KERNEL_SIZE[0] * KERNEL_SIZE[1] * KERNEL_SIZE[2]
    image, head, block = _locate(blocks, heads)
    token, is_token = map_tokens(block * TOKENS, size, TOKENS)
    query = in_group(token, DILATION)
    group, length = groups_of(token, size, DILATION)
    start, count = windows_of(query, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
    columns += image * column_strides[0] + head * column_strides[4]
    sums += image * sum_strides[0] + head * sum_strides[4]
    weights += (image * size[0] * size[1] * size[2] * heads + head) * WINDOW
    weights += token_index(token, size, heads * WINDOW, WIDE)
    total = tl.zeros((TOKENS, BLOCK_D), tl.float32)

    for line in range(KERNEL_SIZE[0] * KERNEL_SIZE[1]):
        d = line // KERNEL_SIZE[1]
        h = line % KERNEL_SIZE[1]
        is_line = is_token & (d < count[0]) & (h < count[1])
        for w in range(KERNEL_SIZE[2]):
            attends = is_line & (w < count[2])
            key = (start[0] + d, start[1] + h, start[2] + w)
            slot = line * KERNEL_SIZE[2] + w
            p = tl.load(weights + slot, mask=attends, other=0.0).to(tl.float32)
            offsets = token_offsets(on_map(key, group, DILATION), column_strides, WIDE)
            v = load_tokens(columns, offsets, attends, HEAD_DIM, BLOCK_D).to(tl.float32)
            total += p[:, None] * v

    offsets = token_offsets(token, sum_strides, WIDE)
    store_tokens(sums, offsets, is_token, total * scale, HEAD_DIM, BLOCK_D)


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
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr, TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """For some keys, sums over the queries that attend to them. Grid: (images * blocks * heads,).

    Their number differs near the borders: on each axis, a program goes by its key that has most.
    """
    WINDOW: tl.constexpr = KERNEL_SIZE[0] * KERNEL_SIZE[1] * KERNEL_SIZE[2]
    image, head, block = _locate(blocks, heads)
    token, is_token = map_tokens(block * TOKENS, size, TOKENS)
    key = in_group(token, DILATION)
    group, length = groups_of(token, size, DILATION)
    start_d, end_d = _attending(key[0], length[0], KERNEL_SIZE[0], STRIDE[0], IS_CAUSAL[0])
    start_h, end_h = _attending(key[1], length[1], KERNEL_SIZE[1], STRIDE[1], IS_CAUSAL[1])
    start_w, end_w = _attending(key[2], length[2], KERNEL_SIZE[2], STRIDE[2], IS_CAUSAL[2])
    count_d = tl.max(tl.where(is_token, end_d - start_d, 0))
    count_h = tl.max(tl.where(is_token, end_h - start_h, 0))
    count_w = tl.max(tl.where(is_token, end_w - start_w, 0))
    rows += image * row_strides[0] + head * row_strides[4]
    sums += image * sum_strides[0] + head * sum_strides[4]
    weights += (image * size[0] * size[1] * size[2] * heads + head) * WINDOW
    total = tl.zeros((TOKENS, BLOCK_D), tl.float32)

    for line in range(count_d * count_h):
        d = start_d + line // count_h
        h = start_h + line % count_h
        is_line = is_token & (d < end_d) & (h < end_h)
        slot_d = key[0] - window_start(d, length[0], KERNEL_SIZE[0], STRIDE[0], IS_CAUSAL[0])
        slot_h = key[1] - window_start(h, length[1], KERNEL_SIZE[1], STRIDE[1], IS_CAUSAL[1])
        first_slot = (slot_d * KERNEL_SIZE[1] + slot_h) * KERNEL_SIZE[2] + key[2]
        for column in range(count_w):
            w = start_w + column
            attends = is_line & (w < end_w)
            start = window_start(w, length[2], KERNEL_SIZE[2], STRIDE[2], IS_CAUSAL[2])
            query_token = on_map((d, h, w), group, DILATION)
            index = token_index(query_token, size, heads * WINDOW, WIDE) + first_slot - start
            p = tl.load(weights + index, mask=attends, other=0.0).to(tl.float32)
            offsets = token_offsets(query_token, row_strides, WIDE)
            q = load_tokens(rows, offsets, attends, HEAD_DIM, BLOCK_D).to(tl.float32)
            total += p[:, None] * q

    offsets = token_offsets(token, sum_strides, WIDE)
    store_tokens(sums, offsets, is_token, total * scale, HEAD_DIM, BLOCK_D)


METHOD = unfused.Method(_products_kernel, _sums_kernel, _key_sums_kernel, launch)
supports = unfused.supports
forward = partial(unfused.forward, METHOD)
backward = partial(unfused.backward, METHOD)
