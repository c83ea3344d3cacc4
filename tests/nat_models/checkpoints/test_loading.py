"""Loading published layouts into models; files that do not fit."""

import re

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from nat_models.checkpoints import (
    CheckpointError,
    checkpoint_filter_fn,
    convert_before_loading,
    load_checkpoint,
)

SMALL = {"embed_dim": 32, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 4, 8)}


@pytest.fixture
def model(tiny_nat):
    return tiny_nat("nat_small")  # with layer scale


@pytest.fixture
def original(model, to_original):
    return to_original(model.state_dict())


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


@pytest.fixture
def layouts(original, to_transformers):
    """Functions that make a published layout of the original one, by name."""
    return {
        "original": dict,
        "transformers": to_transformers,
        "detector": lambda weights: {
            "neck.lateral.weight": torch.zeros(3),
            **{f"backbone.{key}": value for key, value in weights.items()},
            "backbone.norm0.weight": torch.zeros(32),
            "bbox_head.fc.bias": torch.zeros(3),
        },
        "wrapped": lambda weights: {f"module.{key}": value for key, value in weights.items()},
        "index-buffer": lambda weights: {
            **weights,
            "levels.0.blocks.0.attn.relative_position_index": torch.zeros(3),
        },
    }


@pytest.mark.parametrize(
    "layout", ["original", "transformers", "detector", "wrapped", "index-buffer"]
)
def test_published_layout_keeps_the_logits(
    tiny_nat, model, original, images, layouts, layout, tmp_path
):
    path = tmp_path / "weights.pth"
    torch.save(layouts[layout](original), path)
    again = tiny_nat("nat_small")
    assert not torch.allclose(again(images), model(images))
    load_checkpoint(again, path)
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize("prefix", ["", "model.", "model._orig_mod."])
def test_own_layout_loads_from_a_training_checkpoint(tiny_nat, model, images, prefix, tmp_path):
    weights = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    if prefix:
        weights["loss.weight"] = torch.ones(3)
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "last.ckpt")
    again = tiny_nat("nat_small")
    load_checkpoint(again, tmp_path / "last.ckpt")
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


def test_safetensors_load(tiny_nat, model, original, images, to_transformers, tmp_path):
    safetensors.torch.save_file(to_transformers(original), tmp_path / "model.safetensors")
    again = tiny_nat("nat_small")
    load_checkpoint(again, tmp_path / "model.safetensors")
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


def test_official_keys_and_shapes_are_the_models(official_shapes, official_name):
    official = {
        key: torch.empty(shape, device="meta")
        for key, shape in official_shapes(official_name).items()
    }
    model = timm.create_model(official_name, num_classes=1000, device="meta")
    ours = checkpoint_filter_fn(official, model)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in ours.items()} == shapes


def test_filter_leaves_its_input_and_other_models_alone(original):
    before = dict(original)
    vit = timm.create_model("vit_tiny_patch16_224", device="meta")
    assert checkpoint_filter_fn(vit.state_dict(), vit).keys() == vit.state_dict().keys()
    checkpoint_filter_fn(original, vit)
    assert original.keys() == before.keys()


def test_bias_tables_are_resized_for_another_kernel_size(tiny_nat, model, original, tmp_path):
    torch.save(original, tmp_path / "k7.pth")
    larger = tiny_nat("nat_small", kernel_size=11)
    load_checkpoint(larger, tmp_path / "k7.pth")
    table = model.levels[0].blocks[0].attn.rpb
    expected = nn.functional.interpolate(table[None], (21, 21), mode="bicubic")[0]
    torch.testing.assert_close(larger.levels[0].blocks[0].attn.rpb, expected)


def test_timm_loads_published_files_and_adapts_them(original, model, images, layouts, tmp_path):
    torch.save(layouts["transformers"](original), tmp_path / "weights.pth")
    source = {"file": str(tmp_path / "weights.pth"), "num_classes": 11}
    create = {"pretrained": True, "pretrained_cfg_overlay": source, **SMALL}
    same = timm.create_model("nat_small", **create).eval()
    torch.testing.assert_close(same(images), model(images))
    grey = timm.create_model("nat_small", **create, in_chans=1, num_classes=5).eval()
    assert grey(images[:, :1]).shape == (2, 5)  # the file's classifier is dropped
    torch.testing.assert_close(grey.norm.weight, model.norm.weight)
    features = timm.create_model("nat_small", **create, features_only=True).eval()
    assert features(images)[0].shape == (2, 16, 16, 32)


@pytest.mark.parametrize("layout", ["original", "transformers", "detector", "wrapped"])
def test_checkpoint_path_takes_every_layout(model, original, images, layouts, layout, tmp_path):
    torch.save(layouts[layout](original), tmp_path / "weights.pth")
    path = str(tmp_path / "weights.pth")
    again = timm.create_model("nat_small", num_classes=11, checkpoint_path=path, **SMALL).eval()
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)
    body = timm.create_model("nat_small", num_classes=0, checkpoint_path=path, **SMALL).eval()
    torch.testing.assert_close(
        body(images), model.forward_head(model.forward_features(images), True)
    )


@pytest.mark.parametrize(
    "adapted",
    [{}, {"num_classes": 5}, {"in_chans": 1}, {"features_only": True}],
    ids=["same", "classes", "channels", "features"],
)
def test_pretrained_names_the_file_that_does_not_fit(original, tmp_path, adapted):
    def create(weights):
        torch.save(weights, tmp_path / "weights.pth")
        source = {"file": str(tmp_path / "weights.pth"), "num_classes": 11}
        args = {"num_classes": 11, **SMALL, **adapted}
        timm.create_model("nat_small", pretrained=True, pretrained_cfg_overlay=source, **args)

    create(original)
    with pytest.raises(
        CheckpointError,
        match=r"weights\.pth: .*NAT:\n  patch_embed\.proj\.0\.weight \[16, \d, 3, 3\]",
    ):
        create({"conv1.weight": torch.zeros(1)})
    without = {k: v for k, v in original.items() if k != "levels.2.blocks.0.attn.rpb"}
    with pytest.raises(CheckpointError, match=r"rpb \[4, 13, 13\] is missing"):
        create(without)
    with pytest.raises(CheckpointError, match=r"extra \[1\] is not the model's"):
        create({**original, "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"norm\.bias has shape \[7\], the model's \[256\]"):
        create({**original, "norm.bias": torch.zeros(7)})


@pytest.mark.parametrize(
    "table",
    [torch.zeros(13), torch.zeros(169, 2), torch.zeros(3, 21, 21)],
    ids=["1d", "2d", "heads"],
)
def test_bias_table_of_another_kind_is_named(model, original, table, tmp_path):
    key = "levels.0.blocks.0.attn.rpb"
    torch.save({**original, key: table}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(model, tmp_path / "weights.pth")
    assert f"{key} has shape {list(table.shape)}, the model's [1, 13, 13]" in str(error.value)


def test_checkpoint_path_refuses_what_does_not_fit(original, tmp_path):
    torch.save(original, tmp_path / "weights.pth")
    with pytest.raises(RuntimeError, match=r"size mismatch for head\.fc\.weight"):
        timm.create_model("nat_small", checkpoint_path=str(tmp_path / "weights.pth"), **SMALL)
    torch.save({**original, "extra": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(RuntimeError, match=r'Unexpected key.* "extra"'):
        timm.create_model(
            "nat_small", num_classes=11, checkpoint_path=str(tmp_path / "more.pth"), **SMALL
        )


def test_local_folder_takes_every_layout(model, original, images, layouts, tmp_path):
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    for layout in ("original", "transformers"):
        safetensors.torch.save_file(layouts[layout](original), tmp_path / "model.safetensors")
        again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
        torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


def test_hook_converts_below_a_prefix_and_leaves_the_rest(tiny_nat, model, original, images):
    again = tiny_nat("nat_small")
    again.register_load_state_dict_pre_hook(convert_before_loading)
    parent = nn.ModuleDict({"model": again, "other": nn.Linear(2, 2)})
    state_dict = {f"model.{key}": value for key, value in original.items()}
    state_dict |= {"other.weight": torch.ones(2, 2), "other.bias": torch.ones(2)}
    parent.load_state_dict(state_dict)
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)
    assert parent["other"].bias.tolist() == [1, 1]


def test_backbone_of_a_detector_brings_its_norms(tiny_nat, to_original, images, tmp_path):
    model = tiny_nat("nat_small", stage_norms=True)
    weights = to_original(model.state_dict())
    detector = {
        "backbone." + re.sub(r"stage_norms\.(\d)", r"norm\1", key): value
        for key, value in weights.items()
        if not key.startswith(("norm.", "head."))
    }
    assert "backbone.norm3.bias" in detector
    torch.save({"state_dict": detector, "meta": {"epoch": 36}}, tmp_path / "detector.pth")
    backbone = timm.create_model(
        "nat_small",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "detector.pth")},
        features_only=True,
        stage_norms=True,
        **SMALL,
    ).eval()
    expected = model.forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(backbone(images), expected, rtol=0, atol=0)


def test_mismatch_names_keys_and_shapes_and_loads_nothing(tiny_nat, original, tmp_path):
    path = tmp_path / "other.pth"
    del original["norm.bias"]
    original["head.weight"] = torch.zeros(7, 256)
    original["extra.weight"] = torch.zeros(2)
    torch.save(original, path)
    other = tiny_nat("nat_small")
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(other, path)
    for part in (
        str(path),
        "head.fc.weight has shape [7, 256], the model's [11, 256]",
        "norm.bias [256] is missing",
        "extra.weight [2] is not the model's",
    ):
        assert part in str(error.value)
    torch.testing.assert_close(dict(other.state_dict()), before, rtol=0, atol=0)


def test_long_lists_of_mismatches_are_cut(model, tmp_path):
    torch.save({"foreign.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match=r"and \d+ more") as error:
        load_checkpoint(model, tmp_path / "foreign.pth")
    assert str(error.value).count("\n") == 6


def test_file_of_two_models_is_named(model, original, tmp_path):
    both = {f"{who}.{k}": v for who in ("student", "teacher") for k, v in original.items()}
    torch.save(both, tmp_path / "both.pth")
    with pytest.raises(CheckpointError, match=r"both\.pth: holds several models"):
        load_checkpoint(model, tmp_path / "both.pth")


def test_pretrained_state_dict_is_named():
    source = {"state_dict": {"conv1.weight": torch.zeros(1)}}
    with pytest.raises(CheckpointError, match=r"^pretrained_cfg's state_dict: does not fit NAT"):
        timm.create_model(
            "nat_mini", pretrained=True, num_classes=5, pretrained_cfg_overlay=source, **SMALL
        )
