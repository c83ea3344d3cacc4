import itertools

from oracle import axis_window

from neighborhood_attention.geometry import (
    Neighborhood,
    attending_end,
    attending_start,
    bias_index,
    group_length,
    window_end,
    window_start,
)

AXES = [
    (length, kernel_size, stride, is_causal)
    for length in range(1, 15)
    for kernel_size in range(1, length + 1)
    for stride in range(1, kernel_size + 1)
    for is_causal in (False, True)
]


def windows(length, kernel_size, stride, is_causal):
    return [axis_window(i, length, kernel_size, stride, 1, is_causal) for i in range(length)]


def test_windows_agree_with_the_definition():
    for length, kernel_size, stride, is_causal in AXES:
        for query, keys in enumerate(windows(length, kernel_size, stride, is_causal)):
            start = window_start(query, length, kernel_size, stride, is_causal)
            end = window_end(query, start, kernel_size, is_causal)
            assert list(range(start, end)) == [key for key, _ in keys]
            assert [bias_index(query, key, kernel_size) for key, _ in keys] == [
                index for _, index in keys
            ]


def test_attending_queries_invert_the_windows():
    for length, kernel_size, stride, is_causal in AXES:
        seen = windows(length, kernel_size, stride, is_causal)
        for key in range(length):
            start = attending_start(key, kernel_size, stride, is_causal)
            end = attending_end(key, length, kernel_size, stride, is_causal)
            attending = [query for query, keys in enumerate(seen) if key in dict(keys)]
            assert list(range(start, end)) == attending, (
                length,
                kernel_size,
                stride,
                is_causal,
                key,
            )


def test_group_length_counts_the_tokens_of_a_group():
    for length, dilation in itertools.product(range(1, 12), range(1, 5)):
        for group in range(min(length, dilation)):
            assert group_length(group, length, dilation) == len(range(group, length, dilation))


def test_a_window_is_made_again_from_its_flat_list():
    window = Neighborhood((3, 5, 2), (1, 4, 2), (2, 1, 3), (True, False, True))
    assert window.flat == (3, 5, 2, 1, 4, 2, 2, 1, 3, 1, 0, 1)
    again = Neighborhood.from_flat(window.flat)
    assert again == window
    assert [type(flag) for flag in again.is_causal] == [bool] * 3
    assert (window.dims, window.size, window.extent) == (3, 30, (6, 5, 6))
    assert window.bias_shape == (5, 9, 3)
