import dataclasses
from itertools import chain
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import axis_window

pytest.importorskip("triton")

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.triton import tile_table, tiles
from neighborhood_attention.backends.triton.launch import Problem, describe
from neighborhood_attention.backends.triton.tile import Tile
from neighborhood_attention.backends.triton.tile_table import Key
from neighborhood_attention.backends.triton.tiles import (
    HEAVIEST,
    HEAVY,
    HUGE,
    LARGE_HALF,
    LARGE_SINGLE,
    LIGHT,
    NARROW,
    WHOLE_GROUP,
    WINDOWED,
    TilePlan,
    choose_tiles,
    count_scores,
    default_tiles,
    fitted,
    plan_tiles,
    three_axes,
    tile_axis,
    tiles_by_rule,
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
@given(axes(), st.sampled_from([1, 2, 4, 8]), st.booleans())
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
        for tile in (1, 2, 4):  # of single keys the border's second is like the interior's
            axis = tile_axis(length, 7, 1, dilation, False, tile, of_keys)
            assert axis.types <= 15 * axis.classes


def test_problems_of_fewer_axes_are_flat_in_the_first():
    assert three_axes((5, 6, 7)) == (5, 6, 7)
    assert three_axes((6, 7)) == (1, 6, 7)
    assert three_axes([False], True) == (True, True, False)


def test_a_plan_covers_the_map_and_the_windows():
    window = Neighborhood((3, 7), (1, 1), (2, 1), (False, False))
    plan = TilePlan(WINDOWED.forward, window, (20, 50), of_keys=False)  # tiles 4x8, strips 2x16
    # On the second axis 4 + 3 - 1 keys in strips of 2, on the third 8 + 7 - 1 in strips of 16.
    assert plan.strips == (1, 3, 1)
    assert plan.positions == 3 * 7  # tiles of 10 rows * tiles of 50 columns
    assert plan.programs == 2 * 3 * 7  # for each dilation group


def test_a_plan_with_a_walk_keeps_strips_in_a_ring():
    window = Neighborhood((3, 7), (1, 1), (1, 1), (False, False))
    plans = (
        TilePlan(tile, window, (20, 50), of_keys=False)
        for tile in (WINDOWED.forward, WINDOWED.ring_forward)
    )
    assert [plan.in_ring for plan in plans] == [False, True]


def test_a_plan_has_positions_for_both_lengths_of_groups():
    # Groups of 5 and 4 tokens on the last axis: 3 and 2 tiles of 2; of 2 on the others.
    window = Neighborhood((1, 2, 3), (1, 1, 1), (1, 1, 2), (False, False, True))
    tile = dataclasses.replace(LIGHT[3].forward, tile=(2, 2, 2), strip=(1, 1, 4))
    plan = TilePlan(tile, window, (2, 2, 9), of_keys=True)
    assert [axis.tiles for axis in plan.axes] == [1, 1, 3]
    assert plan.positions == 2 * 3
    assert plan.programs == 2 * 3


def test_a_plan_is_made_once():
    window = Neighborhood((3,), (1,), (1,), (False,))
    of_queries, of_keys = (
        plan_tiles(LIGHT[1].forward, window, (9,), of_keys) for of_keys in (False, True)
    )
    assert of_queries is plan_tiles(LIGHT[1].forward, window, (9,), False)
    assert (of_queries.of_keys, of_keys.of_keys) == (False, True)


@pytest.mark.parametrize(
    ("spatial", "head_dim", "dtype", "dilation", "expected"),
    [
        ((56, 56), 32, torch.bfloat16, 1, WINDOWED),
        ((7, 8), 32, torch.bfloat16, 1, WHOLE_GROUP),
        ((56, 56), 32, torch.float16, 7, WHOLE_GROUP),
        ((57, 56), 32, torch.float16, 7, NARROW),
            ((57, 113), 32, torch.float16, 7, WINDOWED),
        ((7, 7), 32, torch.float32, 1, WHOLE_GROUP),
        ((7, 7), 64, torch.bfloat16, 1, LIGHT[2]),
        ((56, 56), 16, torch.float32, 1, LIGHT[2]),
        ((56, 56), 33, torch.float32, 1, HEAVY[2]),
        ((56, 56), 65, torch.bfloat16, 1, LARGE_HALF[2]),
        ((56, 56), 129, torch.bfloat16, 1, HUGE[2]),
        ((56,), 64, torch.bfloat16, 1, LIGHT[1]),
        ((56,), 64, torch.float32, 1, HEAVY[1]),
        ((56,), 65, torch.float32, 1, LARGE_SINGLE[1]),
        ((7, 7, 7), 32, torch.float16, 1, LIGHT[3]),
        ((7, 7, 7), 256, torch.float16, 1, HUGE[3]),
    ],
)  # fmt: skip
def test_the_tiles_follow_the_axes_the_head_and_the_dilation_group(
    spatial, head_dim, dtype, dilation, expected
):
    query = torch.empty(1, *spatial, 2, head_dim, dtype=dtype, device="meta")
    dims = len(spatial)
    window = Neighborhood((7,) * dims, (1,) * dims, (dilation,) * dims, (False,) * dims)
    assert tiles_by_rule(Problem.of(describe(Inputs(query, query, query))), window) is expected


@pytest.mark.parametrize(("head_dim", "is_tf32"), [(16, False), (32, True)], ids=str)
def test_three_products_make_heads_heavier(head_dim, is_tf32, capability, tf32):
    capability("8.6")
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    light, other, heaviest = (
        torch.empty(1, 99, 2, n * head_dim, dtype=torch.float32, device="meta") for n in (1, 2, 4)
    )
    window = Neighborhood((7,), (1,), (1,), (False,))
    assert tiles_by_rule(Problem.of(describe(Inputs(light, light, light))), window) is LIGHT[1]
    assert tiles_by_rule(Problem.of(describe(Inputs(other, other, other))), window) is HEAVY[1]
    expected = LARGE_SINGLE[1] if is_tf32 else HEAVIEST[1]
    problem = Problem.of(describe(Inputs(heaviest, heaviest, heaviest)))
    assert tiles_by_rule(problem, window) is expected


def test_the_larger_of_both_head_dimensions_decides():
    query, value = (torch.empty(1, 9, 9, 2, d, device="meta") for d in (32, 64))
    window = Neighborhood((3, 3), (1, 1), (1, 1), (False, False))
    assert tiles_by_rule(Problem.of(describe(Inputs(query, query, value))), window) is HEAVY[2]
    assert tiles_by_rule(Problem.of(describe(Inputs(value, value, query))), window) is HEAVY[2]


@given(axes(), axes(), st.sampled_from([(4, 8), (8, 2)]), st.booleans())
@settings(max_examples=50)
def test_scores_are_those_of_whole_strips_for_whole_tiles(height, width, sizes, of_keys):
    (rows, columns), (high, wide) = sizes, sizes[::-1]
    both = zip(height, width, strict=True)
    spatial, kernel_size, stride, dilation, is_causal = map(tuple, both)
    window = Neighborhood(kernel_size, stride, dilation, is_causal)
    expected = 1
    for axis, tile, strip in ((height, rows, high), (width, columns, wide)):
        counts = []
        for group in range(axis[3]):
            met = met_tokens(*axis, group, of_keys)
            tiles = [{*chain(*met[i : i + tile])} for i in range(0, len(met), tile)]
            extents = [max(tokens) - min(tokens) + 1 for tokens in tiles]
            counts.append((len(tiles), max(extents)))
        most, extent = (max(numbers) for numbers in zip(*counts, strict=True))
        expected *= most * tile * -(-extent // strip) * strip
    tile, strip = (1, rows, columns), (1, high, wide)
    assert count_scores(tile, strip, window, spatial, of_keys) == expected


def test_tiles_take_the_shape_that_computes_least():
    eleven = Neighborhood((11, 11), (1, 1), (1, 1), (False, False))
    chosen = fitted(HEAVY[2], eleven, (24, 24))
    assert chosen.forward == dataclasses.replace(
        HEAVY[2].forward, tile=chosen.forward.tile, strip=chosen.forward.strip
    )
    for kernel in ("forward", "query_gradient", "key_gradient", "bias_gradient"):
        tile, plain = getattr(chosen, kernel), getattr(HEAVY[2], kernel)
        assert (prod(tile.tile), prod(tile.strip)) == (prod(plain.tile), prod(plain.strip))
        fewest = min(
            count_scores((1, a, 16 // a), (1, b, 32 // b), eleven, (24, 24), kernel[0] == "k")
            for a in (1, 2, 4, 8, 16)
            for b in (1, 2, 4, 8, 16, 32)
        )
        scores = count_scores(tile.tile, tile.strip, eleven, (24, 24), kernel[0] == "k")
        assert scores == fewest


def test_fitted_tiles_hold_whole_strides():
    window = Neighborhood((13, 3), (1, 2), (1, 1), (False, False))
    tile = fitted(WINDOWED, window, (64, 4096)).key_gradient
    assert tile.tile[2] % 2 == 0
    uneven = Neighborhood((13, 13), (3, 4), (1, 1), (False, False))
    assert fitted(WINDOWED, uneven, (64, 4096)).key_gradient.tile[2] % 4 == 0


def test_flat_axes_stay_flat_and_a_tile_that_fits_keeps_its_shape():
    line = Neighborhood((11,), (1,), (1,), (False,))
    assert fitted(LIGHT[1], line, (24,)) is LIGHT[1]
    assert fitted(WINDOWED, SEVEN, (56, 56)) is WINDOWED
    chosen = fitted(WINDOWED, Neighborhood((13, 3), (1, 1), (1, 1), (False, False)), (56, 56))
    assert chosen.forward != WINDOWED.forward
    assert chosen.forward.tile[0] == chosen.forward.strip[0] == 1
    narrow = Neighborhood((8, 2, 2), (1, 1, 1), (1, 1, 1), (False,) * 3)
    tile = fitted(LIGHT[3], narrow, (16, 24, 24)).key_gradient
    assert tile.tile[0] * tile.strip[0] > 8  # along the window


@pytest.fixture
def capability(monkeypatch):
    """capability("9.0"): of all GPUs from now on."""

    def set_capability(name):
        monkeypatch.setattr(tile_table, "capability", lambda device: name)

    yield set_capability
    tiles._warn_untuned.cache_clear()


def problem_of(side, dtype=torch.bfloat16):
    query = torch.empty(1, side, side, 2, 32, dtype=dtype, device="meta")
    return Problem.of(describe(Inputs(query, query, query)))


SEVEN = Neighborhood((7, 7), (1, 1), (1, 1), (False, False))


def test_the_table_stands_above_the_rule(capability, monkeypatch):
    capability("9.0")
    problem, tile = problem_of(20), Tile((1, 2, 4), (1, 2, 4), num_warps=2)
    entry = {"forward": tile, "query_bias_gradient": None}
    monkeypatch.setitem(tile_table.table(), Key.of(problem, SEVEN), entry)
    assert choose_tiles(problem, SEVEN) == dataclasses.replace(WINDOWED, **entry)
    assert choose_tiles(problem_of(21), SEVEN) is WINDOWED
    single = problem_of(20, torch.float32)
    assert tiles_by_rule(single, SEVEN) is HEAVY[2]  # of three products
    assert choose_tiles(single, SEVEN) == default_tiles(single, SEVEN)


@pytest.mark.parametrize("entry", [{}, {"ring_forward": None}], ids=str)
def test_an_entry_leaves_the_ring_to_the_rule_or_takes_it_out_of_use(
    entry, capability, monkeypatch
):
    capability("9.0")
    problem = problem_of(20)
    entry = {"forward": Tile((1, 2, 4), (1, 2, 4), num_warps=2), **entry}
    monkeypatch.setitem(tile_table.table(), Key.of(problem, SEVEN), entry)
    chosen = choose_tiles(problem, SEVEN)
    assert chosen.ring_forward == entry.get("ring_forward", WINDOWED.ring_forward)
    assert chosen.forward == entry["forward"]


def test_a_gpu_that_is_not_in_the_table_is_named_once(capability, caplog):
    for name in ("9.0", None, "8.6", "8.6", "8.9"):
        capability(name)
        assert choose_tiles(problem_of(57), SEVEN) == WINDOWED  # in no table
        is_tuned = choose_tiles(problem_of(56), SEVEN) != WINDOWED
        assert is_tuned == (name == "9.0")
    assert [(r.levelname, r.args) for r in caplog.records] == [
        ("WARNING", ("8.6",)),
        ("WARNING", ("8.9",)),
    ]
