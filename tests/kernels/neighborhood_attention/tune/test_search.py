from dataclasses import replace
from math import inf

import pytest

pytest.importorskip("triton")

from neighborhood_attention.backends.triton.tile import Tile
from neighborhood_attention.backends.triton.tiles import WHOLE_GROUP, WINDOWED
from neighborhood_attention.tune.passes import FORWARD_KERNELS, Pass, Shape, Timing, Work
from neighborhood_attention.tune.search import Route, fastest, find_routes, is_clearly_faster

BACKWARD = "query_gradient", "key_gradient", "bias_gradient", "query_bias_gradient", "whole_group"


def tile(warps):
    return Tile((1, 4, 8), (1, 2, 16), warps)


def routes_of(side, kernels=BACKWARD, present=WINDOWED, kernel_size=7, dilation=1):
    shape = Shape((side,) * 2, 2, 32, (kernel_size,) * 2, (dilation,) * 2, 2)
    work = Work(shape, "half", kernels)
    return find_routes(work, Pass(work, "meta").problem, present, 132)


def test_each_kernel_keeps_the_best_for_the_next():
    # 10 us for a kernel, less its warps; the key gradient likes 2 warps beside 4 of the forward.
    def time(tiles, trial, limit):
        key = 5 if (tiles.forward, tiles.key_gradient) == (tile(4), tile(2)) else 10
        return 10 - tiles.forward.num_warps + key

    options = {"forward": [tile(2), tile(4)], "key_gradient": [tile(8), tile(2)]}
    found, best = fastest([Route(WINDOWED, options)], time)
    assert found == replace(WINDOWED, forward=tile(4), key_gradient=tile(2))
    assert best == 11


def test_a_time_is_asked_for_with_the_trial_that_was_compiled_and_the_best_so_far():
    asked = []

    def time(tiles, trial, limit):
        asked.append((trial, limit))
        return 20.0 - len(asked)

    route = Route(WINDOWED, {"forward": [tile(2), tile(4)], "key_gradient": [tile(8)]})
    fastest([route], time)
    assert [trial for trial, _ in asked] == [*route.trials]
    assert [limit for _, limit in asked] == [inf, 19, 18, 17]


def test_a_kernel_of_two_routes_is_searched_once():
    asked = []

    def time(tiles, trial, limit):
        asked.append(tiles.key_gradient)
        return 100.0 - tiles.key_gradient.num_warps - tiles.forward.num_warps

    options = {"forward": [tile(2)], "key_gradient": [tile(4), tile(8), tile(2)]}
    other = Route(replace(WINDOWED, forward=tile(16)), {"key_gradient": options["key_gradient"]})
    found, _ = fastest([Route(WINDOWED, options), other], time)
    assert found == replace(other.start, key_gradient=tile(8))
    assert asked[-2:] == [WINDOWED.key_gradient, tile(8)]
    assert len(asked) == 2 + 3 + 2


def test_the_faster_route_wins_and_failures_lose():
    other = replace(WINDOWED, query_bias_gradient=None)
    times = {id(WINDOWED): inf, id(other): 7.0}
    routes = [Route(WINDOWED, {}), Route(other, {})]
    found, best = fastest(routes, lambda tiles, trial, limit: times[id(tiles)])
    assert found is other
    assert best == 7


def test_the_plain_forward_is_tuned_beside_the_one_in_a_ring():
    ring, plain = routes_of(56, FORWARD_KERNELS)
    assert list(ring.options) == ["ring_forward"]
    assert ring.start.ring_forward == WINDOWED.ring_forward
    assert list(plain.options) == ["forward"]
    assert (plain.start.forward, plain.start.ring_forward) == (WINDOWED.forward, None)


def test_the_forward_in_a_ring_is_tuned_beside_the_one_in_use():
    plain, ring = routes_of(56, FORWARD_KERNELS, replace(WINDOWED, ring_forward=None))
    assert list(plain.options) == ["forward"]
    assert (plain.start.forward, plain.start.ring_forward) == (WINDOWED.forward, None)
    assert list(ring.options) == ["ring_forward"]
    assert ring.start.ring_forward == ring.options["ring_forward"][0]


def test_the_other_forward_is_tuned_where_the_one_in_a_ring_cannot_run():
    (route,) = routes_of(56, FORWARD_KERNELS, kernel_size=11)
    assert list(route.options) == ["forward"]
    assert route.start.ring_forward is None


def test_the_present_way_is_tuned_alone_where_it_is_the_best():
    (route,) = routes_of(56)
    assert list(route.options) == ["query_bias_gradient", "key_gradient"]
    (route,) = routes_of(56, dilation=8, present=WHOLE_GROUP)
    assert list(route.options) == ["whole_group"]


def test_a_better_way_is_tuned_beside_the_present_one():
    separate, summed = routes_of(24, kernel_size=11)  # too many strips for the present tiles
    assert list(separate.options) == ["query_gradient", "bias_gradient", "key_gradient"]
    assert separate.start.query_bias_gradient is None
    assert list(summed.options) == ["query_bias_gradient", "key_gradient"]
    assert summed.start.query_bias_gradient in summed.options["query_bias_gradient"]
    *_, whole = routes_of(56, dilation=8, present=replace(WHOLE_GROUP, whole_group=None))
    assert list(whole.options) == ["whole_group"]


def test_only_kernels_asked_for_are_tuned():
    (route,) = routes_of(24, ("key_gradient",), kernel_size=11)
    assert list(route.options) == ["key_gradient"]
    (route,) = routes_of(56, ("forward",), replace(WINDOWED, ring_forward=None))
    assert list(route.options) == ["forward"]
    (route,) = routes_of(56, ("key_gradient",), WHOLE_GROUP, dilation=8)
    assert [*route.trials] == [WHOLE_GROUP]


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        pytest.param(Timing(97, 96.5, 97.5), True, id="3 % less"),
        pytest.param(Timing(98.5, 98, 99), False, id="1.5 % less"),
        pytest.param(Timing(97, 93, 101), False, id="spread"),
        pytest.param(Timing(103, 102, 104), False, id="slower"),
    ],
)
def test_a_gain_must_be_clear(new, expected):
    assert is_clearly_faster(new, Timing(100, 99.5, 100.5)) is expected
    assert not is_clearly_faster(new, Timing(100, 95, 105))
