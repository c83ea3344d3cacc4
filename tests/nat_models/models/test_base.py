"""timm's model contract, by one small model a family."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
from timm.models._input import get_model_input_config
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

import nat_models
from nat_models.models.base import neighborhood_attentions

OFFICIAL = json.loads(
    gzip.decompress((Path(__file__).parents[2] / "data/official_state_dicts.json.gz").read_bytes())
)
# Of all published models, with the heads of ImageNet-22K where they have one: models' tables.
PARAMETERS = {name: official["n_params"] for name, official in OFFICIAL.items()} | {
    "dinat_large_21k": 232_976_131,
    "dinat_large_21k_11x11": 233_176_867,
    "dinat_s_large_21k": 228_565_093,
}
SIZE = (64, 80)
# Widths and sides of the feature maps of an image of that size.
MAPS = {
    "nat_mini": [(32, 16, 20), (64, 8, 10), (128, 4, 5), (256, 2, 3)],
    "dinat_s_tiny": [(32, 16, 20), (64, 8, 10), (128, 4, 5), (256, 2, 3)],
    "dinat_isotropic_small": [(64, 4, 5)] * 4,
    "vitrpb_small": [(64, 4, 5)] * 4,
}


@pytest.fixture
def images():
    return torch.randn(2, 3, *SIZE)


@pytest.fixture(params=sorted(MAPS))
def name(request):
    return request.param


@pytest.fixture
def create(name, tiny_model):
    """Creates the family's small model for images of `SIZE`."""
    return lambda **kwargs: tiny_model(name, img_size=SIZE, **kwargs)


@pytest.fixture
def model(create):
    return create()


def test_all_published_models_are_registered():
    assert sorted({name.split(".")[0] for name in nat_models.list_models(pretrained=True)}) == [
        *sorted(PARAMETERS)
    ]
    assert len(PARAMETERS) == 25


@pytest.mark.parametrize("published", sorted(PARAMETERS))
def test_parameters_are_the_published_ones(published, to_original):
    model = timm.create_model(published, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[published]
    expected = {
        key: shape
        for key, shape in OFFICIAL[published]["state_dict"].items()
        if not key.endswith("relative_position_index")
    }
    if published.endswith(("21k", "21k_11x11")):  # recorded with 1000 classes
        model.reset_classifier(1000)
    shapes = {key: list(value.shape) for key, value in to_original(model.state_dict()).items()}
    assert shapes == expected


@pytest.mark.parametrize("published", sorted(PARAMETERS))
def test_configuration_fits_the_model(published):
    cfg = timm.get_pretrained_cfg(published)
    side = 384 if "384" in published else 224
    assert cfg.input_size == (3, side, side)
    assert cfg.crop_pct == (1.0 if side == 384 else 0.875)
    assert cfg.interpolation == "bicubic"
    assert cfg.url.startswith("https://shi-labs.com/projects/")
    assert cfg.num_classes == (21841 if "21k" in published else 1000)
    assert (cfg.hf_hub_id is not None) == (
        not any(part in published for part in ("_s_", "isotropic", "vitrpb", "21k"))
    )
    assert cfg.fixed_input_size == published.startswith("vitrpb")


def test_unknown_argument_is_refused(name):
    with pytest.raises(TypeError, match="windows"):
        timm.create_model(name, windows=7)


def test_attention_backend_can_be_chosen_and_changed(create):
    model = create(attention_backend="reference")
    attentions = neighborhood_attentions(model)
    assert {attention.backend for attention in attentions} == {"reference"}
    model.set_attention_backend(None)
    assert {attention.backend for attention in attentions} == {None}
    with pytest.raises(ValueError, match="magic"):
        model.set_attention_backend("magic")


def test_both_feature_extractors_agree(name, create, model, images):
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("head.")}
    by_list = create(features_only=True, out_indices=(1, 3))
    getter = create(features_only=True, out_indices=(1, 3), feature_cls="getter")
    getter.model.load_state_dict(weights, strict=False)
    by_list.load_state_dict({k.replace("levels.", "levels_"): v for k, v in weights.items()}, False)
    assert getter.feature_info.channels() == by_list.feature_info.channels()
    assert getter.feature_info.reduction() == by_list.feature_info.reduction()
    maps = getter(images)
    assert [tuple(m.shape[1:]) for m in maps] == MAPS[name][1::2]
    for nchw, nhwc in zip(maps, by_list(images), strict=True):
        torch.testing.assert_close(nchw, nhwc.permute(0, 3, 1, 2))


def test_forward_intermediates(name, model, images):
    final, maps = model.forward_intermediates(images)
    torch.testing.assert_close(final, model.forward_features(images))
    assert [tuple(m.shape[1:]) for m in maps] == MAPS[name]
    first, last = model.forward_intermediates(
        images, [0, 3], norm=True, output_fmt="NHWC", intermediates_only=True
    )
    torch.testing.assert_close(first, maps[0].permute(0, 2, 3, 1))
    torch.testing.assert_close(last, final)
    early, selected = model.forward_intermediates(images, [1], stop_early=True)
    torch.testing.assert_close(selected[0], maps[1])
    torch.testing.assert_close(early.permute(0, 3, 1, 2), maps[1])
    with pytest.raises(ValueError, match="NLC"):
        model.forward_intermediates(images, output_fmt="NLC")


@pytest.mark.parametrize("index", [1, 3])
def test_pruned_model_keeps_its_features_and_no_idle_parameter(model, images, index):
    expected = model.forward_intermediates(images, [index], intermediates_only=True)[0]
    kept = model.prune_intermediate_layers([index], prune_norm=True)
    features = model.train()(images)
    assert kept == [index]
    assert features.shape[-1] == model.num_features == model.head_hidden_size == expected.shape[1]
    torch.testing.assert_close(model.eval()(images).permute(0, 3, 1, 2), expected)
    features.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_pruning_nothing_keeps_the_output(model, images):
    expected = model(images)
    model.prune_intermediate_layers([3], prune_head=False)
    torch.testing.assert_close(model(images), expected)


def test_feature_maps_can_have_norms_of_their_own(tiny_model, images):
    maps = {"features_only": True, "out_indices": (1, 2), "img_size": SIZE}
    extractor = tiny_model("dinat_mini", stage_norms=True, **maps)
    assert not list(extractor.model.stage_norms[0].parameters())
    plain = tiny_model("dinat_mini", feature_cls="getter", **maps)
    plain.load_state_dict(extractor.state_dict(), strict=False)
    for i, normed, bare in zip((1, 2), extractor(images), plain(images), strict=True):
        expected = extractor.model.stage_norms[i](bare.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        torch.testing.assert_close(normed, expected)
    sum(m.sum() for m in extractor.train()(images)).backward()
    assert all(p.grad is not None for p in extractor.parameters())
    with pytest.raises(ValueError, match="feature_cls='list'"):
        tiny_model("dinat_mini", stage_norms=True, feature_cls="list", **maps)


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


def test_classifier_can_be_replaced_and_removed(name, model, images):
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    width, height, breadth = MAPS[name][-1]
    model.to(torch.float64).train()
    model.reset_classifier(0)
    model.reset_classifier(5)
    assert model.get_classifier().weight.shape == (5, width)
    assert model.get_classifier().weight.dtype == torch.float64
    assert model.get_classifier().training
    model.float().eval().reset_classifier(0)
    torch.testing.assert_close(model(images), features)
    model.reset_classifier(0, "")
    assert model(images).shape == (2, height, breadth, width)
    assert (model.num_classes, model.global_pool) == (0, "")


def test_concatenating_pooling_widens_the_classifier(create, images):
    model = create(global_pool="catavgmax")
    assert model(images).shape == (2, 11)
    assert model.head_hidden_size == 2 * model.num_features


def test_gradient_checkpointing_changes_no_result(model, images):
    def gradients():
        model.zero_grad()
        model(images).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients()
    calls = []
    model.levels[0].register_forward_hook(lambda *_: calls.append("level"))
    attention = neighborhood_attentions(model)[0]
    attention.register_forward_hook(lambda *_: calls.append("attention"))
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), expected)
    assert calls.count("attention") == 2  # again in the backward pass
    model.set_grad_checkpointing(False)
    gradients()
    assert calls.count("attention") == 3


def test_weight_decay_spares_existing_parameters(model):
    names = {name for name, _ in model.named_parameters()}
    assert model.no_weight_decay() == {name for name in names if "rpb" in name} != set()


def test_learning_rate_decays_from_head_to_stem(name, model):
    groups = create_optimizer_v2(model, "sgd", lr=1.0, layer_decay=0.5).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    blocks = [scale[id(attention.proj.weight)] for attention in neighborhood_attentions(model)]
    assert all(later == 2 * earlier for earlier, later in pairwise(blocks))
    assert scale[id(model.patch_embed.norm.weight)] < blocks[0]
    # The layers between blocks go with the block beside them.
    if len({width for width, *_ in MAPS[name]}) > 1:
        assert scale[id(model.levels[1].downsample.norm.weight)] == blocks[2]
    assert scale[id(model.norm.weight)] == blocks[-1]
    assert scale[id(model.head.fc.weight)] == 1.0


def test_dtype_can_change_after_a_forward_pass(model, images):
    model(images)
    assert model.to(torch.bfloat16)(images.to(torch.bfloat16)).dtype == torch.bfloat16


def test_autocast_stays_close(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    assert F.cosine_similarity(logits.float(), model(images), dim=-1).min() > 0.99


def test_nominal_size_is_recorded(tiny_model, images):
    model = tiny_model("dinat_mini")
    expected = model(images)
    model.set_input_size(96)
    assert get_model_input_config(model)["input_size"] == (3, 96, 96)
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(
    ("published", "size", "rows", "columns"),
    [
        ("dinat_large", (384, 384), [13, 6, 3, 1], [13, 6, 3, 1]),
        ("dinat_large_384", (224, 224), [8, 4, 2, 1], [8, 4, 2, 1]),
        ("dinat_large_384_11x11", (224, 224), [5, 2, 1, 1], [5, 2, 1, 1]),
        ("dinat_s_tiny", (800, 1344), [28, 14, 7, 1], [48, 24, 12, 1]),
    ],
    ids=["larger", "smaller", "11x11", "rectangle"],
)
def test_dilations_can_follow_the_size(published, size, rows, columns):
    model = timm.create_model(published, device="meta")
    before = [attention.dilation for attention in neighborhood_attentions(model)]
    model.set_input_size(32, rescale_dilations=True)
    assert {attention.dilation for attention in neighborhood_attentions(model)} == {(1, 1)}
    model.set_input_size(size, rescale_dilations=True)
    for i, level in enumerate(model.levels):
        dilations = [attention.dilation for attention in neighborhood_attentions(level)]
        assert set(dilations) == {(1, 1), (rows[i], columns[i])}
    after = [attention.dilation for attention in neighborhood_attentions(model)]
    assert all(a == (1, 1) for a, b in zip(after, before, strict=True) if b == (1, 1))


def test_refused_size_changes_nothing(tiny_model):
    model = tiny_model("dinat_mini")
    before = [attention.dilation for attention in neighborhood_attentions(model)]
    with pytest.raises(ValueError, match=r"\(0, 0\)"):
        model.set_input_size(0, rescale_dilations=True)
    assert [attention.dilation for attention in neighborhood_attentions(model)] == before


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript(create, model, images):
    torch.testing.assert_close(torch.jit.script(model)(images), model(images))
    getter = create(features_only=True, out_indices=(0, 2), feature_cls="getter")
    for scripted, eager in zip(torch.jit.script(getter)(images), getter(images), strict=True):
        torch.testing.assert_close(scripted, eager)


def test_fx(model, images):
    traced = timm.models.create_feature_extractor(model, {"levels.1": "map", "head": "logits"})
    outputs = traced(images)
    torch.testing.assert_close(outputs["logits"], model(images), rtol=0, atol=0)
    expected = model.forward_intermediates(images, [1], output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(outputs["map"], expected[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("published", "changes"),
    [
        ("nat_mini", {"dilations": "ade20k", "kernel_size": (7, 5, 5, 3), "layer_scale": 0.1}),
        ("dinat_s_tiny", {}),
        ("dinat_isotropic_small", {}),
    ],
    ids=["nat", "dinat_s", "isotropic"],
)
def test_model_is_rebuilt_from_a_directory(tiny_model, images, tmp_path, published, changes):
    model = tiny_model(published, **changes)
    model.set_input_size(SIZE, rescale_dilations="layer_scale" not in changes)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert [a.dilation for a in neighborhood_attentions(again)] == [
        a.dilation for a in neighborhood_attentions(model)
    ]
    torch.testing.assert_close(again(images), model(images))
