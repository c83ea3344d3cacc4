"""What every backend promises, and the choice among them."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from oracle import Case, check, inputs, random_gradients, random_tensors, results, run

from neighborhood_attention import list_backends, na1d, na2d, na2d_qkvpacked, resolve_backend

GROUPED = Case(
    (3, 6), (3, 2), dilation=(1, 2), batch=1, heads=2, head_dim=12, key_heads=1, value_dim=9,
    additional=3,
)  # fmt: skip


def grads_of(case, device):
    return random_gradients(case, torch.float32, device)


def three(case, **options):
    """`na2d` of the case's tensors alone."""
    return partial(na2d, **case.settings, return_lse=True, **options)


def assert_equal(actual, expected):
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        actual, expected = actual.values(), expected.values()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def in_fresh_process(code):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4] / "kernels")}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def test_the_names_are_known():
    assert set(list_backends()) == {"reference", "fused", "naive", "gemm"}
    assert list_backends()[0] == "fused"
    assert resolve_backend("cpu") == "reference"
    assert resolve_backend("cuda") == "fused"
    assert resolve_backend("meta") == "reference"


@pytest.mark.parametrize("name", ["banana", "cuda:0", "", 0, None, [], torch.device("cuda")])
def test_what_is_no_type_of_device_is_refused(name):
    rule = "expected a type of device as 'cpu' or 'cuda'"
    with pytest.raises(ValueError, match=f"{re.escape(f'device_type={name!r}')}: {rule}"):
        resolve_backend(name)


def test_attention_on_the_cpu_needs_no_triton():
    code = (
        "import sys, torch, neighborhood_attention as na;"
        "na.na2d_qkvpacked(torch.ones(1, 4, 4, 3, 1, 8, requires_grad=True), 3).sum().backward();"
        "assert 'triton' not in sys.modules"
    )
    assert in_fresh_process(code).returncode == 0


def test_the_fused_backend_names_a_missing_triton():
    code = (
        "import sys; sys.modules['triton'] = None;"
        "import torch, neighborhood_attention as na;"
        "na.na2d_qkvpacked(torch.ones(1, 4, 4, 3, 1, 8), 3, backend='fused')"
    )
    error = in_fresh_process(code).stderr.splitlines()[-1]
    assert error == (
        "NotImplementedError: backend='fused' needs the package triton, which is not installed"
    )


@pytest.mark.parametrize("kernel_size", [3, 6], ids=["window", "whole map"])
def test_a_backend_that_is_named_is_used_or_raises(kernel_size, device):
    qkv = torch.randn(1, 6, 6, 3, 1, 8, dtype=torch.float64, device=device)
    with pytest.raises(NotImplementedError, match=r"backend='fused' .*use backend='reference'"):
        na2d_qkvpacked(qkv, kernel_size, backend="fused")
    na2d_qkvpacked(qkv, kernel_size)


def test_an_empty_batch_gives_empty_results(backend, device):
    case = Case((4, 5), (3, 3), batch=0, heads=1, head_dim=8)
    qkv, rpb = inputs(case, torch.float32, device)
    output, lse, grad_qkv, grad_rpb = run(
        na2d_qkvpacked, case, qkv, rpb, *grads_of(case, device), backend=backend
    )
    assert output.shape == (0, 4, 5, 1, 8)
    assert lse.shape == (0, 4, 5, 1)
    assert grad_qkv.shape == qkv.shape
    assert torch.equal(grad_rpb, torch.zeros_like(rpb))


def test_an_empty_batch_has_a_gradient_for_everything(backend, device):
    case = replace(GROUPED, batch=0)
    tensors = random_tensors(case.shapes(), torch.float32, device)
    found = results(three(case, backend=backend), tensors, grads_of(case, device))
    assert found["output"].shape == (0, 3, 6, 2, 9)
    for name, tensor in tensors.items():
        assert torch.equal(found[f"grad_{name}"], torch.zeros_like(tensor))


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1), (1, 1), batch=1, heads=1, head_dim=8),
        Case((1, 5), (1, 3), batch=1, heads=1, head_dim=8),
        Case((4, 3), (1, 1), dilation=(2, 3), batch=1, heads=1, head_dim=8),
    ],
    ids=str,
)
def test_axes_and_windows_of_one_token_are_served(case, backend, device):
    check(na2d_qkvpacked, case, torch.float32, device, backend=backend)


def test_a_scale_of_zero_is_not_the_default(backend, device):
    case = Case((3, 4), (3, 3), batch=1, heads=1, head_dim=8, rpb=False)
    qkv, _ = inputs(case, torch.float32, device)
    output, lse = na2d_qkvpacked(qkv, 3, scale=0.0, return_lse=True, backend=backend)
    means = torch.stack([qkv[:, :, first : first + 3, 2].mean((1, 2)) for first in (0, 0, 1, 1)], 1)
    torch.testing.assert_close(output, means[:, None].expand_as(output))
    torch.testing.assert_close(lse, torch.full_like(lse, 9).log())


def test_a_scale_may_be_negative(backend, device):
    case = Case((5, 4), (3, 3), batch=1, heads=2, head_dim=8, additional=3)
    check(na2d, case, torch.float32, device, scale=-0.7, backend=backend)


def test_any_strides_are_served(backend, device):
    case = Case((3, 5), (3, 3), batch=2, heads=2, head_dim=8)
    qkv, rpb = inputs(case, torch.float32, device)
    grads = grads_of(case, device)
    heads_first, channels_first, plain = (0, 3, 1, 2, 4), (0, 3, 4, 1, 2), (0, 1, 2, 3, 4)

    def restrided(qkv, *window, **options):
        parts = [
            x.permute(order).contiguous().permute([order.index(axis) for axis in range(5)])
            for x, order in zip(qkv.unbind(3), (heads_first, channels_first, plain), strict=True)
        ]
        return na2d(*parts, *window, **options)

    strided_bias = rpb.mT.contiguous().mT
    strided_grads = [grad.mT.contiguous().mT for grad in grads]
    assert_equal(
        run(restrided, case, qkv, strided_bias, *strided_grads, backend=backend),
        run(na2d_qkvpacked, case, qkv, rpb, *grads, backend=backend),
    )


def test_any_strides_of_every_tensor_are_served(backend, device):
    tensors = random_tensors(GROUPED.shapes(), torch.float32, device)
    grads = grads_of(GROUPED, device)
    # The last axis is not the contiguous one, in any of them.
    turned = [
        [x.transpose(-1, 1).contiguous().transpose(-1, 1) for x in group]
        for group in (tensors.values(), grads)
    ]
    function = three(GROUPED, backend=backend)
    found = results(function, dict(zip(tensors, turned[0], strict=True)), turned[1])
    torch.testing.assert_close(found, results(function, tensors, grads))


def test_an_expanded_gradient_is_served(backend, device):
    case = Case((4, 5), (3, 3), batch=1, heads=1, head_dim=8)
    qkv, rpb = inputs(case, torch.float32, device)
    ones = torch.ones((), device=device)
    expanded = ones.expand(1, 4, 5, 1, 8), ones.expand(1, 4, 5, 1)
    assert_equal(
        run(na2d_qkvpacked, case, qkv, rpb, *expanded, backend=backend),
        run(na2d_qkvpacked, case, qkv, rpb, *(g.clone() for g in expanded), backend=backend),
    )


def test_nothing_around_the_views_is_read_into_a_result(backend, device):
    case = Case((3, 7), (3, 3), dilation=(1, 2), batch=1, head_dim=12)
    qkv, rpb = inputs(case, torch.float32, device)
    grads = grads_of(case, device)
    plain = run(na2d_qkvpacked, case, qkv, rpb, *grads, backend=backend)
    poisoned = torch.full((1, 5, 11, 3, 2, 15), torch.nan, device=device)
    inside = poisoned[:, 1:4, 2:9, :, :, 1:13]
    inside.copy_(qkv)
    assert_equal(run(na2d_qkvpacked, case, inside, rpb, *grads, backend=backend), plain)


def test_nothing_around_any_tensor_is_read_into_a_result(backend, device):
    def surrounded(tensor):
        large = torch.full([n + 2 for n in tensor.shape], torch.nan, device=device)
        return large[(slice(1, -1),) * tensor.dim()].copy_(tensor)

    tensors = random_tensors(GROUPED.shapes(), torch.float32, device)
    grads = grads_of(GROUPED, device)
    function = three(GROUPED, backend=backend)
    poisoned = {name: surrounded(tensor) for name, tensor in tensors.items()}
    assert_equal(
        results(function, poisoned, list(map(surrounded, grads))),
        results(function, tensors, grads),
    )


# With the second, products of a query (or a gradient) with what lies outside its window overflow.
@pytest.mark.parametrize("huge", [1e4, 3e37])
def test_what_lies_outside_a_window_changes_nothing(huge, backend, device):
    case = Case((3, 10), (3, 3), batch=1, heads=1)
    quiet, rpb = inputs(case, torch.float32, device)
    grad_output, _ = grads_of(case, device)
    grad_output *= 100
    # The queries of columns 0 to 5 see columns 0 to 6; the others have no influence.
    quiet[:, :, 6:, 0] = grad_output[:, :, 6:] = 0
    loud = quiet.clone()
    loud[:, :, 7:, 1] = 10 * huge * quiet[:, :, 5:6, 0].sign()
    loud[:, :, 7:, 2] = huge
    results = []
    for qkv in (quiet, loud):
        qkv = qkv.clone().requires_grad_()
        output = na2d_qkvpacked(qkv, 3, rpb=rpb, backend=backend)
        (grad,) = torch.autograd.grad(output, qkv, grad_output)
        results.append((output[:, :, :6], grad[:, :, :6], grad[:, :, 7:]))
    assert_equal(results[1][:2], results[0][:2])
    assert not results[1][2].any()


@pytest.mark.parametrize("huge", [1e4, 3e37])
def test_what_lies_outside_a_window_changes_nothing_with_grouped_heads(huge, backend, device):
    case = Case((20,), (3,), batch=1, head_dim=8, key_heads=1, value_dim=12, additional=2)
    tensors = random_tensors(case.shapes(), torch.float32, device)
    grad_output, _ = grads_of(case, device)
    # The queries up to 15 see keys up to 16; the others have no influence.
    tensors["query"][:, 16:] = grad_output[:, 16:] = 0
    loud = {name: tensor.clone() for name, tensor in tensors.items()}
    loud["key"][:, 17:] = 10 * huge * tensors["query"][:, 15:16, :1].sign()
    loud["value"][:, 17:] = huge
    found = []
    for leaves in (tensors, loud):
        leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
        output = na1d(**leaves, **case.settings, backend=backend)
        names = [name for name in leaves if name != "rpb"]  # its sums go over all queries
        grads = torch.autograd.grad(output, [leaves[name] for name in names], grad_output)
        found.append((output[:, :16], dict(zip(names, grads, strict=True))))
    (quiet_output, quiet), (loud_output, noisy) = found
    assert torch.equal(loud_output, quiet_output)
    for name in ("query", "key", "value"):
        assert torch.equal(noisy[name][:, :16], quiet[name][:, :16])
    for name in ("additional_keys", "additional_values"):
        assert torch.equal(noisy[name], quiet[name])
    assert not noisy["key"][:, 17:].any()
    assert not noisy["value"][:, 17:].any()


def test_equal_inputs_give_equal_bits_in_every_gradient(backend, device):
    tensors = random_tensors(GROUPED.shapes(), torch.float32, device)
    grads = grads_of(GROUPED, device)
    first, second = (results(three(GROUPED, backend=backend), tensors, grads) for _ in range(2))
    assert_equal(first, second)


def test_equal_inputs_give_equal_bits(backend, device):
    case = Case((4, 9), (3, 3), batch=2, heads=1, head_dim=8)
    if device.type == "cuda":
        case = Case((56, 56), (7, 7), batch=8, heads=2, head_dim=32)
    qkv, rpb = inputs(case, torch.float32, device)
    grads = grads_of(case, device)
    first, second = (run(na2d_qkvpacked, case, qkv, rpb, *grads, backend=backend) for _ in range(2))
    assert_equal(first, second)
