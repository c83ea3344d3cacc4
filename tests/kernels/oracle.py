"""Brute-force neighborhood attention, straight from the definition, token by token.

It imports nothing of the project. Per axis, with length L, kernel size K, stride s, dilation d; a
query i belongs to the group g = i % d of Lg tokens:

    q = i // d
    not causal: lead = min((q // s) * s + s // 2, Lg - 1)
                the window starts at clamp(lead - K // 2, 0, Lg - K) and has K keys
    causal:     lead = min((q // s) * s + s - 1, Lg - 1)
                it starts at max(lead - K + 1, 0) and ends with the query

The relative positional bias is added at [key - query + K - 1], counted in the group.
"""

import itertools
from dataclasses import dataclass, field
from functools import lru_cache

import torch

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Case:
    """A problem: sizes and window; every tuple has one entry an axis."""

    spatial: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    is_causal: tuple[bool, ...] = ()
    batch: int = 2
    heads: int = 2
    head_dim: int = 16
    rpb: bool = True
    window: tuple = field(init=False)

    def __post_init__(self):
        dims = len(self.spatial)
        for name, default in (("stride", 1), ("dilation", 1), ("is_causal", False)):
            object.__setattr__(self, name, getattr(self, name) or (default,) * dims)
        object.__setattr__(
            self, "window", (self.kernel_size, self.stride, self.dilation, self.is_causal)
        )

    def __str__(self):
        parts = ["x".join(map(str, self.spatial)), "k" + "x".join(map(str, self.kernel_size))]
        parts += ["s" + "x".join(map(str, self.stride))] * any(s > 1 for s in self.stride)
        parts += ["d" + "x".join(map(str, self.dilation))] * any(d > 1 for d in self.dilation)
        parts += ["causal" + "".join("ny"[c] for c in self.is_causal)] * any(self.is_causal)
        return "-".join([*parts, f"D{self.head_dim}"] + ["rpb"] * self.rpb)


def axis_window(i, length, kernel_size, stride, dilation, is_causal):
    """The keys of query `i` on one axis: (position, index into the bias) of each."""
    group, query = i % dilation, i // dilation
    members = len(range(group, length, dilation))
    if is_causal:
        lead = min((query // stride) * stride + stride - 1, members - 1)
        start, end = max(lead - kernel_size + 1, 0), query + 1
    else:
        lead = min((query // stride) * stride + stride // 2, members - 1)
        start = min(max(lead - kernel_size // 2, 0), members - kernel_size)
        end = start + kernel_size
    return [(group + dilation * k, k - query + kernel_size - 1) for k in range(start, end)]


@lru_cache(maxsize=8)
def pairs(spatial, window):
    """For each pair of tokens: whether they attend, and the index into the flat bias."""
    axes = [
        [axis_window(i, length, *settings) for i in range(length)]
        for length, settings in zip(spatial, zip(*window, strict=True), strict=True)
    ]
    tokens = list(itertools.product(*map(range, spatial)))
    number = {token: n for n, token in enumerate(tokens)}
    attends = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    index = torch.zeros(len(tokens), len(tokens), dtype=torch.long)
    for n, token in enumerate(tokens):
        for keys in itertools.product(*(axes[a][i] for a, i in enumerate(token))):
            m = number[tuple(position for position, _ in keys)]
            attends[n, m] = True
            flat = 0
            for (_, offset), size in zip(keys, window[0], strict=True):
                flat = flat * (2 * size - 1) + offset
            index[n, m] = flat
    return attends, index


def attention(case, query, key, value, rpb, scale):
    """Output and log-sum-exp, by the whole matrix of scores; differentiable."""
    attends, index = (t.to(query.device) for t in pairs(case.spatial, case.window))
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (query, key, value))
    scores = scale * (q @ k.mT)
    if rpb is not None:
        scores = scores + rpb.flatten(1)[:, index]
    scores = scores.masked_fill(~attends, -torch.inf)
    output = (scores.softmax(-1) @ v).transpose(1, 2).reshape(value.shape)
    return output, scores.logsumexp(-1).transpose(1, 2).reshape(query.shape[:-1])


def inputs(case, dtype, device="cpu"):
    """Packed projection and bias, N(0, 1), rounded to `dtype`; the bias is then fp32 at least."""
    qkv = torch.randn(case.batch, *case.spatial, 3, case.heads, case.head_dim, dtype=torch.float64)
    qkv = qkv.to(dtype).to(device)
    if not case.rpb:
        return qkv, None
    rpb = torch.randn(case.heads, *(2 * k - 1 for k in case.kernel_size), dtype=torch.float64)
    return qkv, rpb.to(dtype).to(torch.promote_types(dtype, torch.float32)).to(device)


def gradients(outputs, grads, leaves):
    """Gradients of `leaves` (None entries stay None)."""
    present = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(outputs, present, grads))
    return [None if leaf is None else next(found) for leaf in leaves]


def run(function, case, qkv, rpb, grad_output, grad_lse, **options):
    """Output, lse and the gradients of qkv and rpb; `function` is called as `na2d_qkvpacked`."""
    qkv = qkv.detach().requires_grad_()
    rpb = None if rpb is None else rpb.detach().requires_grad_()
    output, lse = function(qkv, *case.window, rpb=rpb, return_lse=True, **options)
    return [output, lse, *gradients([output, lse], [grad_output, grad_lse], [qkv, rpb])]


def expected(case, qkv, rpb, grad_output, grad_lse, scale=None):
    """The same from the definition, in fp64."""
    scale = case.head_dim**-0.5 if scale is None else scale

    def function(qkv, *_, rpb, return_lse):
        return attention(case, *qkv.unbind(-3), rpb, scale)

    wide = [None if t is None else t.detach().double() for t in (qkv, rpb, grad_output, grad_lse)]
    return run(function, case, *wide)


def assert_close(name, actual, reference, tolerance):
    """The error's norm must stay under the tolerance, relative to the reference's."""
    if reference is None:
        assert actual is None, f"{name}: expected None"
        return
    assert actual.shape == reference.shape, f"{name}: {actual.shape} instead of {reference.shape}"
    error, norm = (actual.detach().double() - reference).norm(), reference.norm()
    assert error <= tolerance * norm, f"{name}: error {error / norm:.2e}, allowed {tolerance:.0e}"


def check(function, case, dtype, device="cpu", tolerance=None, **options):
    """`function` must agree with the definition, forward and backward, in every result."""
    qkv, rpb = inputs(case, dtype, device)
    output_shape = (case.batch, *case.spatial, case.heads, case.head_dim)
    grad_output = torch.randn(output_shape, dtype=torch.float64).to(dtype).to(device)
    lse_dtype = torch.promote_types(dtype, torch.float32)
    grad_lse = torch.randn(output_shape[:-1], dtype=torch.float64).to(lse_dtype).to(device)
    actual = run(function, case, qkv, rpb, grad_output, grad_lse, **options)
    reference = expected(case, qkv, rpb, grad_output, grad_lse)
    assert actual[0].dtype == actual[2].dtype == dtype
    names = "output", "lse", "grad_qkv", "grad_rpb"
    for name, a, r in zip(names, actual, reference, strict=True):
        assert_close(name, a, r, tolerance or TOLERANCE[dtype])
