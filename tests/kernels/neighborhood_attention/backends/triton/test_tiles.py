import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import axis_window

from neighborhood_attention.backends.triton.tiles import (
    LARGE_HEADS,
    WHOLE_GROUP,
    WINDOWED,
    TilePlan,
    choose_tiles,
    tile_axis,
)
from neighborhood_attention.geometry import Neighborhood


def met_tokens(length, kernel_size, stride, dilation, is_causal, group, of_keys):
    """For each token of a dilation group, the tokens of the group that it meets."""
    positions = range(group, length, dilation)
    windows = [axis_window(i, length, kernel_size, stride, dilation, is_causal) for i in positions]
    seen = [[key // dilation for key, _ in window] for window in windows]
    if not of_keys:
        return seen
    return [[q for q, keys in enumerate(seen) if k in keys] for k in range(len(positions))]


def type_of(tile, tiles, axis):
    """As `TileAxis` documents the types: some at the front, some at the back, one between."""
    if tile < axis.front:
        return "front", tile
    return ("back", tiles - 1 - tile) if tiles - 1 - tile < axis.back else "between"


@st.composite
def axes(draw):
    kernel_size, dilation = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    length = draw(st.integers(kernel_size * dilation, 60))
    return length, kernel_size, draw(st.integers(1, kernel_size)), dilation, draw(st.booleans())


@settings(max_examples=400)
@given(axes(), st.sampled_from([2, 4, 8]), st.booleans())
def test_tiles_of_one_type_meet_the_same_tokens(problem, tile, of_keys):
    dilation = problem[3]
    axis = tile_axis(*problem, tile, of_keys)
    known, extent, lengths, most = {}, 0, set(), 0
    for group in range(dilation):
        met = met_tokens(*problem, group, of_keys)
        tiles = -(-len(met) // tile)
        lengths.add(len(met))
        most = max(most, tiles)
        for t in range(tiles):
            first = t * tile
            members = met[first : first + tile]
            relative = [[token - first for token in tokens] for tokens in members]
            name = len(met), type_of(t, tiles, axis)
            assert known.setdefault(name, relative) == relative, (group, t)
            extent = max(extent, max(map(max, members)) - min(map(min, members)) + 1)
    assert axis.extent == extent
    assert axis.tiles == most
    assert axis.classes == len(lengths)
    assert len(known) <= axis.types


@pytest.mark.parametrize(("length", "dilation"), [(56, 1), (512, 1), (400, 8), (403, 8)])
def test_the_number_of_types_does_not_grow_with_the_map(length, dilation):
    for of_keys in (False, True):
        axis = tile_axis(length, 7, 1, dilation, False, 8, of_keys)
        assert axis.types <= 4 * axis.classes


def test_a_plan_covers_the_map_and_the_windows():
    window = Neighborhood((3, 7), (1, 1), (2, 1), (False, False))
    plan = TilePlan(WINDOWED.forward, window, (20, 50), of_keys=False)  # tiles 4x8, strips 2x16
    assert plan.programs == 2 * 3 * 7  # groups * tiles of 10 rows * tiles of 50 columns
    assert plan.column_strips == 1  # 8 + 7 - 1 keys
    assert plan.strips == 3  # 4 + 3 - 1 keys in strips of 2 rows


@pytest.mark.parametrize(
    ("shape", "dtype", "dilation", "expected"),
    [
        ((1, 56, 56, 2, 32), torch.bfloat16, 1, WINDOWED),
        ((1, 7, 8, 2, 32), torch.bfloat16, 1, WHOLE_GROUP),
        ((1, 56, 56, 2, 32), torch.float16, 7, WHOLE_GROUP),
        ((1, 57, 56, 2, 32), torch.float16, 7, WINDOWED),
        ((1, 7, 7, 2, 16), torch.float32, 1, WHOLE_GROUP),
        ((1, 7, 7, 2, 64), torch.bfloat16, 1, LARGE_HEADS),
        ((1, 56, 56, 2, 32), torch.float32, 1, LARGE_HEADS),
    ],
)
def test_the_tiles_follow_the_head_and_the_dilation_group(shape, dtype, dilation, expected):
    query = torch.empty(shape, dtype=dtype, device="meta")
    window = Neighborhood((7, 7), (1, 1), (dilation, dilation), (False, False))
    assert choose_tiles(query, window) is expected
