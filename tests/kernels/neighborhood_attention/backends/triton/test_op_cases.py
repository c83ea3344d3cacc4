"""Every size of `op_cases.json` on a GPU; each case in one dtype, which goes round.

The kernels are compiled first, in parallel; with pytest-xdist the first process does it for all.
"""

import fcntl
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from math import prod

import oracle
import pytest
import torch
import windowed
from op_cases import op_cases, pairs_of_tokens
from oracle import Case

from neighborhood_attention import na1d, na2d, na3d

FUNCTIONS = {1: na1d, 2: na2d, 3: na3d}
DTYPES = torch.float16, torch.bfloat16, torch.float32
SAMPLED = 1000
WHOLE = 2**24  # scores of all pairs that fit into memory several times, in fp64
LARGE = 2**30  # scores within windows; their tables and sums, or their tensors, fit once
LARGE_MAP = 2**20  # rows of the output; with the sums for its bias, they fit a few times


def scores(case):
    return case.batch * case.heads * prod(case.spatial) * prod(case.kernel_size)


def needs_much_memory(case):
    """A gigabyte and more: by its scores, or by the elements of a tensor."""
    return scores(case) > LARGE or case.batch * case.heads * prod(case.spatial) > LARGE_MAP


def dtype_of(number, case):
    """Another dtype for each mask and for each size; what is large takes 16 bits."""
    return torch.float16 if scores(case) > LARGE else DTYPES[(number + number // 3) % 3]


CASES = [(case, dtype_of(number, case)) for number, case in enumerate(op_cases())]


@pytest.fixture(scope="session")
def compiled(request, workers_folder):
    """The kernels of all cases that this run selects."""
    import compile_ahead

    calls = [getattr(item, "callspec", None) for item in request.session.items]
    selected = [call.params["problem"] for call in calls if call and "problem" in call.params]
    with open(workers_folder / "compiled", "a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if lock.seek(0, os.SEEK_END) > 0:
            return
        spawn = multiprocessing.get_context("spawn")  # a fork cannot use the GPU
        with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
            for problem in selected:  # whatever fails here fails in its test
                pool.submit(compile_ahead.compile_case, *problem)
        lock.write("done")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "problem", CASES, ids=[f"{case}-b{case.batch}-{dtype}" for case, dtype in CASES]
)
def test_agrees_with_the_definition(problem, compiled, much_memory):
    case, dtype = problem
    function = FUNCTIONS[len(case.spatial)]
    if pairs_of_tokens(case) <= WHOLE:
        oracle.check(function, case, dtype, "cuda", backend="fused")
        return
    if needs_much_memory(case):
        much_memory()
    windowed.check(function, case, dtype, "cuda", SAMPLED, backend="fused")


@pytest.mark.parametrize(
    "case",
    [
        Case((10, 13), (3, 3), dilation=(2, 3), heads=4, key_heads=2, value_dim=24),
        Case((37,), (5,), dilation=(2,), rpb=False),
        Case((4, 5, 6), (3, 2, 3), is_causal=(True, False, False), key_heads=1),
        Case((3, 9, 8), (1, 3, 4), (1, 2, 2), (3, 1, 2), value_dim=8),
        Case((12, 12), (5, 5), (2, 2), is_causal=(False, True)),
        Case((30,), (9,), (3,), is_causal=(True,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("sampled", [11, 1000])
def test_the_definition_on_a_sample_is_the_definition(case, sampled, monkeypatch):
    monkeypatch.setattr(windowed, "GATHERED", 2**14)  # several pieces

    def attention(return_lse, kernel_size, stride, dilation, is_causal, **tensors):
        return oracle.attention(case, **tensors, scale=case.head_dim**-0.5)

    windowed.check(attention, case, torch.float64, "cpu", sampled)


@pytest.mark.parametrize("name", ["query", "key", "value", "rpb"])
def test_a_wrong_gradient_is_seen_on_a_sample(name):
    case = Case((9, 10), (3, 3))

    def attention(return_lse, kernel_size, stride, dilation, is_causal, **tensors):
        tensors[name].register_hook(lambda grad: 1.01 * grad)
        return oracle.attention(case, **tensors, scale=case.head_dim**-0.5)

    with pytest.raises(AssertionError, match=f"grad_{name}: error"):
        windowed.check(attention, case, torch.float64, "cpu", 20, tolerance=1e-3)
