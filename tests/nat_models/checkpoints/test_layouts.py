"""Every published layout to ours and back."""

import pytest
import torch

from nat_models.checkpoints import layout_of, to_layout, to_ours

WRAPPERS = ["", "backbone.", "model.", "module.model._orig_mod."]


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_official_weights_return_from_ours_bit_by_bit(official_weights, official_name):
    official = official_weights(official_name)
    assert layout_of(official) == "official"
    ours = to_ours(official)
    assert layout_of(ours) == "ours"
    assert_same(to_ours(ours), ours)
    assert_same(to_layout(ours, "official", official_name), official)


def test_transformers_weights_return_from_ours_bit_by_bit(
    official_weights, to_transformers, transformers_name
):
    official = official_weights(transformers_name)
    hf = to_transformers(official, prefix=f"{transformers_name.split('_')[0]}.")
    assert layout_of(to_transformers(official, prefix="")) == "hf"
    ours = to_ours(hf)
    assert_same(ours, to_ours(official))
    assert_same(to_layout(ours, "hf", transformers_name), hf)


@pytest.mark.parametrize("name", ["dinat_base", "dinat_s_tiny"])
def test_backbones_of_detectors_return_bit_by_bit(official_weights, to_transformers, name):
    official = {k: v for k, v in official_weights(name).items() if not k.startswith("norm.")}
    del official["head.weight"], official["head.bias"]
    official |= {f"norm{i}.{leaf}": torch.randn(4) for i in range(4) for leaf in ("weight", "bias")}
    detector = {f"backbone.{key}": value for key, value in official.items()}
    ours = to_ours({"neck.lateral.weight": torch.zeros(3), **detector, "norm.x": torch.zeros(1)})
    assert "stage_norms.3.bias" in ours
    assert_same(to_layout(ours, "official", name), official)
    if name == "dinat_base":
        hf = to_transformers(official, prefix="")
        assert_same(to_ours(hf), ours)
        assert_same(to_layout(ours, "hf", name), hf)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_prefixes_are_removed_in_every_layout(official_weights, to_transformers, wrapper):
    official = official_weights("nat_small")
    ours = to_ours(official)
    for state_dict in (official, ours, to_transformers(official), to_transformers(official, "")):
        wrapped = {wrapper + key: value for key, value in state_dict.items()}
        assert_same(to_ours(wrapped), ours)


def test_two_models_in_one_file_are_refused(official_weights):
    official = official_weights("nat_mini")
    both = {f"{who}.{k}": v for who in ("student", "teacher") for k, v in official.items()}
    with pytest.raises(ValueError, match=r"several models.*'student\.', 'teacher\.'"):
        to_ours(both)


def test_incomplete_projection_is_left_out(official_weights, to_transformers):
    hf = to_transformers(official_weights("nat_mini"))
    del hf["nat.encoder.levels.0.layers.0.attention.self.key.weight"]
    ours = to_ours(hf)
    assert "levels.0.blocks.0.attn.qkv.weight" not in ours
    assert "levels.0.blocks.0.attn.qkv.bias" in ours


@pytest.mark.parametrize("name", ["dinat_s_tiny", "nat_isotropic_small", "vitrpb_small"])
def test_transformers_has_no_such_class(official_weights, name):
    with pytest.raises(ValueError, match=f"no class for {name}"):
        to_layout(to_ours(official_weights(name)), "hf", name)


def test_keys_of_other_models_are_passed_on():
    foreign = {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}
    assert_same(to_ours(foreign), foreign)
