import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import neighborhood_attention.flops  # noqa: F401 (registers the formulas)
from neighborhood_attention import na2d, na2d_qkvpacked


def count(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def three(qkv, kernel_size):
    return na2d(*qkv.unbind(3), kernel_size)


@pytest.mark.parametrize("function", [three, na2d_qkvpacked])
def test_a_window_of_the_whole_map_counts_as_dense_attention(function):
    qkv = torch.randn(2, 5, 6, 3, 2, 8, requires_grad=True)

    def dense():
        query, key, value = (x.flatten(1, 2).transpose(1, 2) for x in qkv.unbind(3))
        return (query @ key.mT).softmax(-1) @ value

    forward = count(dense)
    backward = count(lambda: dense().sum().backward()) - forward
    assert forward > 0
    assert count(lambda: function(qkv, (5, 6))) == forward
    # The backward computes the scores once more: half a forward.
    total = count(lambda: function(qkv, (5, 6)).sum().backward())
    assert total == forward + backward + forward // 2


@pytest.mark.parametrize("function", [three, na2d_qkvpacked])
def test_the_count_grows_with_the_window_and_not_with_the_dilation(function):
    qkv = torch.randn(1, 12, 12, 3, 1, 4)
    small = count(lambda: function(qkv, 3))
    assert count(lambda: function(qkv, 6)) == 4 * small
    assert count(lambda: na2d_qkvpacked(qkv, 3, dilation=4)) == small


def test_grouped_heads_a_value_dimension_and_additional_keys_are_counted():
    query, key = torch.randn(1, 8, 8, 4, 6), torch.randn(1, 8, 8, 2, 6)
    value = torch.randn(1, 8, 8, 2, 10, requires_grad=True)
    keys, values = torch.randn(1, 5, 2, 6), torch.randn(1, 5, 2, 10)

    def call():
        return na2d(query, key, value, 3, additional_keys=keys, additional_values=values)

    pairs = 8 * 8 * 4 * (9 + 5)
    assert count(call) == 2 * pairs * (6 + 10)
    assert count(lambda: call().sum().backward()) == 2 * pairs * (6 + 10 + 3 * 6 + 2 * 10)
