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


def branches(device):
    """Two branches of four queries; the first is empty for queries 0 and 1, the second for 0."""
    outputs = torch.randn(2, 4, 8, dtype=torch.float64, device=device)
    lses = torch.randn(2, 4, dtype=torch.float64, device=device)
    lses[0, :2], lses[1, 0] = -torch.inf, -torch.inf
    return outputs, lses


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 3.0], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_empty_branch_contributes_nothing(garbage, compiled, device):
    outputs, lses = branches(device)
    outputs[lses == -torch.inf] = garbage
    leaves = [x.requires_grad_() for x in (*outputs.unbind(), *lses.unbind())]
    merge = merge_attentions
    if compiled:
        merge = torch.compile(merge, backend="aot_eager", fullgraph=True)
    output, lse = merge(leaves[:2], leaves[2:])
    assert torch.equal(output[0], torch.zeros_like(output[0]))
    assert lse[0] == -torch.inf
    assert torch.equal(output[1], leaves[1][1])
    assert torch.equal(lse[1], leaves[3][1])

    grad_output, grad_lse = torch.randn_like(output), torch.randn_like(lse)
    grads = torch.autograd.grad((output, lse), leaves, (grad_output, grad_lse))
    for grad, empty in zip(grads, (2, 1, 2, 1), strict=True):
        assert torch.equal(grad[:empty], torch.zeros_like(grad[:empty]))
    assert torch.equal(grads[1][1], grad_output[1])
    torch.testing.assert_close(grads[3][1], grad_lse[1])
    assert all(grad[2:].isfinite().all() for grad in grads)


def test_an_empty_branch_leaves_the_others_to_the_bit(device):
    parts = [(torch.randn(5, 8, device=device), torch.randn(5, device=device)) for _ in range(2)]
    empty = torch.full((5, 8), torch.nan, device=device), torch.full((5,), -torch.inf).to(device)
    expected = merge_attentions(*zip(*parts, strict=True))
    for place in range(3):
        found = merge_attentions(*zip(*parts[:place], empty, *parts[place:], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_merge_of_nothing_can_be_merged(device):
    outputs, lses = branches(device)
    (nothing, minus_inf), last = (x[:1].requires_grad_() for x in (outputs[0], lses[0])), outputs[1]
    merged = merge_attentions([nothing, nothing], [minus_inf, minus_inf])
    output, lse = merge_attentions([merged[0], last[:1]], [merged[1], torch.ones_like(merged[1])])
    torch.testing.assert_close((output, lse), (last[:1], torch.ones_like(lse)))
    for grad in torch.autograd.grad(output.sum() + lse.sum(), (nothing, minus_inf)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_nan_of_a_branch_with_keys_is_not_hidden():
    outputs, lses = torch.ones(2, 3, 8), torch.zeros(2, 3)
    outputs[0, 0], lses[0, 1] = torch.nan, torch.nan
    output, lse = merge_attentions([*outputs], [*lses])
    assert output.isnan().all(-1).tolist() == [True, True, False]
    assert lse.isnan().tolist() == [False, True, False]


def test_gradients_of_both_orders(device):
    # Queries with keys in both branches: there are no finite differences of -inf.
    outputs, lses = (x[:, 2:].requires_grad_() for x in branches(device))

    def merge(outputs, lses):
        return merge_attentions(outputs.unbind(), lses.unbind())

    assert torch.autograd.gradcheck(merge, (outputs, lses), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(merge, (outputs, lses))


@pytest.mark.parametrize("lse_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_branch_stays_as_it_is_in_every_dtype(dtype, lse_dtype, device):
    output = torch.randn(4, 8, dtype=torch.float64, device=device).to(dtype)
    lse = torch.randn(4, dtype=lse_dtype, device=device)
    for merged, alone in zip(merge_attentions([output], [lse]), (output, lse), strict=True):
        assert merged.dtype == alone.dtype
        assert torch.equal(merged, alone)
        assert merged.data_ptr() != alone.data_ptr()


OUTPUT, LSE = torch.ones(2, 4), torch.ones(2)


@pytest.mark.parametrize(
    ("outputs", "lses", "error", "message"),
    [
        (torch.ones(2, 2, 4), [LSE, LSE], TypeError, "outputs: expected a sequence .* Tensor"),
        ([OUTPUT, OUTPUT], torch.ones(2, 2), TypeError, "lses: expected a sequence .* got Tensor"),
        (None, [LSE], TypeError, "outputs: expected a sequence of tensors, got NoneType"),
        (iter([OUTPUT]), [LSE], TypeError, "outputs: expected a sequence .* got list_iterator"),
        ([], [], ValueError, "outputs, lses: .* got 0 and 0"),
        ([OUTPUT], [LSE, LSE], ValueError, "outputs, lses: .* got 1 and 2"),
        ([None], [LSE], TypeError, r"outputs: expected a sequence .* got \['NoneType'\]"),
        ([OUTPUT], "x", TypeError, r"lses: expected a sequence of tensors, got \['str'\]"),
        ([OUTPUT] * 2, [LSE, 1.0], TypeError, r"lses: .* got \['Tensor', 'float'\]"),
        ([LSE[0]], [LSE[0]], ValueError, r"outputs\[0\]: expected \[\.\.\., D\], got shape \(\)"),
        ([OUTPUT, torch.ones(3, 4)], [LSE, LSE], ValueError,
         r"outputs\[1\]: expected shape \(2, 4\), got \(3, 4\)"),
        ([OUTPUT], [torch.ones(4)], ValueError, r"lses\[0\]: expected shape \(2,\), got \(4,\)"),
        ([OUTPUT.int()], [LSE], TypeError, r"outputs\[0\]: expected fp16, .* got torch.int32"),
        ([OUTPUT, OUTPUT.half()], [LSE, LSE], TypeError,
         r"outputs\[1\]: expected torch.float32 as the first, got torch.float16"),
        ([OUTPUT], [LSE.half()], TypeError, r"lses\[0\]: expected fp32 or fp64, .*float16"),
        ([OUTPUT], [LSE.long()], TypeError, r"lses\[0\]: expected fp32 or fp64, .*int64"),
        ([OUTPUT, OUTPUT], [LSE, LSE.double()], TypeError,
         r"lses\[1\]: expected torch.float32 as the first, got torch.float64"),
        ([OUTPUT, OUTPUT.to("meta")], [LSE, LSE], ValueError,
         r"outputs\[1\]: expected outputs\[0\]'s device cpu, got meta"),
        ([OUTPUT], [LSE.to("meta")], ValueError,
         r"lses\[0\]: expected outputs\[0\]'s device cpu, got meta"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_refused(outputs, lses, error, message):
    with pytest.raises(error, match=message):
        merge_attentions(outputs, lses)
