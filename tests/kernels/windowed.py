"""The definition on a sample of queries and keys, forward and backward, for maps of any size.

What `oracle.py` does with the whole matrix of scores is here written out for the tokens of a sample
alone, in fp64, gradients by their formulas; without additional keys. For each value the sum of its
terms' absolute values comes with it: where terms cancel, errors are measured by those.

S tokens of the sample; M tokens that one of them meets at most; a pair is (value, magnitude).
"""

from functools import partial
from math import prod

import torch
from oracle import TOLERANCE, assert_close, results

# Elements of gathered tokens at a time.
GATHERED = 2**25


def attends(query, key, length, kernel_size, stride, dilation, is_causal):
    """Whether queries attend to keys, positions of one axis: `oracle.axis_window` for tensors."""
    group, q, k = query % dilation, query // dilation, key // dilation
    members = (length - group + dilation - 1) // dilation
    lead = q // stride * stride + (stride - 1 if is_causal else stride // 2)
    lead = torch.minimum(lead, members - 1)
    if is_causal:
        start, end = (lead - kernel_size + 1).clamp(min=0), q + 1
    else:
        start = (lead - kernel_size // 2).clamp(min=0).minimum(members - kernel_size)
        end = start + kernel_size
    return (key % dilation == group) & (k >= start) & (k < end)


def met_tokens(case, sample, of_keys):
    """The tokens [S, M] that sampled queries, or keys, meet; whether they exist; bias indices."""
    token = index = torch.zeros(len(sample), 1, dtype=torch.long, device=sample.device)
    exists = token == 0
    rest, step = sample, prod(case.spatial)
    for length, *settings in zip(case.spatial, *case.window, strict=True):
        kernel_size, _, dilation, _ = settings
        step //= length
        own, rest = (rest // step)[:, None], rest % step
        others = torch.arange(length, device=sample.device)[None]
        pair = (others, own) if of_keys else (own, others)
        found, order = attends(*pair, length, *settings).int().sort(descending=True, stable=True)
        most = found.sum(1).max()
        found, order = found[:, None, :most] > 0, order[:, None, :most]
        offset = order // dilation - own[:, :, None] // dilation
        offset = kernel_size - 1 + (-offset if of_keys else offset)
        token = (token[:, :, None] * length + order).flatten(1)
        index = (index[:, :, None] * (2 * kernel_size - 1) + offset).flatten(1)
        exists = (exists[:, :, None] & found).flatten(1)
    return token, exists, index.where(exists, 0)


def pieces(case, sample, of_keys):
    """Slices of the sample with their `met_tokens`, of bounded size."""
    sizes = zip(case.spatial, case.kernel_size, case.stride, strict=True)
    most = prod(min(length, 2 * (size + stride)) for length, size, stride in sizes)
    step = max(1, GATHERED // (most * (case.head_dim + case.value_dim)))
    for first in range(0, len(sample), step):
        piece = slice(first, first + step)
        yield piece, *met_tokens(case, sample[piece], of_keys)


def zeros(device, **shapes):
    """A pair for each name."""
    wide = {"dtype": torch.float64, "device": device}
    return {n: (torch.zeros(s, **wide), torch.zeros(s, **wide)) for n, s in shapes.items()}


def heads_of(case, tensors, rows):
    """For each image and query head: fp64 [tokens, D] of the tensors, its bias, its `rows`."""
    for image in range(case.batch):
        for head in range(case.heads):
            key_head = head * case.key_heads // case.heads
            own = {"query": head, "key": key_head, "value": key_head, "grad_output": head}
            matrices = [tensors[n][image].flatten(0, -3)[:, h].double() for n, h in own.items()]
            bias = tensors["rpb"][head].flatten().double() if case.rpb else None
            vectors = [row[image].flatten(0, -2)[:, head].double() for row in rows]
            yield image, head, key_head, matrices, bias, vectors


def of_queries(case, tensors, grad_lse, sample):
    """Pairs [B, S, heads, ...]; the bias's gradient from the queries of the sample alone."""
    rows = case.batch, len(sample), case.heads
    pairs = zeros(
        sample.device, output=(*rows, case.value_dim), lse=rows, grad_query=(*rows, case.head_dim),
        grad_rpb=(case.heads, prod(2 * size - 1 for size in case.kernel_size)),
    )  # fmt: skip
    for piece, token, exists, index in pieces(case, sample, of_keys=False):
        own = sample[piece]
        for image, head, _, matrices, bias, (grad,) in heads_of(case, tensors, [grad_lse]):
            query, key, value, grad_output = matrices
            k, v = key[token], value[token]
            scores = case.head_dim**-0.5 * (k * query[own, None]).sum(-1)
            scores = scores if bias is None else scores + bias[index]
            lse = scores.masked_fill(~exists, -torch.inf).logsumexp(1)
            p = (scores - lse[:, None]).exp().masked_fill(~exists, 0)
            output = (p[..., None] * v).sum(1)
            dp = (v * grad_output[own, None]).sum(-1)
            delta = (output * grad_output[own]).sum(-1) - grad[own]
            ds, ds_terms = p * (dp - delta[:, None]), p * (dp.abs() + delta.abs()[:, None])
            scale = case.head_dim**-0.5
            for name, weights, x in (
                ("output", (p, p), v),
                ("grad_query", (scale * ds, scale * ds_terms), k),
            ):
                for target, weight, y in zip(pairs[name], weights, (x, x.abs()), strict=True):
                    target[image, piece, head] = (weight[..., None] * y).sum(1)
            for target, x in zip(pairs["lse"], (lse, (p * scores.abs()).sum(1)), strict=True):
                target[image, piece, head] = x
            for target, x in zip(pairs["grad_rpb"], (ds, ds_terms), strict=True):
                target[head].index_add_(0, index.flatten(), x.flatten())
    return pairs


def of_keys(case, tensors, lse, delta, sample):
    """Pairs [B, S, key heads, ...]; `lse` and `delta` of all queries."""
    rows, scale = (case.batch, len(sample), case.key_heads), case.head_dim**-0.5
    pairs = zeros(
        sample.device, grad_key=(*rows, case.head_dim), grad_value=(*rows, case.value_dim)
    )
    for piece, token, exists, index in pieces(case, sample, of_keys=True):
        own = sample[piece]
        for image, _, head, matrices, bias, vectors in heads_of(case, tensors, [lse, delta]):
            query, key, value, grad_output = matrices
            row_lse, row_delta = (vector[token] for vector in vectors)
            q, do = query[token], grad_output[token]
            scores = scale * (q * key[own, None]).sum(-1)
            scores = scores if bias is None else scores + bias[index]
            p = (scores - row_lse).exp().masked_fill(~exists, 0)
            dp = (do * value[own, None]).sum(-1)
            ds, ds_terms = p * (dp - row_delta), p * (dp.abs() + row_delta.abs())
            for name, weights, x in (
                ("grad_key", (scale * ds, scale * ds_terms), q),
                ("grad_value", (p, p), do),
            ):
                for target, weight, y in zip(pairs[name], weights, (x, x.abs()), strict=True):
                    target[image, piece, head] += (weight[..., None] * y).sum(1)
    return pairs


def check(function, case, dtype, device, sampled, tolerance=None, **options):
    """`function` must agree with the definition on so many queries and keys, in every result.

    The keys' gradients take the function's own output and log-sum-exp of the queries that attend to
    them. The bias's gradient is compared for output gradients at the sampled queries alone.
    """
    assert case.additional is None
    wide, dims = torch.promote_types(dtype, torch.float32), len(case.spatial)
    tensors = {
        name: torch.randn(shape, dtype=dtype, device=device).to(wide if name == "rpb" else dtype)
        for name, shape in case.shapes().items()
    }
    rows = case.batch, *case.spatial, case.heads
    grad_output = torch.randn(*rows, case.value_dim, dtype=dtype, device=device)
    grad_lse = torch.randn(rows, dtype=wide, device=device)
    function = partial(function, **case.settings, return_lse=True, **options)
    tokens = prod(case.spatial)
    sample = torch.randperm(tokens, device=device)[:sampled].sort().values

    actual = results(function, tensors, (grad_output, grad_lse))
    known = tensors | {"grad_output": grad_output}
    expected = of_queries(case, known, grad_lse, sample)
    delta = torch.empty_like(grad_lse)
    for image in range(case.batch):  # one at a time: large maps fill the memory
        product = actual["output"][image].to(wide) * grad_output[image]
        delta[image] = product.sum(-1) - grad_lse[image]
    expected |= of_keys(case, known, actual["lse"].detach(), delta, sample)
    bias_pair = expected.pop("grad_rpb")
    for name, pair in expected.items():
        found = actual.pop(name).flatten(1, dims)[:, sample]
        assert_close(name, found, pair[0], tolerance or TOLERANCE[dtype], pair[1])
    actual.clear()
    if case.rpb:
        torch.cuda.empty_cache()  # the largest maps leave no room for its fragments
        for grad in (grad_output, grad_lse):
            flat = grad.flatten(1, dims)
            chosen = flat[:, sample]
            flat.zero_()[:, sample] = chosen
        found = results(function, tensors, (grad_output, grad_lse))["grad_rpb"].flatten(1)
        assert_close("grad_rpb", found, bias_pair[0], tolerance or TOLERANCE[dtype], bias_pair[1])
