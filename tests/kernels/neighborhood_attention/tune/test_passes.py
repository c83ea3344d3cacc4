import pytest
import torch

pytest.importorskip("triton")

from neighborhood_attention.backends.triton import fused_backward
from neighborhood_attention.backends.triton.tile import Tile, Tiles
from neighborhood_attention.backends.triton.tiles import choose_tiles
from neighborhood_attention.tune.passes import Pass, Shape, Work

RECORD = {
    "map": [6, 5], "heads": 1, "head_dim": 16, "kernel_size": [3, 3], "dilation": [1, 1],
    "batch": 3, "layers": 2,
}  # fmt: skip
SHAPE = Shape.of(RECORD)
FORWARD = Work(SHAPE, "ieee", ("forward",))
BACKWARD = Work(SHAPE, "ieee", ("key_gradient", "whole_group"))
SEPARATE = Tiles(*[Tile((1, 4, 8), (1, 4, 8), 1)] * 4)


@pytest.fixture
def prepare(device):
    """prepare(work): a pass with its numbers."""

    def prepare(work):
        prepared = Pass(work, device)
        prepared.fill()
        return prepared

    return prepare


def test_a_shape_reads_a_problem_and_names_it():
    assert Shape((6, 5), 1, 16, (3, 3), (1, 1), 3) == SHAPE
    assert str(SHAPE) == "6x5-k3x3-d1x1-h1-D16-B3"
    assert str(BACKWARD) == "6x5-k3x3-d1x1-h1-D16-B3 ieee backward"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"kernel_size": [7, 3]}, ValueError, "expected a map of", id="window"),
        pytest.param({"dilation": [1]}, ValueError, "shorter", id="axes"),
        pytest.param({"map": 6}, TypeError, "int", id="no list"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        Shape.of(RECORD | change)


def test_a_pass_has_its_ways():
    assert FORWARD.ways == (("ring_forward",), ("forward",))
    assert BACKWARD.ways[0] == ("whole_group",)
    assert (FORWARD.record["pass"], BACKWARD.record["pass"]) == ("forward", "backward")


@pytest.mark.parametrize("kernels", [("ring_forward",), ("forward", "ring_forward")], ids=str)
def test_the_pass_of_every_way_has_one_name(kernels):
    assert FORWARD._replace(kernels=kernels).record == FORWARD.record


def test_the_tiles_in_use_are_those_of_the_problem(prepare):
    forward = prepare(FORWARD)
    forward.use(SEPARATE)
    assert choose_tiles(forward.problem, forward.window) == SEPARATE


@pytest.mark.parametrize("precision", ["half", "tf32", "ieee"])
def test_the_precision_is_that_of_the_key(precision):
    assert Pass(FORWARD._replace(precision=precision), "meta").key.precision == precision


@pytest.mark.interpreter
@pytest.mark.parametrize("work", [FORWARD, BACKWARD], ids=str)
def test_right_results_pass_the_check(work, prepare):
    assert 0 < prepare(work).check(SEPARATE) < 1e-5


@pytest.mark.interpreter
@pytest.mark.parametrize("work", [FORWARD, BACKWARD], ids=str)
def test_wrong_results_fail_the_check(work, prepare):
    wrong = prepare(work)
    assert wrong._exact
    wrong._inputs.rpb[0, 2, 2] += 0.001  # of the same pass
    with pytest.raises(ArithmeticError, match=r"relative error .*, more than 2e-05"):
        wrong.check(SEPARATE)


@pytest.mark.interpreter
def test_results_that_are_not_written_fail_the_check(prepare, monkeypatch):
    backward = prepare(BACKWARD)
    backward.check(SEPARATE)  # leaves right results behind
    monkeypatch.setattr(fused_backward, "backward", lambda *arguments: None)
    with pytest.raises(ArithmeticError, match="relative error nan"):
        backward.check(SEPARATE)


@pytest.mark.interpreter
def test_images_that_are_not_written_fail_the_check(prepare, monkeypatch):
    backward, real = prepare(BACKWARD), fused_backward.backward

    def without_the_second(*arguments):
        real(*arguments)
        arguments[-1].key[1] = torch.nan

    monkeypatch.setattr(fused_backward, "backward", without_the_second)
    with pytest.raises(ArithmeticError, match="relative error nan"):
        backward.check(SEPARATE)


@pytest.mark.gpu
@pytest.mark.parametrize("work", [FORWARD, BACKWARD], ids=str)
def test_a_pass_is_timed(work, prepare):
    timing = prepare(work).time(SEPARATE)
    assert 0 < timing.low <= timing.median <= timing.high < 1e5
