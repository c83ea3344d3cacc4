import pytest
import torch

from neighborhood_attention import merge_attentions, na2d


def dense(query, keys, values):
    """Attention over all keys: output and log-sum-exp of [..., tokens, D]."""
    scores = query @ keys.mT
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.fixture
def tensors():
    query, keys, values = (torch.randn(n, 8, dtype=torch.float64) for n in (5, 12, 12))
    return [tensor.requires_grad_() for tensor in (query, keys, values)]


@pytest.mark.parametrize("cuts", [(12,), (4, 8), (1, 2, 9)], ids=str)
def test_parts_give_the_attention_over_all_keys(tensors, cuts):
    query, keys, values = tensors
    whole = dense(*tensors)
    parts = [dense(query, *kv) for kv in zip(keys.split(cuts), values.split(cuts), strict=True)]
    merged = merge_attentions(*zip(*parts, strict=True))
    grads = [torch.randn_like(x) for x in whole]
    for a, b in zip(merged, whole, strict=True):
        torch.testing.assert_close(a, b)
    actual, expected = (torch.autograd.grad(x, tensors, grads) for x in (merged, whole))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_merges_can_be_merged(tensors):
    query, keys, values = tensors
    a, b, c = (dense(query, keys[i::3], values[i::3]) for i in range(3))
    first = merge_attentions(*zip(a, b, strict=True))
    for x, y in zip(merge_attentions(*zip(first, c, strict=True)), dense(*tensors), strict=True):
        torch.testing.assert_close(x, y)


def test_nothing_is_changed_in_place_and_the_dtype_stays():
    query, key, value = torch.randn(3, 1, 6, 6, 2, 8).bfloat16().unbind()
    parts = [na2d(query, key, value, k, return_lse=True) for k in (3, 5)]
    before = [[t.clone() for t in part] for part in parts]
    output, lse = merge_attentions(*zip(*parts, strict=True))
    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    for part, copies in zip(parts, before, strict=True):
        assert all(torch.equal(t, copy) for t, copy in zip(part, copies, strict=True))


@pytest.mark.parametrize(
    ("shapes", "lse_shapes", "message"),
    [
        ([], [], r"outputs, lses: .* got 0 and 0"),
        ([(2, 4)], [(2,), (2,)], r"outputs, lses: .* got 1 and 2"),
        ([(2, 4), (3, 4)], [(2,), (3,)], r"outputs\[1\], lses\[1\]: .* \(2, 4\) and \(2,\)"),
        ([(2, 4)], [(4,)], r"outputs\[0\], lses\[0\]: .* got \(2, 4\) and \(4,\)"),
    ],
)
def test_what_does_not_belong_together_is_refused(shapes, lse_shapes, message):
    with pytest.raises(ValueError, match=message):
        merge_attentions([torch.ones(s) for s in shapes], [torch.ones(s) for s in lse_shapes])
