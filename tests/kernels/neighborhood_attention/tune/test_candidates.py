from itertools import product
from math import prod

import pytest

pytest.importorskip("triton")

from neighborhood_attention.backends.triton.tile import Tile
from neighborhood_attention.backends.triton.tile_table import KERNELS
from neighborhood_attention.backends.triton.tiles import NARROW, WINDOWED
from neighborhood_attention.tune.candidates import (
    MAX_WASTE,
    can_run,
    candidates,
    scores_of_a_token,
)
from neighborhood_attention.tune.passes import Pass, Shape, Work

H100 = 132  # multiprocessors


def find(kernel, side, dims=2, precision="half", head_dim=32, kernel_size=7, dilation=1):
    sizes = [(n,) * dims for n in (side, kernel_size, dilation)]
    shape = Shape(sizes[0], 4, head_dim, *sizes[1:], batch=2)
    problem = Pass(Work(shape, precision, (kernel,)), "meta").problem
    return candidates(kernel, problem, shape.window, H100), problem, shape.window


ROW, ROWS, HALF, TALL = (1, 1, 16), (1, 2, 16), (1, 4, 8), (1, 4, 16)


@pytest.mark.parametrize(
    ("kernel", "side", "tile"),
    [
        ("forward", 56, Tile(HALF, ROWS, 1, 2, 128)),
        ("forward", 28, Tile(HALF, ROW, 1, 3, 96)),
        ("forward", 14, Tile(ROWS, ROW, 1, 3, 96)),
        ("key_gradient", 56, Tile(HALF, ROWS, 1, 2, 168)),
        ("key_gradient", 14, Tile(ROWS, ROWS, 1, 2, 168)),
        ("query_bias_gradient", 56, Tile((1, 2, 8), TALL, 2, 2, 168, 792)),
        ("whole_group", 7, Tile((1, 8, 8), (1, 8, 8), 4, 2, None, 264)),
        ("ring_forward", 56, WINDOWED.ring_forward),
        ("ring_forward", 14, NARROW.ring_forward),
    ],
    ids=str,
)
def test_the_tiles_that_proved_good_are_tried(kernel, side, tile):
    assert tile in find(kernel, side)[0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_candidates_can_run_and_waste_little(kernel, dims):
    found, problem, window = find(kernel, 14, dims)
    # 14 tokens an axis are too many for a tile, and a window of 7x7x7 for two strips.
    cannot = kernel == "whole_group" or (kernel == "query_bias_gradient" and dims == 3)
    cannot |= kernel == "ring_forward" and dims != 2
    assert bool(found) != cannot
    assert len(set(found)) == len(found)
    scores = [scores_of_a_token(kernel, tile, window, problem.spatial) for tile in found]
    assert all(can_run(kernel, tile, problem, window) for tile in found)
    assert max(scores, default=0) <= MAX_WASTE * min(scores, default=0)


def test_scores_are_counted_with_the_padding():
    shape = Shape((8, 20), 1, 32, (3, 3), (1, 1), 1)
    # Two tiles of 16 columns for 20; strips of 16 for 18 keys a row, 6 rows in pairs.
    tile = Tile((1, 4, 16), (1, 2, 16), 1)
    per_tile = 64 * 3 * 2 * 32
    assert scores_of_a_token("forward", tile, shape.window, shape.map) == 4 * per_tile / 160


def test_large_heads_get_fewer_scores_a_warp():
    most = {}
    for head_dim in (32, 128):
        listed, *_ = find("forward", 56, head_dim=head_dim)
        most[head_dim] = max(prod(t.tile) * prod(t.strip) // t.num_warps for t in listed)
    assert most == {32: 1024, 128: 512}


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_heads_of_fp32_have_all_registers_and_as_many_scores_a_warp(precision):
    listed, *_ = find("key_gradient", 56, precision=precision)
    assert {tile.max_registers for tile in listed} == {None}
    assert Tile(HALF, ROWS, 1) in listed


def test_a_forward_of_whole_groups_tries_several_programs():
    programs = {side: {tile.programs for tile in find("forward", side)[0]} for side in (7, 56)}
    assert programs == {7: {2048, 2 * H100, 4 * H100, 8 * H100}, 56: {2048}}


def test_a_ring_is_tried_with_several_walks():
    found = [tile for tile in find("ring_forward", 56)[0] if tile.tile == HALF]
    assert {(tile.max_registers, tile.walk) for tile in found} == {
        *product((None, 128), (4, 7, 14))
    }


@pytest.mark.parametrize(
    "change",
    [{"precision": "tf32"}, {"head_dim": 24}, {"kernel_size": 11}],
    ids=str,
)
def test_a_ring_is_not_tried_where_its_kernel_cannot_run(change):
    assert not find("ring_forward", 56, **change)[0]


def test_groups_of_one_tile_alone_take_all_gradients_at_once():
    assert find("whole_group", 56, dilation=8)[0]
    assert find("whole_group", 57, dilation=8)[0]
    assert not find("whole_group", 56)[0]
