import os
import re
from functools import partial

import pytest

pytest.importorskip("triton")

from neighborhood_attention.backends.triton.tiles import VOLUME, WINDOWED
from neighborhood_attention.tune.ahead import Ahead, Part
from neighborhood_attention.tune.passes import Shape, Work
from neighborhood_attention.tune.records import Deadline

SHAPE = Shape((20, 20), 2, 32, (7, 7), (1, 1), 4)
FORWARD = Work(SHAPE, "half", ("forward",))


@pytest.mark.parametrize(
    ("kernels", "expected"),
    [
        pytest.param(("forward",), {"_forward_kernel"}, id="forward"),
        pytest.param(
            ("key_gradient",),
            {"_query_bias_gradient_kernel", "_key_gradient_kernel"},
            id="backward",
        ),
    ],
)
def test_a_part_compiles_its_kernels_and_launches_none(kernels, expected, monkeypatch):
    compiled = []

    def run(kernel, *args, grid, warmup, **options):
        assert warmup
        compiled.append(kernel.__name__)

    import triton

    monkeypatch.setattr(triton.JITFunction, "run", run)
    Part(Work(SHAPE, "half", kernels), WINDOWED)()
    assert set(compiled) - {"_build_kernel", "_reduce_kernel"} == expected
    assert triton.JITFunction.run is run


@pytest.mark.slow
def test_other_processes_compile_and_tell_of_failures():
    part, other = Part(FORWARD, WINDOWED), Part(FORWARD, VOLUME)
    with Ahead([part, part], processes=1) as ahead:
        assert ahead.wait(other, Deadline(0)) is None  # not asked for
        with pytest.raises(TimeoutError):
            ahead.wait(part, Deadline(0))
        try:
            part()
        except RuntimeError as error:  # without a GPU
            with pytest.raises(RuntimeError, match=re.escape(str(error)[:20])):
                ahead.wait(part, Deadline(60))
        else:
            ahead.wait(part, Deadline(60))


def test_results_come_back_and_what_a_call_raised():
    good, bad = partial(sum, [1, 2]), partial(int, "x")
    with Ahead([good, bad, good]) as ahead:
        assert ahead.wait(good, Deadline(60)) == 3
        with pytest.raises(ValueError, match="invalid literal"):
            ahead.wait(bad, Deadline(60))


def test_a_process_that_died_is_no_failure():
    with Ahead([partial(os._exit, 1)]) as ahead:
        [call] = ahead._futures
        assert ahead.wait(call, Deadline(60)) is None
