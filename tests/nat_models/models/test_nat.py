"""NAT against the original model, and its own arguments."""

import original
import pytest
import timm
import torch

NAMES = ["nat_mini", "nat_tiny", "nat_small", "nat_base"]
PLAIN = [[1, 1], [1], [1, 1], [1]]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("nat_mini", (224, 224)),
        ("nat_small", (200, 264)),  # with layer scale
        ("nat_mini", (203, 261)),
        ("nat_small", (96, 96)),  # the last two maps are padded
        ("nat_mini", (20, 33)),  # every map is padded, the first along one axis
    ],
)
def test_logits_are_the_original_models(assert_parity, name, size):
    assert_parity(name, size, original.nat, (1, 2, 4, 8), 7, PLAIN)


@pytest.mark.slow
def test_logits_of_nat_mini_are_the_original_models(assert_parity):
    settings = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16)}
    dilations = [[1] * depth for depth in settings["depths"]]
    heads = settings["num_heads"]
    assert_parity("nat_mini", (224, 224), original.nat, heads, 7, dilations, **settings)


@pytest.mark.parametrize(("name", "rate"), [*zip(NAMES, [0.2, 0.2, 0.3, 0.5], strict=True)])
def test_stochastic_depth_rises_linearly_to_the_published_rate(name, rate):
    model = timm.create_model(name, device="meta")
    blocks = [block for level in model.levels for block in level.blocks]
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx(torch.linspace(0, rate, len(blocks)).tolist())
    assert rates == [getattr(block.drop_path2, "drop_prob", 0.0) for block in blocks]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_heads": (2, 4)}, "num_heads needs one entry a stage"),
        ({"kernel_size": (7, 5)}, "kernel_size needs one entry a stage"),
        ({"dilations": [[1, 1], [1], [1], [1]]}, "dilations needs one entry a block"),
        (
            {"dilations": [1, 2]},
            r"dilations needs one entry a block, in a list a stage, got .*1, 2",
        ),
        (
            {"dilations": 2},
            r"dilations needs one entry a block, in a list a stage, got dilations=2",
        ),
        ({"dilations": "magic"}, "magic"),
        ({"patch_size": 3}, "patch_size must be 4, 2 or 1"),
        ({"attention_backend": "magic"}, "magic"),
        ({"drop_path_rate": 1.5}, r"drop_path=1\.\d+"),
    ],
    ids=[
        "heads",
        "kernel",
        "dilations",
        "flat",
        "number",
        "dilations-name",
        "patch",
        "backend",
        "drop-path",
    ],
)
def test_bad_argument_is_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("nat_mini", device="meta", **kwargs)


def test_dilations_and_kernel_sizes_reach_the_attention(tiny_nat):
    dilations = [[1, 8], [4], [1, 2], [1]]
    model = tiny_nat(dilations=dilations, kernel_size=(7, 5, 5, 3))
    for i, level in enumerate(model.levels):
        assert [block.attn.dilation for block in level.blocks] == [(d, d) for d in dilations[i]]
        size = (7, 5, 5, 3)[i]
        assert {block.attn.kernel_size for block in level.blocks} == {(size, size)}
