"""Isotropic NAT and DiNAT and ViT-RPB against the original models, and at other sizes."""

import original
import pytest
import timm
import torch
from torch.nn import functional as F

from nat_models.models.isotropic import IsotropicNAT


@pytest.mark.parametrize(
    ("name", "kernel_size", "dilations"),
    [
        ("nat_isotropic_small", 7, [1, 1, 1, 1]),
        ("dinat_isotropic_small", 7, [1, 2, 1, 2]),
        ("vitrpb_small", None, [1, 1, 1, 1]),
    ],
)
def test_logits_are_the_original_models(assert_parity, name, kernel_size, dilations):
    assert_parity(name, (224, 224), original.isotropic, 2, kernel_size, dilations)


@pytest.mark.parametrize("size", [(96, 96), (203, 261)])
def test_images_of_other_sizes_are_padded_to_whole_patches(tiny_model, size):
    model = tiny_model("dinat_isotropic_small", dtype=torch.float64)
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    padded = F.pad(images, (0, -size[1] % 16, 0, -size[0] % 16))
    weights = {key.replace("levels.", "layers."): v for key, v in model.state_dict().items()}
    weights["head.weight"], weights["head.bias"] = model.head.fc.weight, model.head.fc.bias
    with torch.no_grad():
        expected = original.isotropic(weights, padded, 2, 7, [1, 2, 1, 2])
        torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "dilations", "rate"),
    [("nat_isotropic_small", [1] * 12, 0.1), ("dinat_isotropic_small", [1, 2] * 6, 0.1),
     ("nat_isotropic_base", [1] * 12, 0.4), ("dinat_isotropic_base", [1, 2] * 6, 0.4),
     ("vitrpb_small", [1] * 12, 0.1), ("vitrpb_base", [1] * 12, 0.4)],
)  # fmt: skip
def test_settings_are_the_published_ones(name, dilations, rate):
    model = timm.create_model(name, device="meta")
    assert [block.attn.dilation[0] for block in model.levels] == dilations
    assert model.levels[-1].drop_path1.drop_prob == pytest.approx(rate)
    window = 14 if name.startswith("vitrpb") else 7
    assert {block.attn.kernel_size for block in model.levels} == {(window, window)}


@pytest.mark.parametrize("size", [(96, 224), (256, 256)], ids=["smaller", "larger"])
def test_whole_map_attention_refuses_images_of_another_size(tiny_model, size):
    with pytest.raises(ValueError, match=r"\(224, 224\).*set_input_size"):
        tiny_model("vitrpb_small")(torch.randn(1, 3, *size))


def test_whole_map_attention_moves_to_another_size(tiny_model, tmp_path):
    model = tiny_model("vitrpb_small").requires_grad_(False)
    images = torch.randn(1, 3, 96, 160)
    model.set_input_size((96, 160))
    assert model.levels[0].attn.rpb.shape == (2, 11, 19)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    again = tiny_model("vitrpb_small", img_size=(96, 160))
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(images), model(images))
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    saved = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(saved(images), model(images))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"dilations": [1, 2]}, "dilations needs one entry a block"),
        ({"dilations": "coco"}, "'coco'"),
        ({"kernel_size": None}, "img_size is needed"),
    ],
    ids=["dilations", "dilations-name", "whole-map"],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        IsotropicNAT(**kwargs, device="meta")


def test_feature_maps_are_a_quarter_of_the_depth_apart(tiny_model):
    assert timm.create_model(
        "nat_isotropic_small", features_only=True, device="meta"
    ).feature_info.module_name() == [f"levels.{i}" for i in (2, 5, 8, 11)]
    maps = tiny_model("nat_isotropic_small", features_only=True)(torch.randn(1, 3, 112, 130))
    assert [tuple(m.shape) for m in maps] == [(1, 7, 9, 64)] * 4
