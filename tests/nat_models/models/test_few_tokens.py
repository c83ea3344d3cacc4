"""A block with few tokens computes what its modules do, and leaves alone what it does not know."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from nat_models import fused
from nat_models.models.layers import Stage, TransformerBlock, neighborhood_attention_block


@pytest.fixture
def launches(monkeypatch):
    """Layers are small, as on a GPU in inference; here PyTorch computes them, in any dtype.

    The fixture lists how the layers were called.
    """
    calls = []

    def small_linear(x, weight, bias, norm=None, has_gelu=False, gamma=None, residual=None):
        calls.append((norm is not None, has_gelu, gamma is not None, residual is not None))
        x = x if norm is None else F.layer_norm(x, norm.weight.shape, *norm)
        x = F.linear(x, weight, bias)
        x = F.gelu(x) if has_gelu else x
        x = x if gamma is None else gamma * x
        return x if residual is None else residual + x

    monkeypatch.setattr(fused, "small_linear_is_used", lambda x: not torch.is_grad_enabled())
    monkeypatch.setattr(fused, "small_linear", small_linear)
    return calls


def create_block(**kwargs):
    block = neighborhood_attention_block(16, 2, kernel_size=3, **kwargs).double().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    return block


def create_map(*size):
    return torch.randn(2, *size, 16, dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [{}, {"layer_scale": 0.5, "drop_path": 0.5}, {"qkv_bias": False, "proj_drop": 0.5}],
    ids=["plain", "scaled", "without bias"],
)
def test_blocks_compute_the_same(launches, settings):
    block, x = create_block(**settings), create_map(5, 6)
    expected = block(x)
    assert launches == []
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)
        is_scaled = "layer_scale" in settings
        first = [(True, False, False, False), (False, False, is_scaled, True)]
        second = [(True, True, False, False), (False, False, is_scaled, True)]
        assert launches == first + second


def test_stages_compute_the_same(launches, monkeypatch):
    """Also where norms could be fused."""
    stage, x = Stage(nn.Identity(), [create_block() for _ in range(2)]), create_map(5, 6)
    expected = stage.eval()(x)
    monkeypatch.setattr(fused, "norm_is_used", lambda *_, **__: True)
    with torch.no_grad():
        torch.testing.assert_close(stage(x), expected)
    assert len(launches) == 8


def compiled(block):
    return torch.compile(block, fullgraph=True, backend="aot_eager")


def test_compiled_blocks_compute_the_same(launches):
    block, x = create_block(layer_scale=0.5), create_map(5, 6)
    with torch.no_grad():
        expected = block(x)
        torch.testing.assert_close(compiled(block)(x), expected)
    assert len(launches) == 8


def with_other(name, module):
    def change(block):
        parent, _, child = name.rpartition(".")
        setattr(block.get_submodule(parent), child, module)

    return change


CHANGES = {
    "training": lambda block: block.train(),
    "training of a part": lambda block: block.mlp.drop1.train(),
    "training of attention": lambda block: block.attn.train(),
    "a hook": lambda block: block.attn.proj.register_forward_hook(lambda *_: None),
    "a hook of the block's": lambda block: block.ls2.register_forward_hook(lambda *_: None),
    "other attention": with_other("attn", nn.Linear(16, 16).double()),
    "other activation": with_other("mlp.act", nn.ReLU()),
    "GELU by tanh": with_other("mlp.act", nn.GELU("tanh")),
    "norm without bias": with_other("norm2", fused.LayerNorm(16, bias=False).double()),
    "odd width": lambda block: (
        with_other("mlp.fc1", nn.Linear(16, 60).double())(block),
        with_other("mlp.fc2", nn.Linear(60, 16).double())(block),
    ),
    "another dtype": lambda block: block.attn.proj.float(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_blocks_are_left_alone(launches, change):
    block, x = create_block(), create_map(5, 6)
    with torch.no_grad():
        assert block.has_few_tokens(x)
        change(block)
        assert not block.has_few_tokens(x)


@pytest.mark.parametrize("size", [(2, 9), (9, 2)], ids=["rows", "columns"])
def test_padded_maps_are_left_alone(launches, size):
    block, x = create_block(), create_map(*size)
    with torch.no_grad():
        block(x)
    assert launches == []


def test_what_is_no_map_is_refused(launches):
    with torch.no_grad(), pytest.raises(ValueError, match="expected"):
        create_block()(torch.randn(5, 6, 16, dtype=torch.float64))


def test_blocks_without_neighborhood_attention_are_left_alone(launches):
    block = TransformerBlock(16, nn.Linear(16, 16)).double().eval()
    with torch.no_grad():
        block(create_map(5, 6))
    assert launches == []


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"], ids=str)
def test_on_a_gpu(mode):
    """All sizes of a model, in half precision, against its other layers in fp64."""
    model = timm.create_model("nat_tiny", layer_scale=0.5, num_classes=10).cuda().eval()
    images = torch.randn(1, 3, 224, 224, device="cuda").bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = model.double()(images.double())
        model.bfloat16()
        run = model if mode is None else torch.compile(model, fullgraph=True, mode=mode)
        with fused.using("small_linear"):
            actual = [run(images).clone() for _ in range(3)]
        with fused.using():
            unfused = model(images)
    error = (unfused.double() - expected).abs().max()
    for output in actual:
        assert (output.double() - expected).abs().max() < 2 * error + 1e-3
