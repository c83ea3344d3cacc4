"""A NAT small enough to be trained on a CPU in minutes.

28x28 images become maps of 14x14, 7x7 and 4x4 tokens.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model

from nat_models.models.base import create
from nat_models.models.nat import NAT

__all__: list[str] = []

default_cfgs = generate_default_cfgs(
    {
        "nat_demo": {
            "num_classes": 10,
            "input_size": (1, 28, 28),
            "pool_size": (4, 4),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.5,),
            "std": (0.5,),
            "first_conv": "patch_embed.proj.0",
            "classifier": "head.fc",
        }
    }
)


@register_model
def nat_demo(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT of three stages for 28x28 images; there are no pretrained weights."""
    args = {
        "embed_dim": 32,
        "depths": (1, 2, 1),
        "num_heads": (2, 4, 8),
        "kernel_size": (7, 5, 3),
        "patch_size": 2,
        "mlp_ratio": 1.0,
        "drop_path_rate": 0.0,
    }
    return create(NAT, "nat_demo", pretrained, feature_levels=(0, 1, 2), **{**args, **kwargs})
