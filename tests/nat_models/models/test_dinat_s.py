"""DiNAT_s against the original model."""

import original
import pytest
import timm
import torch

DEPTHS, HEADS = (2, 2, 2, 1), (1, 2, 4, 8)


@pytest.mark.parametrize("size", [(224, 224), (200, 264), (203, 261), (96, 96)])
def test_logits_are_the_original_models(assert_parity, size):
    dilations = [[1, 8], [1, 4], [1, 2], [1]]
    assert_parity("dinat_s_tiny", size, original.dinat_s, HEADS, 7, dilations, depths=DEPTHS)


@pytest.mark.parametrize(
    ("name", "first", "third", "rate"),
    [("dinat_s_tiny", 8, [1, 2] * 3, 0.2), ("dinat_s_small", 8, [1, 2] * 9, 0.3),
     ("dinat_s_base", 8, [1, 2] * 9, 0.5), ("dinat_s_large", 8, [1, 2] * 9, 0.35),
     ("dinat_s_large_384", 13, [1, 3] * 9, 0.35), ("dinat_s_large_21k", 8, [1, 2] * 9, 0.2)],
)  # fmt: skip
def test_settings_are_the_published_ones(name, first, third, rate):
    model = timm.create_model(name, device="meta")
    dilations = [[block.attn.dilation[0] for block in level.blocks] for level in model.levels]
    assert dilations == [[1, first], [1, first // 2], third, [1, 1]]
    assert model.levels[-1].blocks[-1].drop_path1.drop_prob == pytest.approx(rate)
    assert model.num_classes == (21841 if name.endswith("21k") else 1000)


def test_downsampling_takes_odd_maps(tiny_model):
    maps = tiny_model("dinat_s_tiny", features_only=True)(torch.randn(1, 3, 50, 71))
    assert [tuple(m.shape[1:3]) for m in maps] == [(13, 18), (7, 9), (4, 5), (2, 3)]
