"""Checkpoints of every published layout, and files that must be refused."""

import gzip
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from nat_models.checkpoints import (
    CheckpointError,
    checkpoint_filter_fn,
    load_checkpoint,
    read_checkpoint,
)

OFFICIAL = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "data/official_state_dicts.json.gz").read_bytes())
)

TRANSFORMERS_NAMES = {
    "patch_embed.proj": "nat.embeddings.patch_embeddings.projection",
    "patch_embed.norm": "nat.embeddings.norm",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.rpb": "attention.self.rpb",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def to_transformers(original):
    """The transformers layout of an original state dict."""
    result = {}
    for key, value in original.items():
        if match := re.fullmatch(r"levels\.(\d+)\.blocks\.(\d+)\.(.+)", key):
            level, block, leaf = match.groups()
            layer = f"nat.encoder.levels.{level}.layers.{block}"
            if leaf.startswith("attn.qkv"):
                for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    result[f"{layer}.attention.self.{name}.{leaf.split('.')[-1]}"] = part
            elif leaf == "gamma1":
                gamma2 = original[key.replace("gamma1", "gamma2")]
                result[f"{layer}.layer_scale_parameters"] = torch.stack([value, gamma2])
            elif leaf != "gamma2":
                ours = next(name for name in TRANSFORMERS_NAMES if leaf.startswith(name))
                result[f"{layer}.{leaf.replace(ours, TRANSFORMERS_NAMES[ours])}"] = value
        elif key.startswith("levels."):
            result[f"nat.encoder.{key}"] = value
        elif key.startswith("patch_embed."):
            name = key[: len("patch_embed.proj")]
            result[key.replace(name, TRANSFORMERS_NAMES[name])] = value
        elif key.startswith("norm."):
            result[f"nat.layernorm.{key.split('.')[1]}"] = value
        else:
            result[key.replace("head.", "classifier.")] = value
    return result


@pytest.fixture
def model(tiny_nat):
    return tiny_nat("nat_small", embed_dim=32, num_heads=(1, 2, 4, 8))  # with layer scale


@pytest.fixture
def original(model, to_original):
    return to_original(model.state_dict())


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


def in_detector(original):
    detector = {f"backbone.{key}": value for key, value in original.items()}
    return {
        "neck.lateral.weight": torch.zeros(3),
        **detector,
        "backbone.norm0.weight": torch.zeros(32),
        "bbox_head.fc.bias": torch.zeros(3),
    }


@pytest.mark.parametrize(
    "layout",
    [
        dict,
        to_transformers,
        in_detector,
        lambda original: {f"module.{key}": value for key, value in original.items()},
        lambda original: {**original, "levels.0.attn.relative_position_index": torch.zeros(3)},
    ],
    ids=["original", "transformers", "detector", "wrapped", "index-buffer"],
)
def test_published_layout_keeps_the_logits(tiny_nat, model, original, images, layout, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(layout(original), path)
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


def test_safetensors_load(tiny_nat, model, original, images, tmp_path):
    safetensors.torch.save_file(to_transformers(original), tmp_path / "model.safetensors")
    again = tiny_nat("nat_small")
    load_checkpoint(again, tmp_path / "model.safetensors")
    torch.testing.assert_close(again(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize("layout", [dict, to_transformers])
@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_all_official_keys_are_known(name, layout):
    official = {
        key: torch.empty(shape, device="meta")
        for key, shape in OFFICIAL[name]["state_dict"].items()
    }
    model = timm.create_model(name, device="meta")
    ours = checkpoint_filter_fn(layout(official), model)
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
    expected = torch.nn.functional.interpolate(table[None], (21, 21), mode="bicubic")[0]
    torch.testing.assert_close(larger.levels[0].blocks[0].attn.rpb, expected)


def test_timm_loads_published_files_and_adapts_them(tiny_nat, original, model, images, tmp_path):
    torch.save(to_transformers(original), tmp_path / "weights.pth")
    source = {"file": str(tmp_path / "weights.pth"), "num_classes": 11}
    settings = {"depths": (2, 1, 2, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)}
    create = {"pretrained": True, "pretrained_cfg_overlay": source, **settings}
    same = timm.create_model("nat_small", **create).eval()
    torch.testing.assert_close(same(images), model(images))
    grey = timm.create_model("nat_small", **create, in_chans=1, num_classes=5).eval()
    assert grey(images[:, :1]).shape == (2, 5)
    torch.testing.assert_close(grey.norm.weight, model.norm.weight)
    features = timm.create_model("nat_small", **create, features_only=True).eval()
    torch.testing.assert_close(features(images)[0].shape, torch.Size([2, 16, 16, 32]))


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


def test_long_lists_of_mismatches_are_cut(tiny_nat, model, tmp_path):
    torch.save({"foreign.weight": torch.zeros(1)}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match=r"and \d+ more") as error:
        load_checkpoint(model, tmp_path / "foreign.pth")
    assert str(error.value).count("\n") == 6


class Payload:
    """Would create a file when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path):
    target, path = tmp_path / "created", tmp_path / "evil.pth"
    torch.save({"state_dict": {}, "payload": Payload(target)}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pth: .* would run code"):
        read_checkpoint(path)
    assert not target.exists()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("keep", [0, 100, 5000])
def test_damaged_file_is_named(original, suffix, keep, tmp_path):
    path = tmp_path / f"cut.{suffix}"
    (torch.save if suffix == "pth" else safetensors.torch.save_file)(original, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"cut.{suffix}: .*\({keep} bytes\)"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], torch.zeros(3)])
def test_file_without_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "empty.pth")
    with pytest.raises(CheckpointError, match=r"empty\.pth"):
        read_checkpoint(tmp_path / "empty.pth")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pth: no such file"):
        read_checkpoint(tmp_path / "nowhere.pth")
