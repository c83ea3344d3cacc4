"""DiNAT against the original model, and the published dilations."""

import original
import pytest
import timm

DEPTHS, HEADS = (2, 2, 2, 1), (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("dinat_mini", (224, 224)),
        ("dinat_base", (200, 264)),  # with layer scale; padded along the height alone
        ("dinat_mini", (203, 261)),
        ("dinat_base", (96, 96)),  # every dilated window is larger than its map
    ],
)
def test_logits_are_the_original_models(assert_parity, name, size):
    dilations = [[1, 8], [1, 4], [1, 2], [1]]
    assert_parity(name, size, original.nat, HEADS, 7, dilations, depths=DEPTHS)


@pytest.mark.parametrize(
    ("name", "kernel_size", "dilations"),
    [("dinat_large_384", 7, [[1, 13], [1, 6], [1, 3], [1]]),
     ("dinat_large_384_11x11", 11, [[1, 8], [1, 4], [1, 2], [1]])],
)  # fmt: skip
def test_variants_for_384_are_the_original_models(assert_parity, name, kernel_size, dilations):
    assert_parity(name, (384, 384), original.nat, HEADS, kernel_size, dilations, depths=DEPTHS)


@pytest.mark.parametrize(
    ("name", "third"),
    [("dinat_mini", [1, 2] * 3), ("dinat_tiny", [1, 2] * 9), ("dinat_large_21k_11x11", [1, 2] * 9)],
)
def test_dilations_are_the_published_ones(name, third):
    model = timm.create_model(name, device="meta")
    dilations = [[block.attn.dilation[0] for block in level.blocks] for level in model.levels]
    assert dilations == [[1, 8, 1], [1, 4, 1, 4], third, [1] * 5]


@pytest.mark.parametrize(
    ("name", "rate"),
    [("dinat_mini", 0.2), ("dinat_small", 0.3), ("dinat_base", 0.5), ("dinat_large", 0.35),
     ("dinat_large_384", 0.35), ("dinat_large_384_11x11", 0.35), ("dinat_large_21k", 0.2)],
)  # fmt: skip
def test_stochastic_depth_rises_to_the_published_rate(name, rate):
    model = timm.create_model(name, device="meta")
    assert model.levels[-1].blocks[-1].drop_path1.drop_prob == pytest.approx(rate)


def test_weights_of_22k_have_their_classes():
    assert timm.create_model("dinat_large_21k", device="meta").num_classes == 21841
    assert timm.create_model("dinat_large", device="meta").num_classes == 1000


def test_unlike_nat_small_dinat_small_has_no_layer_scale():
    keys = timm.create_model("dinat_small", device="meta").state_dict()
    assert not any(key.endswith("gamma") for key in keys)
