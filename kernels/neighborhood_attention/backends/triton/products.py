"""Matrix products on tensor cores, in the precision of a problem (`Problem.precision`)."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, PRECISION: tl.constexpr, total=None):
    """total + a @ b.

    "tf32x3" splits each factor of fp32 in two parts of TF32 and leaves out the product of the low
    ones, as Triton does under this name; with integers it takes a third of the instructions. A
    factor that is infinite, or so large that it rounds to infinity, makes NaN.
    """
    if PRECISION == "tf32x3":
        high_a, low_a = _parts(a)
        high_b, low_b = _parts(b)
        dots = tl.dot(low_a, high_b, input_precision="tf32")
        dots = tl.dot(high_a, low_b, dots, input_precision="tf32")
        dots = tl.dot(high_a, high_b, dots, input_precision="tf32")
        # Not as the accumulator: tensor cores cut sums off, and the error would grow with the keys.
        return dots if total is None else total + dots
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _parts(x):
    """x rounded to TF32's 10 bits after the point, and the rest, of which TF32 takes 10 bits."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, x - high
