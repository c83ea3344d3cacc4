"""The building blocks, each against its definition."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F

from nat_models import fused
from nat_models.models import layers
from nat_models.models.layers import (
    ConvDownsampler,
    ConvTokenizer,
    PatchMerging,
    PatchTokenizer,
    Stage,
    TransformerBlock,
    neighborhood_attention_block,
)


def test_block_adds_both_branches():
    block = TransformerBlock(8, nn.Linear(8, 8), mlp_ratio=1.5, layer_scale=0.5)
    nn.init.normal_(block.ls2.gamma)
    x = torch.randn(2, 3, 5, 8)
    middle = x + 0.5 * block.attn(block.norm1(x))
    hidden = nn.functional.gelu(block.mlp.fc1(block.norm2(middle)))
    assert hidden.shape[-1] == 12
    torch.testing.assert_close(block(x), middle + block.ls2.gamma * block.mlp.fc2(hidden))


def test_block_norms_as_the_published_models():
    block = TransformerBlock(8, nn.Identity())
    assert block.norm1.eps == block.norm2.eps == 1e-5
    assert not any("gamma" in name for name, _ in block.named_parameters())


def test_stochastic_depth_drops_whole_branches():
    block = TransformerBlock(8, nn.Identity(), drop_path=0.5)
    assert isinstance(block.drop_path1, DropPath)
    x = torch.randn(64, 2, 2, 8)
    attended = x + 2 * block.norm1(x)
    mlp_dropped = [
        any(torch.allclose(out, candidate[i], atol=1e-5) for candidate in (x, attended))
        for i, out in enumerate(block.train()(x))
    ]
    assert 10 < sum(mlp_dropped) < 54


@pytest.mark.parametrize(("scale_by_keep", "kept"), [(True, 2.0), (False, 1.0)], ids=str)
def test_a_branch_left_to_a_norm_is_dropped_as_by_drop_path(scale_by_keep, kept):
    drop_path = DropPath(0.5, scale_by_keep).train()
    keep = layers._branch(torch.ones(64, 2, 2, 8), nn.Identity(), drop_path).keep
    assert keep.unique().tolist() == [0.0, kept]


def test_neighborhood_block_sees_its_window_only():
    block = neighborhood_attention_block(16, num_heads=2, kernel_size=3, dilation=2).double()
    nn.init.normal_(block.attn.qkv.weight)
    x = torch.randn(1, 9, 11, 16, dtype=torch.float64, requires_grad=True)
    block(x)[0, 4, 5].sum().backward()
    seen = x.grad[0].abs().sum(-1).nonzero().tolist()
    assert seen == [[i, j] for i in (2, 4, 6) for j in (3, 5, 7)]


def test_neighborhood_block_takes_small_maps():
    block = neighborhood_attention_block(16, num_heads=2, kernel_size=7)
    assert block(torch.randn(1, 2, 9, 16)).shape == (1, 2, 9, 16)


@pytest.mark.parametrize(
    ("patch_size", "size"), [(4, (8, 9)), (2, (16, 17)), (1, (31, 33))], ids=["4", "2", "1"]
)
def test_tokenizer_rounds_up(patch_size, size):
    tokenizer = ConvTokenizer(2, 12, patch_size)
    assert tokenizer(torch.randn(1, 2, 31, 33)).shape == (1, *size, 12)


def test_tokenizer_ends_with_a_norm():
    tokens = ConvTokenizer(3, 16)(torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(1, 8, 8), atol=1e-5, rtol=0)


def test_downsampler_convolves_then_norms():
    downsampler = ConvDownsampler(8)
    x = torch.randn(1, 5, 8, 8)
    expected = nn.functional.conv2d(
        x.permute(0, 3, 1, 2), downsampler.reduction.weight, stride=2, padding=1
    ).permute(0, 2, 3, 1)
    assert downsampler(x).shape == (1, 3, 4, 16)
    torch.testing.assert_close(downsampler(x), downsampler.norm(expected))


def test_downsampler_needs_no_copy_between_layouts():
    x = torch.randn(1, 6, 8, 8).permute(0, 3, 1, 2)
    assert x.is_contiguous(memory_format=torch.channels_last)
    reduced = ConvDownsampler(8).reduction(x)
    assert reduced.permute(0, 2, 3, 1).is_contiguous()


def test_stage_downsamples_first():
    stage = Stage(ConvDownsampler(8), [nn.Linear(16, 16), nn.Tanh()])
    x = torch.randn(1, 4, 4, 8)
    expected = stage.blocks[0](stage.downsample(x)).tanh()
    torch.testing.assert_close(stage(x), expected)


@pytest.fixture
def left_additions(monkeypatch):
    """Blocks leave additions to the next norm, as on a GPU; here PyTorch computes them, in fp64.

    The fixture counts what is left at a time: [norms with a branch to add, norms without].
    """
    counts = [0, 0]

    def add_layer_norm(x, branch, norm):
        counts[branch is None] += 1
        x = fused.add(x, branch)
        return x, F.layer_norm(x, norm.weight.shape, *norm)

    def add_norm_linear(x, branch, norm, weight, bias):
        x, normalized = add_layer_norm(x, branch, norm)
        return x, F.linear(normalized, weight, bias)

    monkeypatch.setattr(fused, "norm_is_used", lambda *_, **__: True)
    monkeypatch.setattr(fused, "add_layer_norm", add_layer_norm)
    monkeypatch.setattr(fused, "add_norm_linear", add_norm_linear)
    return counts


def stage_of_blocks():
    blocks = [
        TransformerBlock(8, nn.Linear(8, 8), layer_scale=0.5, drop_path=p) for p in (0, 0.5, 0.5)
    ]
    return Stage(nn.Identity(), blocks).double()


def outcome(module, x):
    """Output and all gradients in training, with the same random numbers each time."""
    torch.manual_seed(0)
    output = module.train()(x)
    return output, torch.autograd.grad(output.cos().sum(), [x, *module.parameters()])


def test_fused_stage_computes_the_same(left_additions, monkeypatch):
    stage = stage_of_blocks()
    x = torch.randn(16, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    actual = outcome(stage, x)
    assert left_additions == [5, 1]  # two norms a block, the first has nothing to add
    monkeypatch.setattr(fused, "norm_is_used", lambda *_, **__: False)
    torch.testing.assert_close(actual, outcome(stage, x))
    assert left_additions == [5, 1]


def test_fused_block_computes_the_same(left_additions, monkeypatch):
    block = stage_of_blocks().blocks[1]
    x = torch.randn(16, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    actual = outcome(block, x)
    assert left_additions == [1, 1]
    monkeypatch.setattr(fused, "norm_is_used", lambda *_, **__: False)
    torch.testing.assert_close(actual, outcome(block, x))


@pytest.mark.parametrize("size", [(5, 6), (2, 9)], ids=["whole", "padded"])
def test_fused_attention_computes_the_same(left_additions, monkeypatch, size):
    block = neighborhood_attention_block(16, 2, kernel_size=3, drop_path=0.5).double()
    x = torch.randn(4, *size, 16, dtype=torch.float64, requires_grad=True)
    projected = []
    monkeypatch.setattr(block.attn.qkv, "forward", lambda x: projected.append(x) or F.linear(
        x, block.attn.qkv.weight, block.attn.qkv.bias
    ))  # fmt: skip
    actual = outcome(block, x)
    assert len(projected) == (size == (2, 9))  # the projection follows the padding
    monkeypatch.setattr(fused, "norm_is_used", lambda *_, **__: False)
    torch.testing.assert_close(actual, outcome(block, x))


@pytest.mark.parametrize("name", ["attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc1"])
def test_hooks_of_fused_blocks_are_called(left_additions, name):
    block, called = neighborhood_attention_block(16, 2, kernel_size=3).double(), []
    block.get_submodule(name).register_forward_hook(lambda *_: called.append(name))
    block(torch.randn(1, 5, 6, 16, dtype=torch.float64))
    assert called == [name]


def test_checkpointed_blocks_keep_their_input_alone(left_additions):
    stage = stage_of_blocks()
    x = torch.randn(16, 2, 2, 8, dtype=torch.float64, requires_grad=True)
    expected = outcome(stage, x)
    for block in stage.blocks:
        block.grad_checkpointing = True
    torch.testing.assert_close(outcome(stage, x), expected)
    assert left_additions == [5 + 2 * 3, 1 + 2 * 3]  # forward and again in backward


@pytest.mark.parametrize("name", ["blocks.1", "blocks.1.norm1", "blocks.1.ls2", "blocks.2.mlp"])
def test_hooks_of_fused_stages_are_called(left_additions, name):
    stage, called = stage_of_blocks(), []
    stage.get_submodule(name).register_forward_hook(lambda *_: called.append(name))
    stage(torch.randn(1, 2, 2, 8, dtype=torch.float64))
    assert called == [name]


def test_patches_are_projected_then_normed():
    tokenizer = PatchTokenizer(2, 6, 4)
    images = torch.randn(1, 2, 8, 12)
    corner = images[0, :, 4:8, 8:12].flatten()
    expected = tokenizer.proj.weight.flatten(1) @ corner + tokenizer.proj.bias
    torch.testing.assert_close(tokenizer(images)[0, 1, 2], tokenizer.norm(expected))


def test_images_are_padded_to_whole_patches():
    tokenizer = PatchTokenizer(2, 6, 4)
    images = torch.randn(1, 2, 7, 9)
    padded = torch.zeros(1, 2, 8, 12)
    padded[..., :7, :9] = images
    torch.testing.assert_close(tokenizer(images), tokenizer(padded))


def test_images_can_be_held_to_one_size():
    tokenizer = PatchTokenizer(2, 6, 4, img_size=(8, 12))
    with pytest.raises(ValueError, match=r"\(8, 12\), got \(12, 8\)"):
        tokenizer(torch.randn(1, 2, 12, 8))


def test_merging_joins_columns_first_and_pads_odd_maps():
    merging = PatchMerging(8)
    x = torch.randn(1, 5, 7, 8)
    assert merging(x).shape == (1, 3, 4, 16)
    four = torch.cat([x[0, 2, 4], x[0, 3, 4], x[0, 2, 5], x[0, 3, 5]])
    torch.testing.assert_close(merging(x)[0, 1, 2], merging.reduction(merging.norm(four)))
    edge = torch.cat([x[0, 4, 6], torch.zeros(24)])
    torch.testing.assert_close(merging(x)[0, 2, 3], merging.reduction(merging.norm(edge)))


@pytest.mark.parametrize("size", [(8, 12), (6, 8)], ids=["patches", "merging"])
def test_no_padding_makes_no_copy(size):
    module = PatchTokenizer(3, 6, 4) if size == (8, 12) else PatchMerging(3)
    x = torch.randn(1, 3, *size) if size == (8, 12) else torch.randn(1, *size, 3)
    with torch.profiler.profile() as profile:
        module(x)
    assert "aten::constant_pad_nd" not in {event.key for event in profile.key_averages()}
