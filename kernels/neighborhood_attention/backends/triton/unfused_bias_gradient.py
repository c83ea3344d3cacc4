"""Gradient of the relative positional bias from that of the logits in memory.

A program owns some neighboring offsets of the last axis, one on each other, and a share of the
tokens: it sums, in a fixed order, what each token has in the slot at that offset. The shares are
added up afterwards.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neighborhood_attention.backends.triton.launch import Launch, Problem
from neighborhood_attention.backends.triton.slots import (
    groups_of,
    in_group,
    in_rows,
    map_tokens,
    pair_slots,
)
from neighborhood_attention.backends.triton.window import token_index
from neighborhood_attention.geometry import Neighborhood

TOKENS = 32
MAX_COLUMNS = 64
TARGET_PROGRAMS = 2048


class BiasGradient:
    """Fills the gradient of a problem's bias."""

    def __init__(self, problem: Problem, window: Neighborhood, settings: dict[str, Any]) -> None:
        batch, *_, heads, _ = problem.query.shape
        *lines, columns = (2 * size - 1 for size in settings["KERNEL_SIZE"])
        block_columns = min(MAX_COLUMNS, triton.next_power_of_2(columns))
        blocks = triton.cdiv(columns, block_columns)
        token_blocks = triton.cdiv(problem.spatial.numel(), TOKENS)
        programs = heads * lines[0] * lines[1] * blocks
        shares = max(1, min(batch * token_blocks, TARGET_PROGRAMS // programs))
        self._shape = (shares, heads, *window.bias_shape)
        self._launch = Launch(
            _bias_gradient_kernel,
            programs * shares,
            {
                **settings, "items": batch * token_blocks, "token_blocks": token_blocks,
                "shares": shares, "blocks": blocks, "TOKENS": TOKENS, "COLUMNS": block_columns,
            },
        )  # fmt: skip

    def fill(self, gradient: Tensor, grad_logits: Tensor) -> None:
        """Fill `gradient`."""
        sums = torch.empty(self._shape, dtype=torch.float32, device=grad_logits.device)
        self._launch(grad_logits, sums)
        gradient.copy_(sums.sum(0))


@triton.jit
def _bias_gradient_kernel(
    grad_logits, sums, items, token_blocks, shares, blocks, size, heads,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A share of some offsets. Grid: (blocks of columns * offsets * heads * shares,)."""
    WINDOW: tl.constexpr = KERNEL_SIZE[0] * KERNEL_SIZE[1] * KERNEL_SIZE[2]
    spans_d: tl.constexpr = 2 * KERNEL_SIZE[0] - 1
    spans_h: tl.constexpr = 2 * KERNEL_SIZE[1] - 1
    spans_w: tl.constexpr = 2 * KERNEL_SIZE[2] - 1
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    line = tl.program_id(0) // blocks
    offset_d = line // spans_h % spans_d - KERNEL_SIZE[0] + 1  # key - query
    offset_h = line % spans_h - KERNEL_SIZE[1] + 1
    offset_w = column - KERNEL_SIZE[2] + 1
    head = line // (spans_d * spans_h) % heads
    share = line // (spans_d * spans_h) // heads
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for item in range(share, items, shares):
        image = (item // token_blocks).to(tl.int64)
        token, is_token = map_tokens(item % token_blocks * TOKENS, size, TOKENS)
        token = in_rows(token)
        query = in_group(token, DILATION)
        _, length = groups_of(token, size, DILATION)
        key = (query[0] + offset_d, query[1] + offset_h, query[2] + offset_w)
        slot, attends = pair_slots(query, key, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
        first = grad_logits + (image * size[0] * size[1] * size[2] * heads + head) * WINDOW
        index = token_index(token, size, heads * WINDOW, WIDE) + slot
        is_slot = attends & is_token[:, None]
        total += tl.load(first + index, mask=is_slot, other=0.0).to(tl.float32)
    block = tl.sum(total, 0)[None, :]
    tl.store(sums + line.to(tl.int64) * spans_w + column, block, mask=column < spans_w)
