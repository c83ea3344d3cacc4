import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Case, check, inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neighborhood_attention import na1d_qkvpacked, na2d_qkvpacked, na3d_qkvpacked
from neighborhood_attention.backends import Inputs, reference
from neighborhood_attention.geometry import Neighborhood

CASES = [
    Case((7, 7), (7, 7)),
    Case((9, 11), (3, 5), dilation=(2, 2)),
    Case((20, 9), (5, 2), dilation=(1, 4), rpb=False),
    Case((13, 10), (4, 3), stride=(2, 3), dilation=(3, 1), is_causal=(True, False), head_dim=24),
    Case((6, 17), (1, 4), stride=(1, 3), dilation=(2, 4), is_causal=(False, True), head_dim=5),
    Case((1, 19), (1, 7)),
]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_definition(case, dtype, device):
    check(na2d_qkvpacked, case, dtype, device, backend="reference")


@st.composite
def cases(draw):
    def axis():
        kernel_size, dilation = draw(st.integers(1, 6)), draw(st.integers(1, 4))
        length = draw(st.integers(kernel_size * dilation, 24))
        return length, kernel_size, draw(st.integers(1, kernel_size)), dilation, draw(st.booleans())

    axes = list(zip(axis(), axis(), strict=True))
    return Case(*axes, batch=draw(st.integers(1, 2)), heads=draw(st.integers(1, 3)),
                head_dim=draw(st.sampled_from([3, 8, 16])), rpb=draw(st.booleans()))  # fmt: skip


@pytest.mark.slow
@settings(max_examples=150)
@given(cases())
def test_agrees_with_the_definition_on_random_problems(case):
    check(na2d_qkvpacked, case, torch.float64, backend="reference")


def test_gradients_in_fp64_agree_with_finite_differences():
    case = Case((6, 5), (3, 2), dilation=(2, 1), batch=1, head_dim=3)
    qkv, rpb = inputs(case, torch.float64)

    def function(qkv, rpb):
        return na2d_qkvpacked(qkv, *case.window, rpb=rpb, return_lse=True, backend="reference")

    assert torch.autograd.gradcheck(function, (qkv.requires_grad_(), rpb.requires_grad_()))


def test_bounded_pieces_change_nothing(monkeypatch):
    monkeypatch.setattr(
        reference, "MAX_SCORES", 1
    )  # one tile of the first axis and one image at a time
    check(
        na2d_qkvpacked,
        Case((20, 9), (5, 3), dilation=(2, 1), batch=3),
        torch.float64,
        backend="reference",
    )


MORE_AXES = [
    (na1d_qkvpacked, Case((40,), (3,), dilation=(2,))),
    (na1d_qkvpacked, Case((70,), (9,), stride=(4,), is_causal=(True,), rpb=False)),
    (na3d_qkvpacked, Case((7, 4, 5), (3, 2, 3), dilation=(2, 1, 1))),
    (na3d_qkvpacked, Case((3, 6, 5), (2, 3, 5), stride=(1, 2, 3), is_causal=(True, False, False))),
]


@pytest.mark.parametrize(
    ("function", "case"), MORE_AXES, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_serves_one_and_three_axes(function, case, device):
    check(function, case, torch.float64, device, backend="reference")


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
