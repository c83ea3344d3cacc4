import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from neighborhood_attention import na1d, na2d, na2d_qkvpacked
from neighborhood_attention.backends import reference

ops = torch.ops.neighborhood_attention
SETTINGS = ([3, 2, 1, 1, 2, 1, 0, 0], 0.4, "reference")
ALL = "query", "key", "value", "rpb", "additional_keys", "additional_values"


def problem(batch=2, requires_grad=False, rpb=True):
    # Not contiguous, unlike the results.
    qkv = torch.randn(batch, 6, 5, 2, 3, 4).transpose(3, 4).requires_grad_(requires_grad)
    return qkv, torch.randn(2, 5, 3, requires_grad=requires_grad) if rpb else None


def grouped(batch=2, requires_grad=False):
    """Grouped heads, a value dimension of its own, additional keys: the tensors of `ALL`."""
    shapes = (6, 5, 4, 4), (6, 5, 2, 4), (6, 5, 2, 3), None, (10, 2, 4), (10, 2, 3)
    tensors = [torch.randn(4, 5, 3) if s is None else torch.randn(batch, *s) for s in shapes]
    return [tensor.requires_grad_(requires_grad) for tensor in tensors]


@pytest.mark.parametrize("rpb", [True, False], ids=["rpb", "plain"])
def test_the_operators_keep_pytorchs_rules(rpb):
    qkv, bias = problem(requires_grad=True, rpb=rpb)
    query, key, value = (x.detach().requires_grad_() for x in qkv.unbind(3))
    torch.library.opcheck(ops.attention_qkvpacked, (qkv, bias, *SETTINGS))
    torch.library.opcheck(ops.attention, (query, key, value, bias, None, None, *SETTINGS))


def test_the_operator_keeps_pytorchs_rules_with_grouped_heads_and_additional_keys():
    torch.library.opcheck(ops.attention, (*grouped(requires_grad=True), *SETTINGS))


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


@pytest.mark.parametrize("needed", [True, False])
def test_the_backward_keeps_pytorchs_rules_with_grouped_heads_and_additional_keys(needed):
    tensors = grouped()
    output, lse = ops.attention(*tensors, *SETTINGS)
    results = *SETTINGS, output, lse, torch.randn_like(output), torch.randn_like(lse)
    torch.library.opcheck(ops.attention_backward, (*tensors, *results, [True] * 3 + [needed] * 3))


def packed(qkv, rpb):
    return na2d_qkvpacked(qkv, (3, 2), dilation=(2, 1), rpb=rpb, return_lse=True)


def three(qkv, rpb):
    return na2d(*qkv.unbind(3), (3, 2), dilation=(2, 1), rpb=rpb, return_lse=True)


def everything(*tensors):
    named = dict(zip(ALL, tensors, strict=True))
    return na2d(**named, kernel_size=(3, 2), dilation=(2, 1), return_lse=True)


FUNCTIONS = [(packed, problem), (three, problem), (everything, grouped)]


def results(function, *tensors):
    output, lse = function(*tensors)
    return [output, lse, *torch.autograd.grad(output.square().sum() + lse.sum(), tensors)]


def assert_all_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("error:Dynamo detected")
@pytest.mark.parametrize(("function", "inputs"), FUNCTIONS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_it_compiles_as_one_graph(function, inputs, dynamic):
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=frames, fullgraph=True, dynamic=dynamic)
    for batch in (7, 9, 8):  # no other axis has these sizes
        tensors = inputs(batch, requires_grad=True)
        assert_all_close(results(compiled, *tensors), results(function, *tensors))
        if not dynamic:
            break
    assert frames.frame_count == 1


def test_a_changing_batch_compiles_a_second_time_and_no_more():
    torch._dynamo.reset()
    frames = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(packed, backend=frames, fullgraph=True)
    for batch in (7, 9, 8, 11, 13):
        compiled(*problem(batch))
    assert frames.frame_count == 2


def test_a_changing_scale_stays_in_the_graph():
    torch._dynamo.reset()
    query = torch.randn(1, 6, 1, 8)

    def scaled(scale):
        return na1d(query, query, query, 3, scale=scale)

    compiled = torch.compile(scaled, backend="eager", fullgraph=True)
    for scale in (0.5, 0.7, 0.9):
        torch.testing.assert_close(compiled(scale), scaled(scale))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize(("function", "inputs"), [(packed, problem), (everything, grouped)])
def test_it_exports_with_any_batch_height_and_width(function, inputs, strict):
    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return function(*tensors)

    sizes = {
        0: torch.export.Dim("b"),
        1: torch.export.Dim("h", min=6),
        2: torch.export.Dim("w", min=2),
    }
    tensors = tuple(inputs())
    maps = [x.dim() > 3 and x.shape[1:3] == (6, 5) for x in tensors]
    batched = [x.shape[0] == 2 and x.dim() > 3 for x in tensors]
    shapes = tuple(
        sizes if m else {0: sizes[0]} if b else None for m, b in zip(maps, batched, strict=True)
    )
    program = torch.export.export(Module(), tensors, dynamic_shapes=(shapes,), strict=strict)
    for batch, height, width in ((1, 6, 2), (4, 9, 8)):
        others = [
            torch.randn(batch, height, width, *x.shape[3:]) if m
            else torch.randn(batch, *x.shape[1:]) if b else x
            for x, m, b in zip(inputs(), maps, batched, strict=True)
        ]  # fmt: skip
        for a, b in zip(program.module()(*others), function(*others), strict=True):
            assert torch.equal(a, b)


def test_meta_tensors_give_shapes_and_dtypes():
    tensors = [
        x.to("meta", torch.float32 if name == "rpb" else torch.bfloat16).requires_grad_()
        for name, x in zip(ALL, grouped(), strict=True)
    ]
    output, lse, *grads = results(everything, *tensors)
    assert (output.shape, output.dtype) == ((2, 6, 5, 4, 3), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 6, 5, 4), torch.float32)
    for grad, tensor in zip(grads, tensors, strict=True):
        assert (grad.shape, grad.dtype) == (tensor.shape, tensor.dtype)


@pytest.mark.parametrize("frozen", ["rpb", "additional_keys", "additional_values", "query"])
def test_a_gradient_that_nobody_needs_is_not_computed(frozen, monkeypatch):
    filled = []
    backward = reference.backward

    def record(*arguments):
        filled.append(arguments[-1])
        backward(*arguments)

    monkeypatch.setattr(reference, "backward", record)
    tensors = dict(zip(ALL, grouped(requires_grad=True), strict=True))
    expected = dict(zip(ALL, results(everything, *tensors.values())[2:], strict=True))
    tensors[frozen].requires_grad_(False)
    output, lse = everything(*tensors.values())
    (output.square().sum() + lse.sum()).backward()
    buffers = filled[-1]._asdict()
    assert (buffers["rpb"] is None) == (frozen == "rpb")
    assert buffers["additional_keys"] is not None  # both or neither
    for name, tensor in tensors.items():
        assert (tensor.grad is None) == (name == frozen)
        if name != frozen:
            torch.testing.assert_close(tensor.grad, expected[name])
    tensors["additional_keys"].requires_grad_(False)
    tensors["additional_values"].requires_grad_(False)
    everything(*tensors.values())[0].sum().backward()
    assert filled[-1].additional_keys is filled[-1].additional_values is None


@pytest.mark.parametrize(("function", "inputs"), FUNCTIONS)
def test_a_second_derivative_raises(function, inputs):
    tensors = inputs(requires_grad=True)
    output, _ = function(*tensors)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(output.sum(), tensors, create_graph=True)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("function", [packed, three])
def test_vmap_gives_one_result_an_entry(function):
    qkv, rpb = torch.randn(3, 2, 6, 5, 3, 2, 4), torch.randn(2, 5, 3)
    mapped = torch.func.vmap(function, in_dims=(0, None))(qkv, rpb)
    single = [function(x, rpb) for x in qkv]
    for a, b in zip(mapped, map(torch.stack, zip(*single, strict=True)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", [packed, three])
def test_derivatives_that_are_not_there_raise(function):
    qkv, rpb = problem()

    def total(qkv):
        return function(qkv, rpb)[0].sum()

    with pytest.raises(NotImplementedError, match=r"torch\.func's transforms: use torch\.autograd"):
        torch.func.grad(total)(qkv)
    with pytest.raises(NotImplementedError, match=r"torch\.func's transforms"):
        torch.func.vmap(torch.func.grad(total))(qkv[:, None])
    with pytest.raises(NotImplementedError, match=r"no derivative in forward mode"):
        torch.func.jvp(total, (qkv,), (qkv,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"in forward mode"):
        total(forward_ad.make_dual(qkv, qkv))


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


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize(("function", "inputs"), FUNCTIONS)
def test_activation_checkpointing_changes_nothing(function, inputs, use_reentrant):
    tensors = inputs(requires_grad=True)
    stored = partial(checkpoint, function, use_reentrant=use_reentrant)
    assert_all_close(results_by_backward(stored, tensors), results_by_backward(function, tensors))


def results_by_backward(function, tensors):
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    output, lse = function(*tensors)
    (output.square().sum() + lse.sum()).backward()
    return [output, lse, *(tensor.grad for tensor in tensors)]


def test_a_traced_function_calls_the_operator():
    qkv, rpb = problem(requires_grad=True)
    traced = torch.jit.trace(packed, (qkv, rpb))
    assert "neighborhood_attention::attention_qkvpacked" in str(traced.graph)
    assert_all_close(traced(qkv, rpb), packed(qkv, rpb))


@pytest.mark.gpu
@pytest.mark.parametrize(("function", "inputs"), FUNCTIONS)
def test_the_fused_operators_keep_pytorchs_rules(function, inputs):
    tensors = [x.detach().cuda().requires_grad_() for x in inputs(requires_grad=True)]
    settings = SETTINGS[0], SETTINGS[1], "fused"
    if function is everything:
        torch.library.opcheck(ops.attention, (*tensors, *settings))
    else:
        torch.library.opcheck(ops.attention_qkvpacked, (*tensors, *settings))


@pytest.mark.gpu
@pytest.mark.parametrize(("function", "inputs"), FUNCTIONS)
def test_cuda_graphs_change_nothing(function, inputs):
    compiled = torch.compile(function, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm-up, recording, replays
        tensors = [x.cuda() for x in inputs()]
        found = [x.clone() for x in results_by_backward(compiled, tensors)]
        assert_all_close(found, results_by_backward(function, tensors))


DDP = """
import copy, sys, torch, torch.distributed as dist
from neighborhood_attention import NeighborhoodAttention2D
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
module = NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)
alone = copy.deepcopy(module)
x = torch.randn(4, 5, 6, 8)
parallel = torch.nn.parallel.DistributedDataParallel(module)
parallel(x[2 * rank:][:2]).square().mean().backward()
alone(x).square().mean().backward()
for shared, whole in zip(module.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(shared.grad, whole.grad)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_of_ddp_get_the_gradients_of_the_whole_batch(tmp_path):
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "kernels")}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(rank), str(tmp_path / "store")],
            env=env, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
