"""Attention weights in memory, [B, *spatial, heads, window]: which key stands in which slot.

A window's slots are its keys in the map's order; the slot of a key on an axis is
`key - window_start`. Positions are those of a dilation group; what is called a token is a position
on the map. Both are tuples of three axes, of blocks that broadcast against each other.
"""

import triton
import triton.language as tl

from neighborhood_attention.backends.triton.window import (
    bias_index,
    group_length,
    window_end,
    window_start,
)


@triton.jit
def map_tokens(first, size, TOKENS: tl.constexpr):
    """Some consecutive tokens of a map, and which of them exist."""
    i = first + tl.arange(0, TOKENS)
    token = (i // (size[1] * size[2]), i // size[2] % size[1], i % size[2])
    return token, i < size[0] * size[1] * size[2]


@triton.jit
def in_group(token, DILATION: tl.constexpr):
    """Positions of tokens in their dilation groups."""
    return token[0] // DILATION[0], token[1] // DILATION[1], token[2] // DILATION[2]


@triton.jit
def groups_of(token, size, DILATION: tl.constexpr):
    """The dilation groups of tokens, and the groups' lengths."""
    group = (token[0] % DILATION[0], token[1] % DILATION[1], token[2] % DILATION[2])
    length = (
        group_length(group[0], size[0], DILATION[0]),
        group_length(group[1], size[1], DILATION[1]),
        group_length(group[2], size[2], DILATION[2]),
    )
    return group, length


@triton.jit
def on_map(position, group, DILATION: tl.constexpr):
    """The tokens at positions of dilation groups."""
    return (
        position[0] * DILATION[0] + group[0],
        position[1] * DILATION[1] + group[1],
        position[2] * DILATION[2] + group[2],
    )


@triton.jit
def in_rows(block):
    """Blocks [n] of all axes as [n, 1]."""
    return block[0][:, None], block[1][:, None], block[2][:, None]


@triton.jit
def in_columns(block):
    """Blocks [n] of all axes as [1, n]."""
    return block[0][None, :], block[1][None, :], block[2][None, :]


@triton.jit
def axis_slots(
    query, key, length, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, IS_CAUSAL: tl.constexpr
):
    """Slots of pairs on one axis, and which pairs attend."""
    start = window_start(query, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
    return key - start, (key >= start) & (key < window_end(query, start, KERNEL_SIZE, IS_CAUSAL))


@triton.jit
def pair_slots(
    query, key, length, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, IS_CAUSAL: tl.constexpr
):
    """Slots of pairs of a query and a key, and which pairs attend."""
    slot_d, attends_d = axis_slots(
        query[0], key[0], length[0], KERNEL_SIZE[0], STRIDE[0], IS_CAUSAL[0]
    )
    slot_h, attends_h = axis_slots(
        query[1], key[1], length[1], KERNEL_SIZE[1], STRIDE[1], IS_CAUSAL[1]
    )
    slot_w, attends_w = axis_slots(
        query[2], key[2], length[2], KERNEL_SIZE[2], STRIDE[2], IS_CAUSAL[2]
    )
    slot = (slot_d * KERNEL_SIZE[1] + slot_h) * KERNEL_SIZE[2] + slot_w
    return slot, attends_d & attends_h & attends_w


@triton.jit
def windows_of(
    query, length, KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr, IS_CAUSAL: tl.constexpr
):
    """The first keys of queries' windows, and their numbers of keys, constant if not causal."""
    d = window_start(query[0], length[0], KERNEL_SIZE[0], STRIDE[0], IS_CAUSAL[0])
    h = window_start(query[1], length[1], KERNEL_SIZE[1], STRIDE[1], IS_CAUSAL[1])
    w = window_start(query[2], length[2], KERNEL_SIZE[2], STRIDE[2], IS_CAUSAL[2])
    count = (
        window_end(query[0], d, KERNEL_SIZE[0], IS_CAUSAL[0]) - d,
        window_end(query[1], h, KERNEL_SIZE[1], IS_CAUSAL[1]) - h,
        window_end(query[2], w, KERNEL_SIZE[2], IS_CAUSAL[2]) - w,
    )
    return (d, h, w), count


@triton.jit
def weights_of(dots, scale, rpb, lse, head, query, key, attends, KERNEL_SIZE: tl.constexpr):
    """From products of pairs to logits, or to probabilities where the rows' `lse` is known."""
    weights = dots * scale
    if rpb is not None:
        spans_d: tl.constexpr = 2 * KERNEL_SIZE[0] - 1
        spans_h: tl.constexpr = 2 * KERNEL_SIZE[1] - 1
        spans_w: tl.constexpr = 2 * KERNEL_SIZE[2] - 1
        index = bias_index(query[0], key[0], KERNEL_SIZE[0]) * spans_h
        index = (index + bias_index(query[1], key[1], KERNEL_SIZE[1])) * spans_w
        index += bias_index(query[2], key[2], KERNEL_SIZE[2])
        rpb += head * (spans_d * spans_h * spans_w)
        weights += tl.load(rpb + index, mask=attends, other=0.0).to(tl.float32)
    if lse is not None:
        weights = tl.exp(weights - lse)
    return weights
