"""Brute-force neighborhood attention, straight from the definition, token by token.

It imports nothing of the project. Per axis, with length L, kernel size K, stride s, dilation d; a
query i belongs to the group g = i % d of Lg tokens:

    q = i // d
    not causal: lead = min((q // s) * s + s // 2, Lg - 1)
                the window starts at clamp(lead - K // 2, 0, Lg - K) and has K keys
    causal:     lead = min((q // s) * s + s - 1, Lg - 1)
                it starts at max(lead - K + 1, 0) and ends with the query

The relative positional bias is added at [key - query + K - 1], counted in the group. Query head h
uses key head h // (heads // key_heads). Additional keys are seen by every query.
"""

from dataclasses import dataclass, field
from functools import lru_cache, partial

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
    key_heads: int = 0  # as many as heads
    value_dim: int = 0  # head_dim
    additional: int | None = None
    window: tuple = field(init=False)

    def __post_init__(self):
        dims = len(self.spatial)
        for name, default in (("stride", 1), ("dilation", 1), ("is_causal", False)):
            object.__setattr__(self, name, getattr(self, name) or (default,) * dims)
        object.__setattr__(
            self, "window", (self.kernel_size, self.stride, self.dilation, self.is_causal)
        )
        object.__setattr__(self, "key_heads", self.key_heads or self.heads)
        object.__setattr__(self, "value_dim", self.value_dim or self.head_dim)

    @property
    def settings(self):
        """The window, by the names of the functions' arguments."""
        names = "kernel_size", "stride", "dilation", "is_causal"
        return dict(zip(names, self.window, strict=True))

    def __str__(self):
        parts = ["x".join(map(str, self.spatial)), "k" + "x".join(map(str, self.kernel_size))]
        parts += ["s" + "x".join(map(str, self.stride))] * any(s > 1 for s in self.stride)
        parts += ["d" + "x".join(map(str, self.dilation))] * any(d > 1 for d in self.dilation)
        parts += ["causal" + "".join("ny"[c] for c in self.is_causal)] * any(self.is_causal)
        parts += [f"D{self.head_dim}"] + ["rpb"] * self.rpb
        parts += [f"G{self.key_heads}of{self.heads}"] * (self.key_heads != self.heads)
        parts += [f"v{self.value_dim}"] * (self.value_dim != self.head_dim)
        return "-".join(parts + [f"S{self.additional}"] * (self.additional is not None))

    def shapes(self):
        """Of the tensors that three-tensor functions take."""
        shapes = {
            "query": (self.batch, *self.spatial, self.heads, self.head_dim),
            "key": (self.batch, *self.spatial, self.key_heads, self.head_dim),
            "value": (self.batch, *self.spatial, self.key_heads, self.value_dim),
        }
        if self.rpb:
            shapes["rpb"] = (self.heads, *(2 * k - 1 for k in self.kernel_size))
        if self.additional is not None:
            for name, size in (("keys", self.head_dim), ("values", self.value_dim)):
                shapes[f"additional_{name}"] = (self.batch, self.additional, self.key_heads, size)
        return shapes

    def packed_shapes(self):
        """Of the tensors that functions of a packed projection take."""
        shapes = self.shapes()
        qkv = (self.batch, *self.spatial, 3, self.heads, self.head_dim)
        return {"qkv": qkv} | {name: shapes[name] for name in shapes if name == "rpb"}


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
    attends, index = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.long)
    for length, *settings in zip(spatial, *window, strict=True):
        axis_attends = torch.zeros(length, length, dtype=torch.bool)
        axis_index = torch.zeros(length, length, dtype=torch.long)
        for i in range(length):
            for key, offset in axis_window(i, length, *settings):
                axis_attends[i, key] = True
                axis_index[i, key] = offset
        attends = torch.kron(attends, axis_attends)
        ones = torch.ones_like(axis_index)
        index = torch.kron(index, ones) * (2 * settings[0] - 1) + torch.kron(
            torch.ones_like(index), axis_index
        )
    return attends, index


def scores(case, query, key, rpb=None, additional_keys=None, *, scale):
    """Logits of all pairs [B, heads, tokens, tokens + S], -inf where they do not attend."""
    attends, index = (t.to(query.device) for t in pairs(case.spatial, case.window))
    q, k = (heads_first(case, x) for x in (query, key))
    logits = scale * (q @ k.mT)
    if rpb is not None:
        logits = logits + rpb.flatten(1)[:, index]
    logits = logits.masked_fill(~attends, -torch.inf)
    if additional_keys is not None:
        logits = torch.cat([logits, scale * (q @ heads_first(case, additional_keys).mT)], -1)
    return logits


def heads_first(case, tensor):
    """[B, ..., N, D] to [B, heads, tokens, D]: key heads once for each query head."""
    tensor = tensor.flatten(1, -3).transpose(1, 2)
    return tensor.repeat_interleave(case.heads // tensor.shape[1], 1)


def attention(
    case, query, key, value, rpb=None, scale=1.0, additional_keys=None, additional_values=None
):
    """Output and log-sum-exp, by the whole matrix of scores; differentiable."""
    logits = scores(case, query, key, rpb, additional_keys, scale=scale)
    values = heads_first(case, value)
    if additional_values is not None:
        values = torch.cat([values, heads_first(case, additional_values)], -2)
    output = (logits.softmax(-1) @ values).transpose(1, 2)
    rows = query.shape[:-1]
    return output.reshape(*rows, -1), logits.logsumexp(-1).transpose(1, 2).reshape(rows)


def random_tensors(shapes, dtype, device="cpu"):
    """N(0, 1), rounded to `dtype`; a bias is then fp32 at least."""
    tensors = {}
    for name, shape in shapes.items():
        tensor = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
        is_bias = name == "rpb"
        tensors[name] = tensor.to(torch.promote_types(dtype, torch.float32)) if is_bias else tensor
    return tensors


def inputs(case, dtype, device="cpu"):
    """Packed projection, and bias or None."""
    tensors = random_tensors(case.packed_shapes(), dtype, device)
    return tensors["qkv"], tensors.get("rpb")


def random_gradients(case, dtype, device="cpu"):
    """Of output and log-sum-exp."""
    rows = case.batch, *case.spatial, case.heads
    lse_dtype = torch.promote_types(dtype, torch.float32)
    grad_output = torch.randn(*rows, case.value_dim, dtype=torch.float64).to(dtype)
    grad_lse = torch.randn(rows, dtype=torch.float64).to(lse_dtype)
    return grad_output.to(device), grad_lse.to(device)


def results(function, tensors, grads):
    """Output, lse and the gradient of every tensor, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output, lse = function(**leaves)
    found = torch.autograd.grad([output, lse], list(leaves.values()), grads)
    named = {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}
    return {"output": output, "lse": lse} | named


def run(function, case, qkv, rpb, grad_output, grad_lse, **options):
    """Output, lse and the gradients of qkv and rpb (None without one)."""
    tensors = {"qkv": qkv} | ({} if rpb is None else {"rpb": rpb})
    function = partial(function, **case.settings, return_lse=True, **options)
    found = results(function, tensors, (grad_output, grad_lse))
    return [found.get(name) for name in ("output", "lse", "grad_qkv", "grad_rpb")]


def unpacked(qkv=None, **tensors):
    """The tensors that `attention` takes."""
    if qkv is not None:
        tensors |= dict(zip(("query", "key", "value"), qkv.unbind(-3), strict=True))
    return tensors


def expected(case, tensors, grads, scale):
    """The results from the definition, in fp64."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    grads = [grad.double() for grad in grads]
    return results(lambda **t: attention(case, **unpacked(**t), scale=scale), tensors, grads)


def magnitudes(case, tensors, grads, scale):
    """For every result the sum of the absolute values of its terms: what rounding acts on."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    grad_output, grad_lse = (heads_first(case, g) for g in (grads[0], grads[1].unsqueeze(-1)))
    grad_output, grad_lse = grad_output.double().abs(), grad_lse.double().abs()
    plain = unpacked(**tensors)
    plain.pop("value"), plain.pop("additional_values", None)
    logits = scores(case, **plain, scale=scale)
    p = logits.softmax(-1)

    def function(**leaves):
        leaves = unpacked(**leaves)
        values = [heads_first(case, leaves.pop("value"))]
        if "additional_values" in leaves:
            values.append(heads_first(case, leaves.pop("additional_values")))
        values = torch.cat(values, -2)
        terms = scores(case, **leaves, scale=abs(scale)).masked_fill(logits == -torch.inf, 0)
        dp = grad_output @ values.mT
        # The gradient of this total in each tensor is that tensor's sum of terms.
        ds = p * (dp + (p * dp).sum(-1, keepdim=True) + grad_lse)
        total = (ds.detach() * terms).sum() + (p * dp).sum()
        return total, (p @ values, (p * terms).sum(-1))

    leaves = {name: tensor.abs().requires_grad_() for name, tensor in tensors.items()}
    total, (output, lse) = function(**leaves)
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    named = {f"grad_{name}": grad for name, grad in zip(leaves, found, strict=True)}
    return {"output": output.detach(), "lse": lse.detach()} | named


def assert_close(name, actual, reference, tolerance, magnitude=None):
    """The error's norm must stay under the tolerance, relative to the result or its terms."""
    assert actual.shape == reference.shape, f"{name}: {actual.shape} instead of {reference.shape}"
    error, norm = (actual.detach().double() - reference).norm(), reference.norm()
    if magnitude is not None:
        norm = max(norm, magnitude.norm())
    assert error <= tolerance * norm, f"{name}: error {error / norm:.2e}, allowed {tolerance:.0e}"


def check(function, case, dtype, device="cpu", tolerance=None, scale=None, **options):
    """`function` must agree with the definition, forward and backward, in every result."""
    is_packed = "qkvpacked" in function.__name__
    shapes = case.packed_shapes() if is_packed else case.shapes()
    tensors = random_tensors(shapes, dtype, device)
    grads = random_gradients(case, dtype, device)
    function = partial(function, **case.settings, scale=scale, return_lse=True, **options)
    actual = results(function, tensors, grads)
    assert actual["output"].dtype == dtype
    assert all(actual[f"grad_{name}"].dtype == tensor.dtype for name, tensor in tensors.items())
    scale = case.head_dim**-0.5 if scale is None else scale
    references = expected(case, tensors, grads, scale)
    sizes = magnitudes(case, tensors, grads, scale)
    for name, a in actual.items():
        assert_close(name, a, references[name], tolerance or TOLERANCE[dtype], sizes[name])


def check_that_nan_shows(function, head_dim, dtype, device="cpu", **options):
    """One query's NaN, on a map with one window, must reach all of its own results and no others.

    Args:
        function: For maps.
    """
    query, key, value = torch.randn(3, 1, 4, 4, 1, head_dim, device=device).to(dtype).unbind()
    query[0, 1, 2] = torch.nan
    output, lse = function(query, key, value, kernel_size=4, return_lse=True, **options)
    is_nan = lse[0, ..., 0].isnan()
    assert is_nan[1, 2]
    assert is_nan.sum() == 1
    assert output[0, 1, 2].isnan().all()
    assert output.isnan().sum() == head_dim
