import os
import re
from dataclasses import replace
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

import triton

from neighborhood_attention.backends.triton import tile_table
from neighborhood_attention.backends.triton.tiles import LIGHT, WINDOWED
from neighborhood_attention.tune.ahead import Ahead, Part
from neighborhood_attention.tune.passes import Shape, Work
from neighborhood_attention.tune.records import Deadline

SHAPE = Shape((20, 20), 2, 32, (7, 7), (1, 1), 4)
FORWARD = Work(SHAPE, "half", ("forward",))


PLAIN = replace(WINDOWED, ring_forward=None)
# In a ring however small the problem is.
RING = replace(WINDOWED, ring_forward=replace(WINDOWED.ring_forward, programs=1))


@pytest.fixture
def compiled(monkeypatch):
    """By name, the options of the kernels that were compiled, none launched."""
    found = {}

    def run(kernel, *args, grid, warmup, **options):
        assert warmup
        found[kernel.__name__] = options | dict(zip(kernel.arg_names, args, strict=False))

    monkeypatch.setattr(triton.JITFunction, "run", run)
    yield found
    assert triton.JITFunction.run is run


@pytest.mark.parametrize(
    ("kernels", "tiles", "expected"),
    [
        pytest.param(("forward",), PLAIN, {"_forward_kernel"}, id="forward"),
        pytest.param(("ring_forward",), RING, {"_ring_forward_kernel"}, id="ring"),
        pytest.param(
            ("key_gradient",),
            WINDOWED,
            {"_query_bias_gradient_kernel", "_key_gradient_kernel"},
            id="backward",
        ),
    ],
)
def test_a_part_compiles_its_kernels_and_launches_none(kernels, tiles, expected, compiled):
    Part(Work(SHAPE, "half", kernels), tiles)()
    assert set(compiled) - {"_build_kernel", "_reduce_kernel"} == expected


@pytest.mark.parametrize(("capability", "overlaps"), [("9.0", True), ("8.9", False)])
def test_kernels_overlap_as_on_the_gpu(capability, overlaps, compiled, monkeypatch):
    def capability_of(device):
        return {"cuda": capability}.get(device.type)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tile_table, "capability", capability_of)
    Part(Work(SHAPE, "half", ("ring_forward",)), RING)()
    assert tile_table.capability is capability_of
    assert compiled["_ring_forward_kernel"]["launch_pdl"] == overlaps
    assert [options["OVERLAPS"] for options in compiled.values()] == [overlaps] * 2


@pytest.mark.slow
def test_other_processes_compile_and_tell_of_failures():
    part, other = Part(FORWARD, WINDOWED), Part(FORWARD, LIGHT[2])
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
