"""The slots of attention weights, by small kernels of their own, against the definition."""

import pytest
import torch
from oracle import axis_window

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from neighborhood_attention.backends.triton.slots import (  # noqa: E402
    groups_of,
    in_group,
    in_rows,
    map_tokens,
    on_map,
    pair_slots,
    windows_of,
)
from neighborhood_attention.backends.triton.window import block_positions  # noqa: E402

pytestmark = pytest.mark.interpreter


@triton.jit
def _slots(
    keys, back, size, SLOTS: tl.constexpr, TOKENS: tl.constexpr,
    KERNEL_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    DILATION: tl.constexpr, IS_CAUSAL: tl.constexpr,
):  # fmt: skip
    """[TOKENS, SLOTS]: the key in each slot, flat on the map, and that key's slot."""
    token, is_token = map_tokens(0, size, TOKENS)
    token = in_rows(token)
    query = in_group(token, DILATION)
    group, length = groups_of(token, size, DILATION)
    slot = tl.arange(0, SLOTS)[None, :]
    first, count = windows_of(query, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
    step = block_positions(KERNEL_SIZE, slot)
    is_key = slot < KERNEL_SIZE[0] * KERNEL_SIZE[1] * KERNEL_SIZE[2]
    is_key &= (step[0] < count[0]) & (step[1] < count[1]) & (step[2] < count[2])
    key = (first[0] + step[0], first[1] + step[1], first[2] + step[2])
    found, attends = pair_slots(query, key, length, KERNEL_SIZE, STRIDE, IS_CAUSAL)
    d, h, w = on_map(key, group, DILATION)
    index = tl.arange(0, TOKENS)[:, None] * SLOTS + slot
    mask = is_key & is_token[:, None]
    tl.store(keys + index, (d * size[1] + h) * size[2] + w, mask=mask)
    tl.store(back + index, tl.where(attends, found, -2), mask=mask)


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "dilation", "is_causal"),
    [
        ((1, 1, 15), (1, 1, 4), (1, 1, 3), (1, 1, 2), (0, 0, 0)),
        ((1, 5, 6), (1, 3, 2), (1, 2, 1), (1, 1, 3), (0, 1, 0)),
        ((3, 2, 5), (2, 2, 3), (1, 1, 2), (1, 1, 1), (0, 0, 1)),
    ],
    ids=["1d", "2d", "3d"],
)
def test_each_slot_holds_the_key_of_the_definition(
    size, kernel_size, stride, dilation, is_causal, device
):
    tokens, slots = torch.Size(size).numel(), torch.Size(kernel_size).numel()
    keys, back = (torch.full((tokens, 16), -1, device=device) for _ in range(2))
    _slots[(1,)](keys, back, size, 16, 32, kernel_size, stride, dilation, is_causal)
    settings = list(zip(size, kernel_size, stride, dilation, is_causal, strict=True))
    for token, position in enumerate(torch.cartesian_prod(*map(torch.arange, size)).tolist()):
        windows = [axis_window(i, *axis) for i, axis in zip(position, settings, strict=True)]
        expected = [-1] * 16
        for d, (key_d, _) in enumerate(windows[0]):
            for h, (key_h, _) in enumerate(windows[1]):
                for w, (key_w, _) in enumerate(windows[2]):
                    slot = (d * kernel_size[1] + h) * kernel_size[2] + w
                    expected[slot] = (key_d * size[1] + key_h) * size[2] + key_w
        assert keys[token].tolist() == expected
        assert expected[slots:] == [-1] * (16 - slots)
        assert back[token].tolist() == [
            -1 if key < 0 else slot for slot, key in enumerate(expected)
        ]
