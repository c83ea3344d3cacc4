from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from neighborhood_attention import na2d_qkvpacked
from neighborhood_attention.dispatcher import is_idle

OPERATOR = "neighborhood_attention.attention_qkvpacked"


class Recording:
    def __init__(self):
        super().__init__()
        self.seen = []

    def record(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class DispatchMode(Recording, TorchDispatchMode):
    __torch_dispatch__ = Recording.record


class FunctionMode(Recording, TorchFunctionMode):
    __torch_function__ = Recording.record


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
def test_it_is_idle_for_plain_tensors(context):
    with context():
        x = torch.ones(2)
        assert is_idle((x, None, torch.nn.Parameter(x), x.bfloat16()))
        with torch.autocast("cpu"):
            assert is_idle((x,))


@pytest.mark.parametrize("mode", [DispatchMode, FunctionMode, torch.profiler.profile])
def test_it_is_not_idle_while_something_looks_on(mode):
    x = torch.ones(2)
    with mode():
        assert not is_idle((x,))
    assert is_idle((x,))


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.functionalize])
def test_it_is_not_idle_in_a_transform(transform):
    found = []

    def function(x):
        found.append(is_idle((x,)))
        return x

    transform(function)(torch.ones(2))
    assert found == [False]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_it_is_not_idle_while_traced_or_differentiated_forward():
    found = []

    def function(x):
        found.append(is_idle((x,)))
        return x + 1

    torch.jit.trace(function, torch.ones(2), check_trace=False)
    with forward_ad.dual_level():
        function(torch.ones(2))
    assert found == [False, False]


@pytest.mark.parametrize(
    "make",
    [
        torch._neg_view,
        torch.Tensor.to_sparse,
        lambda x: x.to("meta"),
        lambda x: x.as_subclass(Subclass),
    ],
    ids=["negated", "sparse", "meta", "subclass"],
)
def test_it_is_not_idle_for_other_tensors(make):
    x = torch.ones(2)
    assert not is_idle((x, make(x)))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_modes_and_profilers_see_the_operators(requires_grad):
    qkv = torch.randn(1, 4, 4, 3, 1, 8, requires_grad=requires_grad)
    names = [OPERATOR, f"{OPERATOR}_backward"] if requires_grad else [OPERATOR]

    def call():
        output = na2d_qkvpacked(qkv, 3)
        if requires_grad:
            output.sum().backward()

    with DispatchMode() as mode:
        call()
    assert [name.removesuffix(".default") for name in mode.seen if OPERATOR in name] == names
    with torch.profiler.profile() as profile:
        call()
    events = {event.name.replace("::", ".") for event in profile.events()}
    assert events.issuperset(names)
    with FunctionMode() as mode:
        call()
    assert f"{OPERATOR}.default" in mode.seen


def test_a_profiler_of_all_threads_is_seen_in_each():
    with ThreadPoolExecutor(1) as pool, torch.profiler.profile():
        assert not pool.submit(is_idle, [torch.ones(1)]).result()
