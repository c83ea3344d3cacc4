"""NAT against an independent statement of the original model, and against timm's model contract."""

import gzip
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

from neighborhood_attention import NeighborhoodAttention2D

OFFICIAL = json.loads(
    gzip.decompress((Path(__file__).parents[2] / "data/official_state_dicts.json.gz").read_bytes())
)
NAMES = ["nat_mini", "nat_tiny", "nat_small", "nat_base"]


# ---- The original model, restated in plain PyTorch from its definition ----


def axis_windows(length, kernel_size, dilation):
    """For every query of an axis: the keys it attends to, and their places in the bias table."""
    windows = []
    for query in range(length):
        group = range(query % dilation, length, dilation)
        first = min(max(query // dilation - kernel_size // 2, 0), len(group) - kernel_size)
        keys = group[first : first + kernel_size]
        places = [(key - query) // dilation + kernel_size - 1 for key in keys]
        windows.append((torch.tensor(keys), torch.tensor(places)))
    return windows


def original_attention(sd, name, x, heads, kernel_size, dilation):
    """[B, H, W, C] -> [B, H, W, C], one query at a time."""
    height, width = x.shape[1:3]
    least = kernel_size * dilation
    x = F.pad(x, (0, 0, 0, max(0, least - width), 0, max(0, least - height)))
    qkv = F.linear(x, sd[f"{name}.qkv.weight"], sd[f"{name}.qkv.bias"])
    query, key, value = qkv.unflatten(-1, (3, heads, -1)).unbind(3)
    rows, columns = (axis_windows(size, kernel_size, dilation) for size in x.shape[1:3])
    output = torch.zeros_like(query)
    for i, (key_rows, bias_rows) in enumerate(rows):
        for j, (key_columns, bias_columns) in enumerate(columns):
            near = key[:, key_rows][:, :, key_columns]
            logits = torch.einsum("bnd,bhwnd->bnhw", query[:, i, j], near) / near.shape[-1] ** 0.5
            logits = logits + sd[f"{name}.rpb"][:, bias_rows][:, :, bias_columns]
            weights = logits.flatten(2).softmax(-1).unflatten(-1, logits.shape[2:])
            near = value[:, key_rows][:, :, key_columns]
            output[:, i, j] = torch.einsum("bnhw,bhwnd->bnd", weights, near)
    output = output[:, :height, :width].flatten(3)
    return F.linear(output, sd[f"{name}.proj.weight"], sd[f"{name}.proj.bias"])


def original_nat(sd, images, depths, num_heads, kernel_size, dilations):
    """Logits of the original model in evaluation mode, from its own state dict."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], sd[f"{name}.weight"], sd[f"{name}.bias"], eps=1e-5)

    def linear(x, name):
        return F.linear(x, sd[f"{name}.weight"], sd[f"{name}.bias"])

    x = images
    for i in range(2):
        x = F.conv2d(
            x, sd[f"patch_embed.proj.{i}.weight"], sd[f"patch_embed.proj.{i}.bias"], 2, padding=1
        )
    x = norm(x.permute(0, 2, 3, 1), "patch_embed.norm")
    for i, depth in enumerate(depths):
        for j in range(depth):
            block = f"levels.{i}.blocks.{j}"
            y = norm(x, f"{block}.norm1")
            y = original_attention(
                sd, f"{block}.attn", y, num_heads[i], kernel_size, dilations[i][j]
            )
            x = x + y * sd.get(f"{block}.gamma1", 1)
            y = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
            y = linear(y * (1 + torch.erf(y / math.sqrt(2))) / 2, f"{block}.mlp.fc2")
            x = x + y * sd.get(f"{block}.gamma2", 1)
        if i < len(depths) - 1:
            weight = sd[f"levels.{i}.downsample.reduction.weight"]
            x = F.conv2d(x.permute(0, 3, 1, 2), weight, stride=2, padding=1).permute(0, 2, 3, 1)
            x = norm(x, f"levels.{i}.downsample.norm")
    return linear(norm(x, "norm").mean((1, 2)), "head")


DEPTHS, HEADS = (2, 1, 2, 1), (1, 2, 4, 8)
PLAIN = [[1] * depth for depth in DEPTHS]
DILATED = [[1, 8], [4], [1, 2], [1]]


@pytest.mark.parametrize(
    ("size", "name", "dilations"),
    [
        ((224, 224), "nat_mini", PLAIN),
        ((96, 96), "nat_small", PLAIN),  # layer scale; the last two maps are padded
        ((101, 147), "nat_mini", DILATED),  # odd sides; padded along the height alone
        ((224, 224), "nat_small", DILATED),
        ((20, 33), "nat_mini", DILATED),  # every map is padded
    ],
)
def test_logits_are_the_original_models(tiny_nat, to_original, size, name, dilations):
    model = tiny_nat(name, dilations=dilations, dtype=torch.float64)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        weights = to_original(model.state_dict())
        expected = original_nat(weights, images, DEPTHS, HEADS, 7, dilations)
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_logits_of_nat_mini_are_the_original_models(tiny_nat, to_original):
    settings = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16)}
    model = tiny_nat("nat_mini", **settings, num_classes=1000, dtype=torch.float64)
    assert sum(p.numel() for p in model.parameters()) == OFFICIAL["nat_mini"]["n_params"]
    images = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    dilations = [[1] * depth for depth in settings["depths"]]
    with torch.no_grad():
        weights = to_original(model.state_dict())
        depths, heads = settings["depths"], settings["num_heads"]
        expected = original_nat(weights, images, depths, heads, 7, dilations)
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_the_published_ones(to_original, name):
    model = timm.create_model(name, device="meta")
    shapes = {key: list(value.shape) for key, value in to_original(model.state_dict()).items()}
    assert shapes == OFFICIAL[name]["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == OFFICIAL[name]["n_params"]


@pytest.mark.parametrize(("name", "rate"), [*zip(NAMES, [0.2, 0.2, 0.3, 0.5], strict=True)])
def test_stochastic_depth_rises_linearly_to_the_published_rate(name, rate):
    model = timm.create_model(name, device="meta")
    blocks = [block for level in model.levels for block in level.blocks]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx(torch.linspace(0, rate, len(blocks)).tolist())
    assert rates == [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks]


# ---- timm's contract ----


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 80)


@pytest.fixture
def nat(tiny_nat):
    return tiny_nat()


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="windows"):
        timm.create_model("nat_mini", windows=7)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": (2, 4)}, "num_heads needs one entry a stage"),
        ({"kernel_size": (7, 5)}, "kernel_size needs one entry a stage"),
        ({"dilations": [[1, 1], [1], [1], [1]]}, "dilations needs one entry a block"),
        ({"stem_strides": (2, 2, 2)}, "stem_strides needs two entries"),
        ({"attention_backend": "magic"}, "magic"),
    ],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("nat_mini", device="meta", **kwargs)


def test_dilations_and_kernel_sizes_reach_the_attention(tiny_nat):
    model = tiny_nat(dilations=DILATED, kernel_size=(7, 5, 5, 3))
    for i, level in enumerate(model.levels):
        assert [block.attn.dilation for block in level.blocks] == [(d, d) for d in DILATED[i]]
        size = (7, 5, 5, 3)[i]
        assert {block.attn.kernel_size for block in level.blocks} == {(size, size)}


def test_attention_backend_can_be_chosen_and_changed(tiny_nat):
    model = tiny_nat(attention_backend="reference")
    attentions = [m for m in model.modules() if isinstance(m, NeighborhoodAttention2D)]
    assert {attention.backend for attention in attentions} == {"reference"}
    model.set_attention_backend(None)
    assert {attention.backend for attention in attentions} == {None}
    with pytest.raises(ValueError, match="magic"):
        model.set_attention_backend("magic")


def test_features_have_the_declared_sizes(tiny_nat, images):
    maps = tiny_nat(features_only=True)(images)
    assert [tuple(m.shape) for m in maps] == [
        (2, 16, 20, 32),
        (2, 8, 10, 64),
        (2, 4, 5, 128),
        (2, 2, 3, 256),
    ]


def test_both_feature_extractors_agree(tiny_nat, nat, images):
    weights = {k: v for k, v in nat.state_dict().items() if not k.startswith("head.")}
    by_list = tiny_nat(features_only=True, out_indices=(1, 3))
    getter = tiny_nat(features_only=True, out_indices=(1, 3), feature_cls="getter")
    getter.model.load_state_dict(weights, strict=False)
    by_list.load_state_dict({k.replace("levels.", "levels_"): v for k, v in weights.items()}, False)
    assert getter.feature_info.channels() == by_list.feature_info.channels() == [64, 256]
    assert getter.feature_info.reduction() == by_list.feature_info.reduction() == [8, 32]
    for nchw, nhwc in zip(getter(images), by_list(images), strict=True):
        torch.testing.assert_close(nchw, nhwc.permute(0, 3, 1, 2))


def test_forward_intermediates(nat, images):
    final, maps = nat.forward_intermediates(images)
    torch.testing.assert_close(final, nat.forward_features(images))
    assert [m.shape[1] for m in maps] == [32, 64, 128, 256]
    first, last = nat.forward_intermediates(
        images, [0, 3], norm=True, output_fmt="NHWC", intermediates_only=True
    )
    torch.testing.assert_close(first, maps[0].permute(0, 2, 3, 1))
    torch.testing.assert_close(last, final)
    early, selected = nat.forward_intermediates(images, [1], stop_early=True)
    torch.testing.assert_close(selected[0], maps[1])
    torch.testing.assert_close(early.permute(0, 3, 1, 2), maps[1])
    with pytest.raises(ValueError, match="NLC"):
        nat.forward_intermediates(images, output_fmt="NLC")


@pytest.mark.parametrize("index", [1, 3])
def test_pruned_model_keeps_its_features_and_no_idle_parameter(nat, images, index):
    expected = nat.forward_intermediates(images, [index], intermediates_only=True)[0]
    kept = nat.prune_intermediate_layers([index], prune_norm=True)
    features = nat.train()(images)
    assert kept == [index]
    assert features.shape[-1] == nat.num_features == nat.head_hidden_size == expected.shape[1]
    torch.testing.assert_close(nat.eval()(images).permute(0, 3, 1, 2), expected)
    features.sum().backward()
    assert all(p.grad is not None for p in nat.parameters())


def test_pruning_nothing_keeps_the_output(nat, images):
    expected = nat(images)
    nat.prune_intermediate_layers([3], prune_head=False)
    torch.testing.assert_close(nat(images), expected)


def test_initialisation_after_creation_without_storage():
    model = timm.create_model("nat_small", depths=(1, 1, 1, 1), device="meta", dtype=torch.float64)
    assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    for name, p in model.named_parameters():
        if name.endswith(".rpb") or (p.ndim == 2):
            assert p.std().item() == pytest.approx(0.02, rel=0.1), name
        elif "gamma" in name:
            assert (p == 1e-5).all(), name
        elif "norm" in name:
            assert (p == (1 if name.endswith("weight") else 0)).all(), name
        else:
            assert p.isfinite().all(), name


def test_classifier_can_be_replaced_and_removed(nat, images):
    features = nat.forward_head(nat.forward_features(images), pre_logits=True)
    nat.to(torch.float64).train()
    nat.reset_classifier(0)
    nat.reset_classifier(5)
    assert nat.get_classifier().weight.shape == (5, 256)
    assert nat.get_classifier().weight.dtype == torch.float64
    assert nat.get_classifier().training
    nat.float().eval().reset_classifier(0)
    torch.testing.assert_close(nat(images), features)
    nat.reset_classifier(0, "")
    assert nat(images).shape == (2, 2, 3, 256)
    assert (nat.num_classes, nat.global_pool) == (0, "")


def test_concatenating_pooling_widens_the_classifier(tiny_nat, images):
    model = tiny_nat(global_pool="catavgmax")
    assert model(images).shape == (2, 11)
    assert model.head_hidden_size == 2 * model.num_features


def test_gradient_checkpointing_changes_no_result(nat, images):
    def gradients():
        nat.zero_grad()
        nat(images).square().sum().backward()
        return {name: p.grad.clone() for name, p in nat.named_parameters()}

    expected = gradients()
    nat.set_grad_checkpointing()
    assert all(level.grad_checkpointing for level in nat.levels)
    torch.testing.assert_close(gradients(), expected)


def test_weight_decay_spares_existing_parameters(nat):
    names = {name for name, _ in nat.named_parameters()}
    assert nat.no_weight_decay() == {name for name in names if "rpb" in name} != set()


def test_learning_rate_decays_from_head_to_stem(nat):
    groups = create_optimizer_v2(nat, "sgd", lr=1.0, layer_decay=0.5).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    blocks = [scale[id(b.norm1.weight)] for level in nat.levels for b in level.blocks]
    assert all(later == 2 * earlier for earlier, later in pairwise(blocks))
    assert scale[id(nat.patch_embed.norm.weight)] < blocks[0]
    # The layers between blocks go with the block beside them.
    assert scale[id(nat.levels[1].downsample.norm.weight)] == blocks[2]
    assert scale[id(nat.norm.weight)] == blocks[-1]
    assert scale[id(nat.head.fc.weight)] == 1.0


def test_dtype_can_change_after_a_forward_pass(nat, images):
    nat(images)
    assert nat.to(torch.bfloat16)(images.to(torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_stays_close(nat, images):
    with torch.autocast("cpu", torch.bfloat16):
        logits = nat(images)
    assert logits.dtype == torch.bfloat16
    assert F.cosine_similarity(logits.float(), nat(images), dim=-1).min() > 0.99


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript(tiny_nat, nat, images):
    torch.testing.assert_close(torch.jit.script(nat)(images), nat(images))
    getter = tiny_nat(features_only=True, out_indices=(0, 2), feature_cls="getter")
    for scripted, eager in zip(torch.jit.script(getter)(images), getter(images), strict=True):
        torch.testing.assert_close(scripted, eager)


def test_fx(nat, images):
    traced = timm.models.create_feature_extractor(nat, {"levels.1": "map", "head": "logits"})
    outputs = traced(images)
    torch.testing.assert_close(outputs["logits"], nat(images), rtol=0, atol=0)
    expected = nat.forward_intermediates(images, [1], output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(outputs["map"], expected[0], rtol=0, atol=0)


def test_export_with_dynamic_batch(nat, images):
    dynamic_shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    program = torch.export.export(nat, (images,), dynamic_shapes=dynamic_shapes)
    more = torch.randn(5, 3, 64, 80)
    torch.testing.assert_close(program.module()(more), nat(more))


def test_model_is_rebuilt_from_a_directory(tiny_nat, images, tmp_path):
    model = tiny_nat(dilations=DILATED, kernel_size=(7, 5, 5, 3), layer_scale=0.1)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert again.levels[0].blocks[1].attn.dilation == (8, 8)
    torch.testing.assert_close(again(images), model(images))
