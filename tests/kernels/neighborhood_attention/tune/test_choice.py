from dataclasses import replace

import pytest

pytest.importorskip("triton")

from neighborhood_attention.backends.triton.tile import Tile
from neighborhood_attention.backends.triton.tiles import WINDOWED
from neighborhood_attention.tune.choice import Chooser, is_of
from neighborhood_attention.tune.passes import Shape, Timing, Work
from neighborhood_attention.tune.records import Records
from neighborhood_attention.tune.search import Route

SHAPE = Shape((20, 20), 2, 32, (7, 7), (1, 1), 4)
WORK = Work(SHAPE, "half", ("forward",))
BACKWARD = Work(SHAPE, "half", ("query_bias_gradient", "key_gradient"))


PLAIN = replace(WINDOWED, ring_forward=None)


def tile(warps):
    return Tile((1, 4, 8), (1, 2, 16), warps)


class Bench:
    """Times made up by the forward's warps; some of their results are wrong."""

    def __init__(self, times, wrong=()):
        self.times, self.wrong, self.timed, self.checked = times, wrong, [], []

    def time(self, tiles, milliseconds=20):
        self.timed.append(tiles.forward.num_warps)
        median = self.times[tiles.forward.num_warps]
        if isinstance(median, Exception):
            raise median
        return Timing(median, median - 0.1, median + 0.1)

    def check(self, tiles):
        self.checked.append(tiles.forward.num_warps)
        if tiles.forward.num_warps in self.wrong:
            raise ArithmeticError("relative error 0.5")
        return 0.001


@pytest.fixture
def records(tmp_path):
    return Records(tmp_path / "records.json", {"commit": "a"})


def choose(bench, records, work=WORK, wait=lambda tiles: None):
    told = []
    chooser = Chooser(work, bench, records, wait, told.append)
    start = replace(PLAIN, forward=tile(1))
    route = Route(start, {"forward": [tile(2), tile(4), tile(8)]})
    chosen = chooser.choose([route]).forward.num_warps
    assert len(told) == len([*route.trials])
    return chosen


def test_the_fastest_is_chosen_and_all_is_recorded(records):
    bench = Bench({1: 100, 2: 90, 4: 95, 8: 80})
    assert choose(bench, records) == 8
    assert bench.timed == [1, 2, 4, 8, 1, 8]  # the last two side by side
    (choice,) = records.choices
    assert (choice["old_us"], choice["new_us"]) == (100, 80)
    assert choice["old"] == {"forward": {"tile": (1, 4, 8), "strip": (1, 2, 16), "num_warps": 1}}
    assert choice["new"]["forward"]["num_warps"] == 8
    assert len(records) == 4


def test_each_is_checked_before_its_time_counts(records):
    bench = Bench({1: 100, 2: 90, 4: 95, 8: 50}, wrong=[8])
    assert choose(bench, records) == 2
    assert bench.checked == [1, 2, 8]  # 4 warps are slower than 2 anyway


def test_the_old_tiles_stay_without_a_clear_gain(records):
    assert choose(Bench({1: 100, 2: 99, 4: 101, 8: 120}), records) == 1
    (choice,) = records.choices
    assert choice["new"] == choice["old"]
    assert choice["old_us"] == choice["new_us"] == 100


def test_tiles_that_fail_are_recorded_and_passed_over(records):
    failure = RuntimeError("out of resources: " + 500 * "x")
    assert choose(Bench({1: 100, 2: failure, 4: 50, 8: failure}), records) == 4
    assert choose(Bench({1: 100, 4: 50}), records) == 4  # not tried again


def test_wrong_old_tiles_give_way_to_slower_ones(records):
    assert choose(Bench({1: 50, 2: 60, 4: 70, 8: 80}, wrong=[1]), records) == 2
    assert (records.choices[0]["old_us"], records.choices[0]["new_us"]) == (None, 60)


def test_where_all_fail_there_is_no_choice(records):
    with pytest.raises(RuntimeError, match=r"20x20-k7x7-d1x1-h2-D32-B4 half forward: all tiles"):
        choose(Bench({1: 1, 2: 1, 4: 1, 8: 1}, wrong=[1, 2, 4, 8]), records)
    assert not records.choices


def test_an_interrupted_choice_goes_on_where_it_ended(records, tmp_path):
    times = {1: 100, 2: 90, 4: 95, 8: 80}

    def wait(tiles):
        if tiles.forward.num_warps == 4:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        choose(Bench(times), records, wait=wait)
    records.save()
    again, bench = Records(tmp_path / "records.json", {"commit": "a"}), Bench(times)
    assert choose(bench, again) == 8
    assert bench.timed == [4, 8, 1, 8]


def test_a_time_that_did_not_count_then_is_checked_when_it_would(records):
    choose(Bench({1: 10, 2: 90, 4: 95, 8: 80}), records)
    chooser = Chooser(WORK, bench := Bench({4: 95}), records, lambda _: None, lambda _: None)
    chooser.choose([Route(replace(PLAIN, forward=tile(4)), {})])
    assert bench.checked == [4]


def test_what_the_compiler_raised_is_a_failure(records):
    def wait(tiles):
        if tiles.forward.num_warps == 2:
            raise AssertionError("the compiler's")

    assert choose(Bench({1: 100, 2: 50, 4: 95, 8: 80}), records, wait=wait) == 8


def test_an_entry_holds_the_kernels_in_use_and_what_differs_from_the_rule():
    chooser = Chooser(BACKWARD, Bench({}), None, None, None)
    summed, key, query = WINDOWED.query_bias_gradient, WINDOWED.key_gradient, tile(2)
    both = {"query_bias_gradient": summed, "key_gradient": key}
    assert chooser.entry(WINDOWED, WINDOWED, [Route(WINDOWED, {})]) == both
    separate = replace(WINDOWED, query_bias_gradient=None, query_gradient=query)
    assert chooser.entry(separate, WINDOWED, [Route(WINDOWED, {}), Route(separate, {})]) == {
        "query_gradient": query, "key_gradient": key, "query_bias_gradient": None,
        "bias_gradient": WINDOWED.bias_gradient,
    }  # fmt: skip
    forward = Chooser(WORK, Bench({}), None, None, None)
    ring, plain = Route(WINDOWED, {}), Route(PLAIN, {})
    assert forward.entry(PLAIN, PLAIN, [plain]) == {"forward": WINDOWED.forward}
    lost = {"forward": WINDOWED.forward, "ring_forward": None}
    assert forward.entry(PLAIN, WINDOWED, [ring, plain]) == lost
    assert forward.entry(WINDOWED, WINDOWED, [ring]) == {"ring_forward": WINDOWED.ring_forward}


def test_a_way_that_cannot_run_is_not_taken_from_other_problems_of_the_key():
    forward = Chooser(WORK, Bench({}), None, None, None)
    assert forward.entry(PLAIN, WINDOWED, [Route(PLAIN, {})]) == {"forward": WINDOWED.forward}


def test_a_choice_is_known_by_pass_and_kernels():
    choice = BACKWARD.record | {"kernels": ["query_bias_gradient", "key_gradient"]}
    assert is_of(choice, BACKWARD)
    assert is_of(choice, BACKWARD._replace(kernels=("key_gradient",)))
    assert not is_of(choice, BACKWARD._replace(kernels=("whole_group", "key_gradient")))
    assert not is_of(choice, WORK)
    assert not is_of(choice, BACKWARD._replace(precision="tf32"))
    assert not is_of(choice, BACKWARD._replace(shape=SHAPE._replace(batch=8)))
