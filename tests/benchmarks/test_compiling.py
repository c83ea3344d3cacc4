import operator
from functools import partial

import pytest
import torch
from compiling import Kernel, OperatorPass, parts_of, wait
from peers import PROVIDERS
from problem import Problem

from neighborhood_attention.tune.ahead import Ahead
from neighborhood_attention.tune.records import Deadline

PROBLEM = Problem((9, 10), 2, 32, (3, 3), (1, 1), 4)


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """Compiles into a folder of its own, without a GPU for one."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, _):
            return 0

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    if not torch.cuda.is_available():
        monkeypatch.setattr(driver, "_active", Driver())


@pytest.mark.parametrize("backend", ["fused", "naive"])
def test_kernels_are_compiled_without_a_gpu(hopper, backend, tmp_path):
    kernels = OperatorPass(backend, PROBLEM, "float16", True, False)()
    assert len(kernels) >= 2
    assert all(isinstance(kernel, Kernel) and kernel.warps >= 1 for kernel in kernels)
    assert len(list(tmp_path.rglob("*.cubin"))) == len(kernels)


def test_a_failure_ahead_is_told_once(capsys):
    good, bad = partial(sum, [1, 2]), partial(operator.neg, "x")
    with Ahead([good, bad]) as ahead:
        assert wait(ahead, good, Deadline(100)) == 3
        assert wait(ahead, bad, Deadline(100)) is None
        assert wait(ahead, bad, Deadline(100)) is None
    assert capsys.readouterr().out.count("TypeError") == 1


def test_each_pass_of_our_kernels_is_a_part_and_a_peer_is_one():
    parts = [
        parts_of(PROVIDERS[name], PROBLEM, "float16", False) for name in ("fused", "flex", "dense")
    ]
    assert [len(found) for found in parts] == [2, 1, 0]
