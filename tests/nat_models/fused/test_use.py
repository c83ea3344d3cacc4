"""What runs fused, where nothing is said and where something is."""

import pytest
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)

from nat_models import fused
from nat_models.fused import use

ROWS = use.MIN_ROWS


@pytest.fixture
def on_hopper(monkeypatch):
    """Tensors of the CPU count as those of an H100."""
    monkeypatch.setattr(use, "_is_measured", lambda x: True)
    monkeypatch.setattr(use, "_has_kernels", lambda device, generation: True)


def mlp_is_used(x, width=96, dtype=torch.bfloat16):
    weight = torch.empty(width, x.shape[-1], dtype=dtype, device=x.device)
    return fused.mlp_is_used(x.to(dtype), weight, weight.T)


def test_nothing_is_fused_on_the_cpu():
    x = torch.empty(1).expand(2**20, 64)
    with fused.using("add_layer_norm", "mlp"):
        assert not fused.norm_is_used(x)
        assert not mlp_is_used(x)


def test_large_tensors_are_fused(on_hopper):
    x = torch.empty(1).expand(ROWS, 64)
    assert fused.norm_is_used(x)
    assert not fused.norm_is_used(x[1:])
    x = torch.empty(1, dtype=torch.bfloat16).expand(use.MIN_HIDDEN // 96, 64)
    assert not mlp_is_used(x)
    assert mlp_is_used(x, width=112)


def test_what_is_said_counts(on_hopper):
    small, large = torch.empty(3, 64), torch.empty(1).expand(ROWS, 64)
    with fused.using("add_layer_norm"):
        assert fused.norm_is_used(small)
        assert not mlp_is_used(large.expand(ROWS, 64))
        with fused.using("mlp"):
            assert not fused.norm_is_used(large)
            assert mlp_is_used(small)
        assert fused.norm_is_used(small)
    assert not fused.norm_is_used(small)
    assert fused.norm_is_used(large)


def test_norms_are_left_to_the_compiler(on_hopper):
    large = torch.zeros(1).expand(ROWS, 64)

    def function(x):
        return x.sum() + int(fused.norm_is_used(x)) + 2 * int(fused.norm_is_used(x, True))

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert compiled(large) == 0
    assert compiled(large) == 2  # with layers, and a gradient may be needed
    with fused.using("add_layer_norm"):
        assert compiled(large) == 3
    with fused.using():
        assert compiled(large) == 0


def test_norms_of_few_tokens_are_fused_in_compiled_inference(on_hopper):
    few = torch.zeros(1, dtype=torch.bfloat16).expand(use.MAX_SMALL // 128, 64)

    def function(x):
        return x.sum() + int(fused.norm_is_used(x)) + 2 * int(fused.norm_is_used(x, True))

    assert function(few) == 0
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert compiled(few) == 0
    with torch.no_grad():
        assert compiled(few) == 1
        assert compiled(few.float()) == 0
        assert compiled(few.expand(3, *few.shape)) == 0


def test_products_are_fused_in_compiled_code(on_hopper):
    large = torch.zeros(1, dtype=torch.bfloat16).expand(use.MIN_HIDDEN // 96, 64)

    def function(x, width):
        return x.sum() + int(mlp_is_used(x, width))

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert compiled(large, 96) == 0
    assert compiled(large, 112) == 1
    with fused.using():
        assert compiled(large, 112) == 0


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((4, 64), torch.float64), ((4, 8192), torch.float32)],
    ids=["fp64", "long rows"],
)
def test_norms_without_kernels(on_hopper, shape, dtype):
    with fused.using("add_layer_norm"):
        assert not fused.norm_is_used(torch.empty(shape, dtype=dtype))


@pytest.mark.parametrize(
    ("width", "dtype"), [(100, torch.bfloat16), (96, torch.float32)], ids=["width", "fp32"]
)
def test_products_without_kernels(on_hopper, width, dtype):
    with fused.using("mlp"):
        assert mlp_is_used(torch.empty(4, 64))
        assert not mlp_is_used(torch.empty(4, 64), width, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert mlp_is_used(torch.empty(4, 64), 96, torch.float32)


def test_what_is_no_plain_tensor_is_left_alone(on_hopper):
    class Named(torch.Tensor):
        pass

    with fused.using("add_layer_norm"):
        assert fused.norm_is_used(nn.Parameter(torch.empty(4, 64)))
        assert not fused.norm_is_used(torch.empty(4, 64).as_subclass(Named))
        assert not torch.func.vmap(lambda x: x * int(fused.norm_is_used(x)))(
            torch.ones(4, 64)
        ).any()


HOOKS = {
    "before": register_module_forward_pre_hook,
    "after": register_module_forward_hook,
    "backward before": register_module_full_backward_pre_hook,
    "backward": register_module_full_backward_hook,
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_nothing_is_fused_where_all_modules_have_a_hook(on_hopper, register, is_compiled):
    def function(x):
        uses = fused.norm_is_used(x, True), mlp_is_used(x), fused.small_linear_is_used(x)
        return x.new_tensor(uses)

    if is_compiled:
        function = torch.compile(function, backend="eager", fullgraph=True)
    x = torch.zeros(4, 64, dtype=torch.bfloat16)
    with torch.no_grad(), fused.using("add_layer_norm", "mlp", "small_linear"):
        assert function(x).all()
        with register(lambda *_: None):
            assert not function(x).any()
        assert function(x).all()


def small_linear_is_used(shape, dtype=torch.bfloat16):
    return fused.small_linear_is_used(torch.zeros(1, dtype=dtype).expand(shape))


def test_small_maps_have_small_layers(on_hopper):
    rows = use.MAX_SMALL // 64
    assert not small_linear_is_used((rows, 64))  # a gradient may be needed
    with torch.no_grad():
        assert small_linear_is_used((rows, 64))
        assert not small_linear_is_used((rows + 1, 64))
        assert not small_linear_is_used((4, 72))
        assert not small_linear_is_used((4, 2048))
        assert not small_linear_is_used((4, 64), torch.float32)
        with fused.using():
            assert not small_linear_is_used((4, 64))
        with fused.using("small_linear"):
            assert small_linear_is_used((rows + 1, 64))


def test_small_layers_leave_casts_to_autocast(on_hopper):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert small_linear_is_used((4, 64))
        assert not small_linear_is_used((4, 64), torch.float16)
