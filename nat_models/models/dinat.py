"""Dilated Neighborhood Attention Transformer (DiNAT): NAT with dilated windows.

Every second block spreads its window over the whole map.

Paper: "Dilated Neighborhood Attention Transformer", Hassani and Shi, https://arxiv.org/abs/2209.15001
Original code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT)
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from nat_models.models.base import create, pretrained_cfg
from nat_models.models.nat import NAT, SIZES

__all__: list[str] = []


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    url = f"https://shi-labs.com/projects/dinat/checkpoints/{file}.pth"
    return pretrained_cfg(url, first_conv="patch_embed.proj.0", **kwargs)


_AT_384 = {"input_size": (3, 384, 384), "pool_size": (12, 12), "crop_pct": 1.0}

default_cfgs = generate_default_cfgs(
    {
        **{
            f"dinat_{size}.shi_in1k": _cfg(
                f"imagenet1k/dinat_{size}_in1k_224", hf_hub_id=f"shi-labs/dinat-{size}-in1k-224"
            )
            for size in ("mini", "tiny", "small", "base")
        },
        "dinat_large.shi_in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_large_in22k_in1k_224", hf_hub_id="shi-labs/dinat-large-in22k-in1k-224"
        ),
        "dinat_large_384.shi_in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_large_in22k_in1k_384",
            hf_hub_id="shi-labs/dinat-large-in22k-in1k-384",
            **_AT_384,
        ),
        "dinat_large_384_11x11.shi_in22k_ft_in1k": _cfg(
            "imagenet1k/dinat_large_in22k_in1k_384_11x11",
            hf_hub_id="shi-labs/dinat-large-11x11-in22k-in1k-384",
            **_AT_384,
        ),
        "dinat_large_21k.shi_in22k": _cfg("imagenet22k/dinat_large_in22k_224", num_classes=21841),
        # The weights above, their bias tables resized; to be fine-tuned.
        "dinat_large_21k_11x11.shi_in22k": _cfg(
            "imagenet22k/dinat_large_in22k_224_11x11interp", num_classes=21841
        ),
    }
)


def _create_dinat(variant: str, pretrained: bool, size: str, args: Any, kwargs: Any) -> NAT:
    args = {**SIZES[size], "dilations": "imagenet", **args, **kwargs}
    return create(NAT, variant, pretrained, **args)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini, 20 M parameters."""
    return _create_dinat("dinat_mini", pretrained, "mini", {}, kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny, 28 M parameters."""
    return _create_dinat("dinat_tiny", pretrained, "tiny", {}, kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small, 51 M parameters; unlike NAT-Small it has no layer scale."""
    args = {"drop_path_rate": 0.3}
    return _create_dinat("dinat_small", pretrained, "small", args, kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base, 90 M parameters."""
    args = {"layer_scale": 1e-5, "drop_path_rate": 0.5}
    return _create_dinat("dinat_base", pretrained, "base", args, kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large, 201 M parameters."""
    args = {"drop_path_rate": 0.35}
    return _create_dinat("dinat_large", pretrained, "large", args, kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large for 384x384 images."""
    args = {"dilations": "imagenet_384", "drop_path_rate": 0.35}
    return _create_dinat("dinat_large_384", pretrained, "large", args, kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large for 384x384 images, with windows of 11x11."""
    args = {"kernel_size": 11, "drop_path_rate": 0.35}
    return _create_dinat("dinat_large_384_11x11", pretrained, "large", args, kwargs)


@register_model
def dinat_large_21k(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large with the 21841 classes of ImageNet-22K."""
    args = {"drop_path_rate": 0.2}
    return _create_dinat("dinat_large_21k", pretrained, "large", args, kwargs)


@register_model
def dinat_large_21k_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large with the 21841 classes of ImageNet-22K and windows of 11x11, to be fine-tuned."""
    args = {"kernel_size": 11, "drop_path_rate": 0.2}
    return _create_dinat("dinat_large_21k_11x11", pretrained, "large", args, kwargs)
