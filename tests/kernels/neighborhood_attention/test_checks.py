import re

import numpy as np
import pytest
import torch

from neighborhood_attention import checks


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [(3, int, (3, 3, 3)), ([1, 2, 3], int, (1, 2, 3)), (True, bool, (True, True, True))],
)
def test_one_value_counts_for_every_axis(value, kind, expected):
    assert checks.per_axis("x", value, 3, kind) == expected


@pytest.mark.parametrize(
    ("value", "kind", "error"),
    [
        ((1, 2), int, ValueError),
        ((1, 2, 3.0), int, TypeError),
        ((1, 2, True), int, TypeError),
        (0, bool, TypeError),
        (torch.ones(3), int, TypeError),
    ],
)
def test_per_axis_names_the_argument_and_the_value(value, kind, error):
    with pytest.raises(error, match=re.escape(f"x={value!r}: expected")):
        checks.per_axis("x", value, 3, kind)


@pytest.mark.parametrize(("dims", "layout"), [(1, "B, L, heads, D"), (3, "B, D, H, W, heads, D")])
def test_the_layout_of_every_number_of_axes_is_named(dims, layout):
    checks.check_heads_last("x", torch.ones([1] * (dims + 3)), dims)
    with pytest.raises(ValueError, match=rf"x: expected \[{layout}\], got shape \(1,\)"):
        checks.check_heads_last("x", torch.ones(1), dims)


def test_an_axis_of_exactly_the_window_fits_and_a_shorter_one_does_not():
    window = checks.make_neighborhood(2, (3, 2), 1, (2, 4), False)
    checks.check_fits(window, (6, 8))
    for spatial in ((5, 8), (6, 7)):
        with pytest.raises(ValueError, match=r"kernel_size=\(3, 2\) with dilation=\(2, 4\)"):
            checks.check_fits(window, spatial)


def test_the_scale_is_one_over_the_root_of_the_head_dimension_unless_given():
    assert checks.checked_scale("scale", None, 16) == 0.25
    assert checks.checked_scale("scale", 0.0, 16) == 0.0
    for given in (10**300, np.float64(1e300), 2):
        scale = checks.checked_scale("scale", given, 16)
        assert type(scale) is float
        assert scale == float(given)


@pytest.mark.parametrize("bits", [1025, 20000])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_scale_that_no_float_holds_is_refused(bits, sign):
    # Python prints no int of 20000 bits.
    message = f"scale=<int of {bits} bits>: expected a finite number"
    with pytest.raises(ValueError, match=message):
        checks.checked_scale("scale", sign * 2 ** (bits - 1), 16)
