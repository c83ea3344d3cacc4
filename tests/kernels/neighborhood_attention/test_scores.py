import pytest
import torch
from oracle import Case, heads_first, random_tensors, scores
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import neighborhood_attention.flops  # noqa: F401 (registers the formulas)
from neighborhood_attention import na1d, na2d, na3d, neighborhood_apply, neighborhood_scores
from neighborhood_attention.backends import reference

ops = torch.ops.neighborhood_attention
CASES = [
    Case((11,), (4,), stride=(3,), dilation=(2,), batch=1, head_dim=4),
    Case((9,), (3,), is_causal=(True,), batch=1, head_dim=4, rpb=False),
    Case((6, 7), (3, 2), dilation=(2, 3), batch=1, heads=4, head_dim=4, key_heads=2, value_dim=3),
    Case((5, 7), (3, 4), stride=(2, 3), is_causal=(True, False), batch=2, head_dim=4),
    Case((3, 4, 5), (3, 2, 2), is_causal=(False, True, False), batch=1, head_dim=4, key_heads=1),
]


def tensors_of(case, dtype=torch.float64):
    tensors = random_tensors(case.shapes(), dtype)
    return tensors["query"], tensors["key"], tensors["value"], tensors.get("rpb")


def fused(case):
    return {1: na1d, 2: na2d, 3: na3d}[len(case.spatial)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_two_halves_are_the_operator(case, monkeypatch):
    monkeypatch.setattr(reference, "MAX_SCORES", 500)  # several pieces
    query, key, value, rpb = (None if t is None else t.requires_grad_() for t in tensors_of(case))
    logits = neighborhood_scores(query, key, *case.window, scale=0.3, rpb=rpb)
    halves = neighborhood_apply(logits.softmax(-1), value, *case.window)
    whole, lse = fused(case)(
        query, key, value, *case.window, scale=0.3, rpb=rpb, return_lse=True, backend="reference"
    )
    torch.testing.assert_close(halves, whole)
    torch.testing.assert_close(logits.logsumexp(-1), lse)
    leaves = [t for t in (query, key, value, rpb) if t is not None]
    grad = torch.randn_like(whole)
    for a, b in zip(*(torch.autograd.grad(o, leaves, grad) for o in (halves, whole)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_stand_in_the_order_of_the_map(case):
    query, key, _, rpb = tensors_of(case)
    actual = neighborhood_scores(query, key, *case.window, rpb=rpb)
    every = scores(case, query, key, rpb, scale=case.head_dim**-0.5)
    rows = heads_first(case, actual)
    for expected, found in zip(every.flatten(0, 2), rows.flatten(0, 2), strict=True):
        torch.testing.assert_close(found[found > -torch.inf], expected[expected > -torch.inf])


def test_a_truncated_window_ends_with_minus_infinity():
    query = torch.randn(1, 4, 1, 8)
    is_key = neighborhood_scores(query, query, 3, is_causal=True)[0, :, 0] > -torch.inf
    assert is_key.tolist() == [
        [True, False, False], [True, True, False], [True, True, True], [True, True, True]
    ]  # fmt: skip


def test_probabilities_without_a_key_are_not_read():
    value = torch.randn(1, 4, 1, 8, requires_grad=True)
    probabilities = torch.rand(1, 4, 1, 3)
    poisoned = probabilities.clone()
    poisoned[0, 0, 0, 1:] = poisoned[0, 1, 0, 2:] = torch.nan
    results = []
    for p in (probabilities, poisoned):
        p.requires_grad_()
        output = neighborhood_apply(p, value, 3, is_causal=True)
        results.append((output, *torch.autograd.grad(output.square().sum(), (p, value))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert not results[0][1][0, 0, 0, 1:].any()


@pytest.mark.parametrize("case", [CASES[2], CASES[3]], ids=str)
def test_gradients_agree_with_finite_differences(case):
    query, key, value, rpb = (t.requires_grad_() for t in tensors_of(case))
    probabilities = neighborhood_scores(query, key, *case.window).softmax(-1).detach()

    def scores_of(query, key, rpb):
        logits = neighborhood_scores(query, key, *case.window, rpb=rpb)
        return logits[logits > -torch.inf]  # the others have no derivative

    def apply(probabilities, value):
        return neighborhood_apply(probabilities, value, *case.window)

    assert torch.autograd.gradcheck(scores_of, (query, key, rpb), fast_mode=True)
    inputs = probabilities.requires_grad_(), value
    assert torch.autograd.gradcheck(apply, inputs, fast_mode=True)


def test_dtypes_are_those_of_scores_and_value():
    query = torch.randn(1, 4, 5, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = neighborhood_scores(query, query, 3)
        output = neighborhood_apply(logits.softmax(-1), query, 3)
    narrow = query.bfloat16()
    assert (logits.dtype, output.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(logits, neighborhood_scores(narrow, narrow, 3))
    assert torch.equal(output, neighborhood_apply(logits.softmax(-1), narrow, 3))


@pytest.mark.parametrize("rpb", [True, False], ids=["rpb", "plain"])
def test_the_operators_keep_pytorchs_rules(rpb):
    query, key, value, bias = tensors_of(CASES[3], torch.float32)
    bias = bias.requires_grad_() if rpb else None
    window = [3, 4, 2, 3, 1, 1, 1, 0]
    scored = query.requires_grad_(), key.requires_grad_(), bias, window, 0.4
    logits = ops.scores(*scored).detach()
    applied = logits.softmax(-1).requires_grad_(), value.requires_grad_(), window
    torch.library.opcheck(ops.scores, scored)
    torch.library.opcheck(ops.apply, applied)
    no_grad = [x.detach() if isinstance(x, torch.Tensor) else x for x in (*scored, *applied)]
    torch.library.opcheck(ops.scores_backward, (torch.randn_like(logits), *no_grad[:5]))
    torch.library.opcheck(ops.apply_backward, (torch.randn_like(value.detach()), *no_grad[5:]))


def test_they_compile_as_one_graph():
    def function(query, value, rpb):
        logits = neighborhood_scores(query, query, 3, rpb=rpb)
        return neighborhood_apply(logits.softmax(-1), value, 3)

    query, value = torch.randn(2, 1, 5, 6, 2, 8)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    outputs = [f(query, value, rpb) for f in (compiled, function)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(o.sum(), rpb) for o in outputs))


def test_a_second_derivative_raises():
    query = torch.randn(1, 5, 1, 4, requires_grad=True)
    probabilities = torch.rand(1, 5, 1, 3, requires_grad=True)
    for result in (
        neighborhood_scores(query, query.detach(), 3),
        neighborhood_apply(probabilities, query, 3),
    ):
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(result.sum(), query, create_graph=True)


HALVES = [
    lambda x: neighborhood_scores(x, x, 3),
    lambda x: neighborhood_apply(x[..., :3], x, 3),
]


@pytest.mark.parametrize("half", HALVES, ids=["scores", "apply"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_derivatives_that_are_not_there_raise(half, compiled):
    def jvp(x):
        return torch.func.jvp(half, (x,), (x,))[1]

    x = torch.randn(1, 5, 1, 4)
    jvp = torch.compile(jvp, backend="aot_eager") if compiled else jvp
    with pytest.raises(Exception, match=r"no derivative in forward mode or under torch\.func's"):
        jvp(x)
    with pytest.raises(NotImplementedError, match=r"torch\.func's transforms"):
        torch.func.grad(lambda x: half(x).sum())(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"in forward mode"):
        half(forward_ad.make_dual(x, x))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("half", HALVES, ids=["scores", "apply"])
def test_vmap_gives_one_result_an_entry(half):
    x = torch.randn(3, 1, 5, 1, 4)
    assert torch.equal(torch.func.vmap(half)(x), torch.stack(list(map(half, x))))


def test_flops_are_those_of_one_product_and_two_in_the_backward():
    query, value = torch.randn(1, 6, 6, 4, 8, requires_grad=True), torch.randn(1, 6, 6, 2, 5)
    with FlopCounterMode(display=False) as counter:
        logits = neighborhood_scores(query, query.detach(), 3)
        neighborhood_apply(logits.softmax(-1), value.requires_grad_(), 3).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 36 * 4 * 9 * (8 + 5)


def good_scores():
    return {"query": torch.ones(2, 6, 7, 2, 4), "key": torch.ones(2, 6, 7, 2, 4), "kernel_size": 3}


def good_apply():
    value = torch.ones(2, 6, 7, 2, 4)
    return {"probabilities": torch.ones(2, 6, 7, 2, 9), "value": value, "kernel_size": 3}


WINDOW_ERRORS = [
    ("kernel_size", (3, 3, 3), ValueError, r"kernel_size=\(3, 3, 3\): expected 2 entries"),
    ("kernel_size", 7, ValueError, r"kernel_size=\(7, 7\).* 7 tokens of axis 0.* at most .* 6"),
    ("kernel_size", 2.5, TypeError, r"kernel_size=2.5: expected int"),
    ("stride", 4, ValueError, r"stride=\(4, 4\): expected 1 <= stride"),
    ("dilation", 0, ValueError, r"dilation=\(0, 0\): expected at least 1"),
    ("is_causal", 1, TypeError, r"is_causal=1: expected bool"),
]
SCORES_ERRORS = [
    ("query", None, TypeError, r"query: expected a tensor, got NoneType"),
    ("query", torch.ones(2, 3, 4), ValueError, r"query: expected \[B, L, .* shape \(2, 3, 4\)"),
    ("query", torch.ones(2, 6, 7, 0, 4), ValueError, r"query: expected a head"),
    ("query", torch.ones(2, 6, 7, 2, 4).int(), TypeError, r"query: expected fp16, .*int32"),
    ("key", torch.ones(2, 6, 7, 2, 5), ValueError, r"key: expected query's shape"),
    ("key", torch.ones(2, 6, 7, 3, 4), ValueError, r"key: .* divides query's 2"),
    ("scale", "1", TypeError, r"scale='1': expected a number"),
    ("rpb", torch.ones(2, 5, 3), ValueError, r"rpb: expected shape .*\(2, 5, 5\), got \(2, 5, 3\)"),
]
APPLY_ERRORS = [
    ("value", None, TypeError, r"value: expected a tensor, got NoneType"),
    ("value", torch.ones(2, 3, 4), ValueError, r"value: expected \[B, L, .* shape \(2, 3, 4\)"),
    ("value", torch.ones(2, 6, 7, 2, 0), ValueError, r"value: .* head dimension"),
    ("probabilities", 1, TypeError, r"probabilities: expected a tensor, got int"),
    ("probabilities", torch.ones(2, 6, 7, 2, 9).long(), TypeError, r"probabilities: .*int64"),
    (
        "probabilities", torch.ones(2, 6, 7, 2, 8), ValueError,
        r"probabilities: expected shape \(2, 6, 7, heads, 9\), got \(2, 6, 7, 2, 8\)",
    ),
    ("probabilities", torch.ones(2, 6, 7, 9), ValueError, r"probabilities: .* got \(2, 6, 7, 9\)"),
    ("probabilities", torch.ones(2, 6, 7, 3, 9), ValueError, r"probabilities: .* value's 2 divide"),
    (
        "probabilities", torch.ones(2, 6, 7, 2, 9, device="meta"), ValueError,
        r"probabilities: expected value's device cpu, got meta",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "good", "name", "value", "error", "message"),
    [(neighborhood_scores, good_scores, *e) for e in SCORES_ERRORS + WINDOW_ERRORS]
    + [(neighborhood_apply, good_apply, *e) for e in APPLY_ERRORS + WINDOW_ERRORS],
)
def test_it_names_the_argument_that_breaks_a_rule(function, good, name, value, error, message):
    function(**good())
    with pytest.raises(error, match=message):
        function(**good() | {name: value})
