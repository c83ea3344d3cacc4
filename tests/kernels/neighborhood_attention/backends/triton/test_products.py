"""Products of fp32 in the parts of TF32, against fp64."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from neighborhood_attention.backends.triton.products import _parts, product  # noqa: E402

pytestmark = pytest.mark.interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _product_kernel(a, b, total, result, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    start = None if total is None else tl.load(total + at)
    tl.store(result + at, product(tl.load(a + at), tl.load(b + at), PRECISION, start))


@triton.jit
def _parts_kernel(x, high, low, N: tl.constexpr):
    i = tl.arange(0, N)
    parts = _parts(tl.load(x + i))
    tl.store(high + i, parts[0])
    tl.store(low + i, parts[1])


def draw(dtype):
    """Numbers of many magnitudes."""
    numbers = torch.randn(32, 32, device=DEVICE)
    return (numbers * 2.0 ** torch.randint(-12, 12, (32, 1), device=DEVICE)).to(dtype)


@pytest.mark.parametrize("has_total", [False, True], ids=["product", "total"])
@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [(torch.float32, "tf32x3", 1e-6), (torch.float32, "ieee", 1e-6), (torch.float16, "ieee", 1e-6)],
    ids=["three products", "ieee", "half"],
)
def test_products_have_the_precision_of_fp32(dtype, precision, tolerance, has_total):
    a, b = draw(dtype), draw(dtype).T.contiguous()
    total = draw(torch.float32) if has_total else None
    result = torch.full((32, 32), torch.nan, device=DEVICE)
    _product_kernel[(1,)](a, b, total, result, 32, precision)
    exact = a.double() @ b.double()
    scale = a.double().abs() @ b.double().abs()
    if total is not None:
        exact, scale = exact + total, scale + total.abs()
    assert ((result - exact).abs() / scale).max() < tolerance


@triton.jit
def _sums_kernel(a, b, result, STRIPS: tl.constexpr):
    i = tl.arange(0, 32)
    at = i[:, None] * 32 + i[None, :]
    total = tl.zeros((32, 32), tl.float32)
    for strip in range(STRIPS):
        offset = strip * 1024 + at
        total = product(tl.load(a + offset), tl.load(b + offset), "tf32x3", total)
    tl.store(result + at, total)


def test_long_sums_are_rounded_not_cut_off():
    """Tensor cores cut off: where they held the sum, the error would grow with its terms."""
    a, b = torch.rand(64, 32, 32, device=DEVICE), torch.rand(64, 32, 32, device=DEVICE)
    result = torch.empty(32, 32, device=DEVICE)
    _sums_kernel[(1,)](a, b, result, 64)
    exact = (a.double() @ b.double()).sum(0)
    assert ((result - exact).abs() / exact).max() < 1e-6


def test_parts_are_of_tf32_and_add_up():
    values = [1.0, -1.0, 2.0**-126, 3e38, -3e38, 0.0, 1 + 2.0**-23, 1 + 2.0**-11, torch.pi]
    x = torch.tensor([*values, *draw(torch.float32).flatten().tolist()][:1024], device=DEVICE)
    high, low = torch.empty_like(x), torch.empty_like(x)
    _parts_kernel[(1,)](x, high, low, 1024)
    assert torch.equal(high.double() + low.double(), x.double())
    assert (high.view(torch.int32) & 0x1FFF).eq(0).all()
    assert (low.abs() <= x.abs() * 2.0**-11).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_no_number_shows(value):
    a, b = draw(torch.float32), draw(torch.float32)
    a[3, 5] = value
    result = torch.zeros(32, 32, device=DEVICE)
    _product_kernel[(1,)](a, b, None, result, 32, "tf32x3")
    assert not result[3].isfinite().any()
    others = torch.arange(32, device=DEVICE) != 3
    assert result[others].isfinite().all()
