"""DiNAT_s: Swin Transformer with dilated neighborhood attention in place of its windows.

Paper: "Dilated Neighborhood Attention Transformer", Hassani and Shi, https://arxiv.org/abs/2209.15001
Original code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT)
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from nat_models.models import dilations
from nat_models.models.base import create, pretrained_cfg
from nat_models.models.layers import PatchMerging, PatchTokenizer
from nat_models.models.nat import NAT

__all__ = ["DiNATS"]


class DiNATS(NAT):
    """NAT with Swin's stem and downsampling: patches that do not overlap.

    An image is zero-padded to whole patches, a map of odd sides by a row or column.
    """

    tokenizer = PatchTokenizer
    downsampler = PatchMerging
    dilation_presets = dilations.DINAT_S


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    return pretrained_cfg(f"https://shi-labs.com/projects/dinat/checkpoints/{file}.pth", **kwargs)


default_cfgs = generate_default_cfgs(
    {
        **{
            f"dinat_s_{size}.shi_in1k": _cfg(f"imagenet1k/dinat_s_{size}_in1k_224")
            for size in ("tiny", "small", "base")
        },
        # Pretrained on ImageNet-22K in spite of the files' names.
        "dinat_s_large.shi_in22k_ft_in1k": _cfg("imagenet1k/dinat_s_large_in1k_224"),
        "dinat_s_large_384.shi_in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_s_large_in1k_384",
            input_size=(3, 384, 384),
            pool_size=(12, 12),
            crop_pct=1.0,
        ),
        "dinat_s_large_21k.shi_in22k": _cfg(
            "imagenet22k/dinat_s_large_in22k_224", num_classes=21841
        ),
    }
)

_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}


def _create_dinat_s(variant: str, pretrained: bool, size: Any, args: Any, kwargs: Any) -> DiNATS:
    args = {"mlp_ratio": 4.0, "dilations": "imagenet", **size, **args, **kwargs}
    return create(DiNATS, variant, pretrained, **args)


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    """DiNAT_s-Tiny, 28 M parameters."""
    args = {"drop_path_rate": 0.2}
    return _create_dinat_s("dinat_s_tiny", pretrained, _TINY, args, kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    """DiNAT_s-Small, 50 M parameters."""
    args = {"drop_path_rate": 0.3}
    return _create_dinat_s("dinat_s_small", pretrained, _SMALL, args, kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    """DiNAT_s-Base, 88 M parameters."""
    args = {"drop_path_rate": 0.5}
    return _create_dinat_s("dinat_s_base", pretrained, _BASE, args, kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    """DiNAT_s-Large, 197 M parameters."""
    args = {"drop_path_rate": 0.35}
    return _create_dinat_s("dinat_s_large", pretrained, _LARGE, args, kwargs)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    """DiNAT_s-Large for 384x384 images."""
    args = {"dilations": "imagenet_384", "drop_path_rate": 0.35}
    return _create_dinat_s("dinat_s_large_384", pretrained, _LARGE, args, kwargs)


@register_model
def dinat_s_large_21k(pretrained: bool = False, **kwargs: Any) -> DiNATS:
    """DiNAT_s-Large with the 21841 classes of ImageNet-22K."""
    args = {"drop_path_rate": 0.2}
    return _create_dinat_s("dinat_s_large_21k", pretrained, _LARGE, args, kwargs)
