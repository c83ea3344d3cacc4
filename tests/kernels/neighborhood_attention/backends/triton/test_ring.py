import pytest
import torch

pytest.importorskip("triton")

import triton

from neighborhood_attention.backends import Inputs
from neighborhood_attention.backends.triton.launch import Problem, describe
from neighborhood_attention.backends.triton.ring import takes
from neighborhood_attention.backends.triton.tiles import WINDOWED, TilePlan
from neighborhood_attention.geometry import Neighborhood

bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
SQUARE = 20, 20


def packed(spatial=SQUARE, head_dim=32, dtype=bf16, **packing):
    """Query, key and value packed into one tensor, and a bias's place."""
    heads = packing.get("heads", 4)
    shape = (2, *spatial, 3, heads, packing.get("width", head_dim))
    qkv = torch.empty(shape, dtype=dtype, device="meta")[..., :head_dim]
    query, key, value = qkv.unbind(-3)
    key_heads = packing.get("key_heads", heads)
    return Inputs(query, key[..., :key_heads, :], value[..., :key_heads, :])


def separate(*, key_heads=4, value_dim=32, additional=None):
    """Query, key and value, tensors of their own, and additional keys and values."""
    query = torch.empty(2, *SQUARE, 4, 32, dtype=bf16, device="meta")
    key, value = (query.new_empty(2, *SQUARE, key_heads, d) for d in (32, value_dim))
    more = None if additional is None else query.new_empty(2, additional, key_heads, 32)
    return Inputs(query, key, value, None, more, more)


def is_taken(inputs, kernel_size=7, tile=WINDOWED.ring_forward, **window):
    """With the same window on every axis, but for a tuple."""
    spatial = inputs.query.shape[1:-2]
    settings = kernel_size, *(window.get(n, d) for n, d in DEFAULTS.items())
    axes = [x if isinstance(x, tuple) else (x,) * len(spatial) for x in settings]
    neighborhood = Neighborhood(*axes)
    plan = TilePlan(tile, neighborhood, spatial, of_keys=False)
    return takes(Problem.of(describe(inputs)), neighborhood, plan)


DEFAULTS = {"stride": 1, "dilation": 1, "is_causal": False}


@pytest.mark.parametrize(
    ("inputs", "window"),
    [
        pytest.param(packed(), {}, id="plain"),
        pytest.param(packed((21, 40)), {"dilation": (2, 3)}, id="dilated"),
        pytest.param(packed((9, 9)), {"kernel_size": (6, 9)}, id="whole map"),
        pytest.param(packed(dtype=fp16), {}, id="fp16"),
        *(pytest.param(packed(head_dim=d), {}, id=f"{d} channels") for d in (16, 64, 128)),
        pytest.param(separate(), {}, id="separate"),
        pytest.param(packed(key_heads=2), {}, id="grouped heads of equal strides"),
        pytest.param(packed(width=48), {}, id="aligned views"),
    ],
)
def test_a_plain_problem_is_taken(inputs, window):
    assert is_taken(inputs, **window)


@pytest.mark.parametrize(
    ("inputs", "window"),
    [
        pytest.param(packed(), {"stride": (2, 1)}, id="stride of rows"),
        pytest.param(packed(), {"stride": (1, 2)}, id="stride of columns"),
        pytest.param(packed(), {"is_causal": (True, False)}, id="causal rows"),
        pytest.param(packed(), {"is_causal": (False, True)}, id="causal columns"),
        pytest.param(separate(additional=3), {}, id="additional keys"),
        pytest.param(packed(dtype=fp32), {}, id="fp32"),
        pytest.param(packed(head_dim=24), {}, id="24 channels"),
        pytest.param(packed(head_dim=256), {}, id="256 channels"),
        pytest.param(separate(value_dim=64), {}, id="a value dimension of its own"),
        pytest.param(separate(key_heads=2), {}, id="strides that differ"),
        pytest.param(packed((8192, 8192)), {}, id="wide offsets"),
        pytest.param(packed((40,)), {}, id="one axis"),
        pytest.param(packed((4, 20, 20)), {"kernel_size": (1, 7, 7)}, id="three axes"),
        pytest.param(packed(), {"kernel_size": (7, 10)}, id="two strips of columns"),
        pytest.param(packed((7, 20)), {"kernel_size": (6, 6)}, id="fewer rows than strips hold"),
        pytest.param(packed((120, 20)), {"kernel_size": (20, 7)}, id="too many strips"),
        pytest.param(packed(head_dim=128), {"kernel_size": (9, 9)}, id="too much memory"),
        # Copies of 16 bytes, aligned by strides that Triton knows to be multiples of 16.
        pytest.param(packed(width=33), {}, id="odd strides"),
        pytest.param(packed(width=40), {}, id="strides of multiples of 8"),
    ],
)
def test_what_its_kernels_cannot_do_is_refused(inputs, window):
    assert not is_taken(inputs, **window)


def test_nothing_is_taken_by_the_interpreter():
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        assert not is_taken(packed())
    assert is_taken(packed())
