from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Case, check, random_tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neighborhood_attention import na1d, na2d, na2d_qkvpacked, na3d
from neighborhood_attention.backends import Inputs, reference
from neighborhood_attention.geometry import Neighborhood

THREE = {1: na1d, 2: na2d, 3: na3d}
CASES = [
    Case((7, 7), (7, 7)),
    Case((9, 11), (3, 5), dilation=(2, 2)),
    Case((20, 9), (5, 2), dilation=(1, 4), rpb=False),
    Case((13, 10), (4, 3), stride=(2, 3), dilation=(3, 1), is_causal=(True, False), head_dim=24),
    Case((6, 17), (1, 4), stride=(1, 3), dilation=(2, 4), is_causal=(False, True), head_dim=5),
    Case((1, 19), (1, 7)),
    Case((6, 5), (3, 3), heads=1),
]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_definition(case, dtype, device):
    check(na2d_qkvpacked, case, dtype, device, backend="reference")


@st.composite
def cases(draw, dims):
    longest = {1: 48, 2: 16, 3: 8}[dims]

    def axis():
        kernel_size = draw(st.integers(1, 6))
        dilation = draw(st.integers(1, max(1, min(4, longest // kernel_size))))
        length = draw(st.integers(kernel_size * dilation, longest))
        return length, kernel_size, draw(st.integers(1, kernel_size)), dilation, draw(st.booleans())

    axes = list(zip(*(axis() for _ in range(dims)), strict=True))
    key_heads = draw(st.integers(1, 2))
    return Case(
        *axes, batch=draw(st.integers(1, 2)), heads=key_heads * draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 3, 8])), rpb=draw(st.booleans()), key_heads=key_heads,
        value_dim=draw(st.sampled_from([1, 3, 8])),
        additional=draw(st.sampled_from([None, 0, 1, 5])),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dims", [1, 2, 3])
@given(data=st.data())
def test_agrees_with_the_definition_on_random_problems(dims, data):
    check(THREE[dims], data.draw(cases(dims)), torch.float64, backend="reference")


TINY = Case(
    (3, 4), (2, 3), batch=1, heads=2, head_dim=2, key_heads=1, value_dim=1, additional=2,
    stride=(2, 1), is_causal=(False, True),
)  # fmt: skip
NAMES = list(TINY.shapes())


def alone_and_in_pairs(names):
    return [*combinations(names, 1), *combinations(names, 2)]


def joined(names):
    return "+".join(names)


@pytest.mark.slow
@pytest.mark.parametrize("leaves", alone_and_in_pairs(NAMES), ids=joined)
def test_gradients_of_each_tensor_and_pair_agree_with_finite_differences(leaves):
    tensors = random_tensors(TINY.shapes(), torch.float64)

    def function(*changing):
        return na2d(**tensors | dict(zip(leaves, changing, strict=True)), **TINY.settings,
                    return_lse=True, backend="reference")  # fmt: skip

    assert torch.autograd.gradcheck(function, [tensors[name].requires_grad_() for name in leaves])


# What differs from a plain problem of one window size, one of each parameter.
CHANGES = {
    "kernel_size": {"kernel_size": (2, 2)},
    "stride": {"stride": (2, 1)},
    "dilation": {"dilation": (1, 2)},
    "is_causal": {"is_causal": (True, False)},
    "rpb": {"rpb": True},
    "key_heads": {"key_heads": 1},
    "value_dim": {"value_dim": 2},
    "additional": {"additional": 2},
    "scale": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", alone_and_in_pairs(CHANGES), ids=joined)
def test_gradients_with_each_parameter_and_pair_agree_with_finite_differences(changes):
    plain = {"spatial": (5, 6), "kernel_size": (3, 3), "batch": 1, "head_dim": 3, "rpb": False}
    case = Case(**plain | {k: v for name in changes for k, v in CHANGES[name].items()})
    scale = 0.7 if "scale" in changes else None
    tensors = random_tensors(case.shapes(), torch.float64)

    def function(*leaves):
        return na2d(**dict(zip(tensors, leaves, strict=True)), **case.settings, scale=scale,
                    return_lse=True, backend="reference")  # fmt: skip

    leaves = [tensor.requires_grad_() for tensor in tensors.values()]
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_bounded_pieces_change_nothing(monkeypatch):
    # One tile of the first axis and one image at a time.
    monkeypatch.setattr(reference, "MAX_SCORES", 1)
    case = Case((20, 9), (5, 3), dilation=(2, 1), batch=3, heads=4, key_heads=2, additional=3)
    check(na2d, case, torch.float64, backend="reference")


MORE = [
    Case((40,), (3,), dilation=(2,)),
    Case((70,), (9,), stride=(4,), is_causal=(True,), rpb=False),
    Case((7, 4, 5), (3, 2, 3), dilation=(2, 1, 1)),
    Case((3, 6, 5), (2, 3, 5), stride=(1, 2, 3), is_causal=(True, False, False)),
    Case((9,), (4,), heads=6, key_heads=2, value_dim=40, additional=1),
    Case((6, 9), (3, 4), heads=4, key_heads=1, value_dim=8, additional=100, rpb=False),
    Case((5, 3, 4), (2, 3, 2), heads=4, key_heads=2, additional=0, is_causal=(False, True, True)),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MORE, ids=str)
def test_serves_every_number_of_axes_and_heads(case, dtype, device):
    check(THREE[len(case.spatial)], case, dtype, device, backend="reference")


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest result of any operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_never_holds_a_matrix_of_all_pairs_of_tokens():
    window = Neighborhood((7, 7), (1, 1), (1, 1), (False, False))
    query, key, value = torch.randn(3, 1, 64, 64, 1, 8).unbind()
    problem = Inputs(query, key, value, torch.randn(1, 13, 13))
    gradients = Inputs(*map(torch.empty_like, problem[:4]))
    with LargestTensor() as largest:
        output, lse = reference.forward(problem, window, 0.3)
        reference.backward(query, None, problem, output, lse, window, 0.3, gradients)
    assert 64 * 64 * 49 < largest.elements < 0.1 * (64 * 64) ** 2
