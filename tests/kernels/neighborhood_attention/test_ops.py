import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from neighborhood_attention import na2d, na2d_qkvpacked

ops = torch.ops.neighborhood_attention
SETTINGS = ([3, 2, 1, 1, 2, 1, 0, 0], 0.4, "reference")


def problem(batch=2, requires_grad=False, rpb=True):
    # Not contiguous, unlike the results.
    qkv = torch.randn(batch, 6, 5, 2, 3, 4).transpose(3, 4).requires_grad_(requires_grad)
    return qkv, torch.randn(2, 5, 3, requires_grad=requires_grad) if rpb else None


@pytest.mark.parametrize("rpb", [True, False], ids=["rpb", "plain"])
def test_the_operators_keep_pytorchs_rules(rpb):
    qkv, bias = problem(requires_grad=True, rpb=rpb)
    query, key, value = (x.detach().requires_grad_() for x in qkv.unbind(3))
    torch.library.opcheck(ops.attention_qkvpacked, (qkv, bias, *SETTINGS))
    torch.library.opcheck(ops.attention, (query, key, value, bias, None, None, *SETTINGS))


@pytest.mark.parametrize("rpb", [True, False], ids=["rpb", "plain"])
@pytest.mark.parametrize("with_lse", [True, False], ids=["lse", "output"])
def test_the_backward_operators_keep_pytorchs_rules(rpb, with_lse):
    qkv, bias = problem(rpb=rpb)
    output, lse = ops.attention_qkvpacked(qkv, bias, *SETTINGS)
    grads = torch.randn_like(output), torch.randn_like(lse) if with_lse else None
    results = *SETTINGS, output, lse, *grads
    torch.library.opcheck(ops.attention_qkvpacked_backward, (qkv, bias, *results, [True, rpb]))
    needed = [True, True, True, rpb, False, False]
    torch.library.opcheck(
        ops.attention_backward, (*qkv.unbind(3), bias, None, None, *results, needed)
    )


def packed(qkv, rpb):
    return na2d_qkvpacked(qkv, (3, 2), dilation=(2, 1), rpb=rpb, return_lse=True)


def three(qkv, rpb):
    return na2d(*qkv.unbind(3), (3, 2), dilation=(2, 1), rpb=rpb, return_lse=True)


def results(function, qkv, rpb):
    output, lse = function(qkv, rpb)
    return [output, lse, *torch.autograd.grad(output.square().sum() + lse.sum(), (qkv, rpb))]


@pytest.mark.parametrize("function", [packed, three])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_it_compiles_as_one_graph(function, dynamic):
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=frames, fullgraph=True, dynamic=dynamic)
    for batch in (7, 9, 8):  # no other axis has these sizes
        qkv, rpb = problem(batch, requires_grad=True)
        for a, b in zip(results(compiled, qkv, rpb), results(function, qkv, rpb), strict=True):
            torch.testing.assert_close(a, b)
        if not dynamic:
            break
    assert frames.frame_count == 1


def test_it_exports_with_any_batch():
    class Module(torch.nn.Module):
        def forward(self, qkv, rpb):
            return packed(qkv, rpb)

    batch = torch.export.Dim("batch")
    program = torch.export.export(Module(), problem(), dynamic_shapes=({0: batch}, None))
    for size in (1, 4):
        qkv, rpb = problem(size)
        for a, b in zip(program.module()(qkv, rpb), packed(qkv, rpb), strict=True):
            assert torch.equal(a, b)


def test_meta_tensors_give_shapes_and_dtypes():
    qkv = torch.empty(2, 6, 5, 3, 2, 4, dtype=torch.bfloat16, device="meta", requires_grad=True)
    rpb = torch.empty(2, 5, 3, device="meta", requires_grad=True)
    output, lse, grad_qkv, grad_rpb = results(packed, qkv, rpb)
    assert (output.shape, output.dtype) == ((2, 6, 5, 2, 4), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 6, 5, 2), torch.float32)
    assert (grad_qkv.shape, grad_qkv.dtype) == (qkv.shape, torch.bfloat16)
    assert (grad_rpb.shape, grad_rpb.dtype) == (rpb.shape, torch.float32)


@pytest.mark.parametrize("function", [packed, three])
def test_a_second_derivative_raises(function):
    qkv, rpb = problem(requires_grad=True)
    output, _ = function(qkv, rpb)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(output.sum(), (qkv, rpb), create_graph=True)


def test_an_unused_result_needs_no_gradient():
    qkv, rpb = problem(requires_grad=True)
    output, lse = packed(qkv, rpb)
    both = torch.autograd.grad((output, lse), qkv, (torch.ones_like(output), torch.zeros_like(lse)))
    output, lse = packed(qkv, rpb)
    torch.testing.assert_close(torch.autograd.grad(output.sum(), qkv), both)
    output, lse = packed(qkv, rpb)
    (grad,) = torch.autograd.grad(lse.sum(), qkv)
    assert not grad[:, :, :, 2].any()  # the log-sum-exp does not depend on the values
    assert grad[:, :, :, :2].any()
