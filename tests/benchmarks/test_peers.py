import peers
import pytest
import torch
from problem import Exact, Problem, random_tensors

PROBLEMS = {
    str(p): p
    for p in [
        Problem((9, 11), 2, 16, (3, 5), (2, 1), 2),
        Problem((6, 6), 2, 16, (3, 3), (2, 2), 3),  # each dilation group is one window
        Problem((5, 7), 3, 16, (5, 7), (1, 1), 2),
        Problem((70,), 2, 16, (9,), (3,), 1),
        Problem((5, 6, 7), 2, 16, (3, 2, 3), (1, 2, 1), 2),
    ]
}


@pytest.mark.parametrize("bias", [True, False], ids=["rpb", "plain"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("provider", ["reference", "gathered", "flex", "sdpa"])
def test_all_compute_the_same(provider, name, bias):
    problem = PROBLEMS[name]
    tensors = random_tensors(problem, torch.float32, bias, "cpu")
    exact = Exact(problem, tensors, 1e-5)
    calls = list(peers.PROVIDERS[provider].prepare(problem, tensors))
    if provider == "sdpa":
        calls = [call for call in calls if call.label == "flash"]  # what there is on a CPU
    assert calls
    for call in calls:
        if provider in ("flex", "sdpa"):  # no gradients on a CPU
            call._leaves = [leaf.detach() for leaf in call._leaves]
            found = peers.results(call, None)
        else:
            found = peers.results(call, exact.grad)
            assert len(found) == 4 + bias
        assert max(exact.errors(found).values()) < 1e-5


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_tiled_order_has_every_token_once(name):
    problem = PROBLEMS[name]
    order = peers.tiled_order(problem, (2,) * problem.dims)
    assert order.sort().values.tolist() == list(range(problem.tokens))


def test_tiles_lie_in_one_dilation_group():
    order = peers.tiled_order(Problem((8, 8), 1, 16, (3, 3), (2, 2), 1), (2, 2))
    assert order[:4].tolist() == [0, 2, 16, 18]  # rows 0 and 2, columns 0 and 2


def test_dense_attention_is_a_window_as_large_as_the_map(on_cpu):
    on_cpu(peers)
    problem = Problem((5, 6), 2, 16, (3, 3), (1, 1), 2)
    whole = Problem((5, 6), 2, 16, (5, 6), (1, 1), 2)
    tensors = random_tensors(problem, torch.float32, False, "cpu")
    dense = peers.PROVIDERS["dense"]
    found = peers.measure(dense, problem, tensors, Exact(whole, tensors, 1e-5))
    assert found["backward"]["way"] == "flash"
    found = peers.measure(dense, problem, tensors, Exact(problem, tensors, 1e-5))
    assert "wrong results" in found["failures"]["flash forward"]


def test_masks_that_are_too_large_are_refused():
    problem = Problem((96, 96), 6, 32, (7, 7), (1, 1), 128)
    sdpa = peers.PROVIDERS["sdpa"]
    assert sdpa.refuses(problem, True, True)
    assert sdpa.refuses(problem, True, False) is None


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False], ids=["rpb", "plain"])
@pytest.mark.parametrize("provider", [*peers.GENERATIONS, "flex", "sdpa", "gathered"])
def test_both_passes_have_a_time_on_a_gpu(provider, bias):
    problem = Problem((20, 24), 2, 32, (5, 5), (2, 1), 4)
    tensors = random_tensors(problem, torch.float16, bias)
    with torch.cuda.stream(torch.cuda.Stream()):
        found = peers.measure(
            peers.PROVIDERS[provider], problem, tensors, Exact(problem, tensors, 5e-3)
        )
    assert found["forward"]["us"] > 0, found["failures"]
    assert found["backward"]["us"] > 0, found["failures"]
