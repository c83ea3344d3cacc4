import pytest
import torch

pytest.importorskip("triton")

from neighborhood_attention.backends.triton.launch import (
    block_arguments,
    window_arguments,
    with_contiguous_heads,
)
from neighborhood_attention.geometry import Neighborhood


def test_the_window_is_named_by_axis():
    arguments = window_arguments(Neighborhood((3, 5), (1, 2), (4, 1), (False, True)))
    assert arguments == {
        "KERNEL_SIZE_H": 3, "KERNEL_SIZE_W": 5, "STRIDE_H": 1, "STRIDE_W": 2,
        "DILATION_H": 4, "DILATION_W": 1, "IS_CAUSAL_H": False, "IS_CAUSAL_W": True,
    }  # fmt: skip


def test_blocks_have_a_power_of_two_of_columns_and_no_less_than_16():
    for head_dim, block in ((5, 16), (16, 16), (20, 32), (256, 256)):
        arguments = block_arguments(torch.empty(1, 3, 3, 2, head_dim, device="meta"))
        assert (arguments["HEAD_DIM"], arguments["BLOCK_D"]) == (head_dim, block)


def test_offsets_are_wide_where_any_tensor_exceeds_2_31_elements():
    small = torch.empty(1, 3, 4, 2, 16, device="meta")
    spread = torch.empty_strided(small.shape, (1, 2**30, 32, 16, 1), device="meta")
    assert not block_arguments(small, small)["WIDE"]
    assert block_arguments(small, spread)["WIDE"]
    # An expanded tensor is small itself, but its output is not.
    expanded = torch.empty(1, 1, 1, 2, 256, device="meta").expand(1, 2**11, 2**11, 2, 256)
    assert block_arguments(expanded)["WIDE"]


def test_tensors_with_strided_heads_are_copied_and_others_are_not():
    plain = torch.randn(1, 2, 3, 4, 5)
    view, strided = plain[..., 1:4], plain.transpose(-1, -2)
    results = with_contiguous_heads(plain, view, strided)
    assert results[0] is plain
    assert results[1] is view
    assert torch.equal(results[2], strided)
    assert results[2].stride(-1) == 1
