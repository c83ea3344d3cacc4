import operator

import pytest
import torch
from compiling import Ahead, Kernel, Operator, compile_operator
from measuring import Deadline
from problem import Problem

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
    kernels = compile_operator(Operator(backend, PROBLEM, "float16", True, False))
    assert len(kernels) >= 2
    assert all(isinstance(kernel, Kernel) and kernel.warps >= 1 for kernel in kernels)
    assert len(list(tmp_path.rglob("*.cubin"))) == len(kernels)


def test_other_processes_work_ahead(capsys):
    work = {"sum": (sum, [1, 2]), "bad": (operator.neg, "x")}
    with Ahead(work) as ahead:
        assert ahead.wait("sum", Deadline(100)) == 3
        assert ahead.wait("bad", Deadline(100)) is None
    assert "bad: TypeError" in capsys.readouterr().out


def test_waiting_ends_at_the_deadline():
    with Ahead({"sum": (sum, [1])}) as ahead, pytest.raises(TimeoutError):
        ahead.wait("sum", Deadline(0))
