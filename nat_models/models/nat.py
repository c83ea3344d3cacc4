"""Neighborhood Attention Transformer (NAT).

Paper: "Neighborhood Attention Transformer", Hassani et al., CVPR 2023, https://arxiv.org/abs/2204.07143
Original code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT)
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model
from torch import nn

from nat_models.models import dilations as presets
from nat_models.models.base import Dilation, VisionModel, create, pretrained_cfg
from nat_models.models.layers import (
    ConvDownsampler,
    ConvTokenizer,
    Stage,
    neighborhood_attention_block,
)

__all__ = ["NAT"]


class NAT(VisionModel):
    """Hierarchical transformer whose tokens attend to their nearest neighbors.

    A stem, then stages of blocks; all stages but the first halve the map and double the channels.
    Any image size is taken: a map smaller than a block's `kernel_size * dilation` is zero-padded to
    it for the attention. With dilations this is DiNAT.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier, 0 for none.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", "" for none, ...
        img_size: Nominal size of the images, noted for timm; any other is taken too.
        patch_size: Pixels that a token of the first stage stands for, per side.
        embed_dim: Channels of the first stage.
        depths: Number of blocks, per stage.
        num_heads: Attention heads, per stage.
        kernel_size: Side of the attention window, for all stages or per stage.
        dilations: Spacing of a window's tokens, per stage and block; or the name of a list in
            `nat_models.models.dilations`; 1 everywhere if None.
        mlp_ratio: Hidden width of the MLPs as a multiple of the channels.
        qkv_bias: Whether queries, keys and values have a learned bias.
        layer_scale: Initial value of the layer scales, None for no layer scale.
        stage_norms: Whether each stage's output gets a LayerNorm of its own as a feature map, as in
            the published detectors.
        drop_rate: Dropout probability before the classifier.
        proj_drop_rate: Dropout probability after the attention and in the MLPs.
        attn_drop_rate: Dropout probability of the attention weights.
        drop_path_rate: Probability of dropping a branch for a sample, rising linearly from 0 at the
            first block to this at the last.
        attention_backend: Name of the attention's implementation; None chooses by the device.
        device: Where to create the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: A per-stage argument does not fit `depths`, or a name is unknown.
    """

    tokenizer: type[nn.Module] = ConvTokenizer
    downsampler: type[nn.Module] = ConvDownsampler
    dilation_presets = presets.DINAT

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
        patch_size: int = 4,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[int] = 7,
        dilations: str | Sequence[Sequence[Dilation]] | None = None,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        stage_norms: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        attention_backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if isinstance(kernel_size, int):
            kernel_size = [kernel_size] * len(depths)
        if dilations is None:
            dilations = [[1] * depth for depth in depths]
        elif isinstance(dilations, str):
            dilations = presets.resolve_dilations(dilations, depths, self.dilation_presets)
        _check_stages(depths, num_heads, kernel_size, dilations)

        stem = self.tokenizer(in_chans, embed_dim, patch_size, **dd)
        drop_path: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        channels = [embed_dim * 2**i for i in range(len(depths))]
        stages = []
        for i, (depth, dim) in enumerate(zip(depths, channels, strict=True)):
            downsample = self.downsampler(dim // 2, **dd) if i > 0 else nn.Identity()
            blocks = [
                neighborhood_attention_block(
                    dim,
                    num_heads[i],
                    kernel_size[i],
                    dilation=dilations[i][j],
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    layer_scale=layer_scale,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path[i][j],
                    attention_backend=attention_backend,
                    **dd,
                )
                for j in range(depth)
            ]
            stages.append(Stage(downsample, blocks))
        super().__init__(
            stem,
            stages,
            channels,
            reductions=[patch_size * 2**i for i in range(len(depths))],
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            stage_norms=stage_norms,
            **dd,
        )


def _check_stages(
    depths: Sequence[int],
    num_heads: Sequence[int],
    kernel_size: Sequence[int],
    dilations: Sequence[Sequence[Dilation]],
) -> None:
    """Raise `ValueError` unless the arguments describe the same stages."""
    if len(num_heads) != len(depths):
        raise ValueError(f"num_heads needs one entry a stage, got {num_heads=}, {depths=}")
    if len(kernel_size) != len(depths):
        raise ValueError(f"kernel_size needs one entry a stage, got {kernel_size=}, {depths=}")
    nested = isinstance(dilations, Sequence) and all(isinstance(d, Sequence) for d in dilations)
    if not nested or [len(stage) for stage in dilations] != list(depths):
        raise ValueError(
            f"dilations needs one entry a block, in a list a stage, got {dilations=}, {depths=}"
        )


SIZES: dict[str, dict[str, Any]] = {
    "mini": {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16)},
    "tiny": {"embed_dim": 64, "depths": (3, 4, 18, 5), "num_heads": (2, 4, 8, 16)},
    "small": {
        "embed_dim": 96,
        "depths": (3, 4, 18, 5),
        "num_heads": (3, 6, 12, 24),
        "mlp_ratio": 2.0,
    },
    "base": {
        "embed_dim": 128,
        "depths": (3, 4, 18, 5),
        "num_heads": (4, 8, 16, 32),
        "mlp_ratio": 2.0,
    },
    "large": {
        "embed_dim": 192,
        "depths": (3, 4, 18, 5),
        "num_heads": (6, 12, 24, 48),
        "mlp_ratio": 2.0,
    },
}

_WEIGHTS = "https://shi-labs.com/projects/nat/checkpoints/CLS"

default_cfgs = generate_default_cfgs(
    {
        f"nat_{size}.shi_in1k": pretrained_cfg(
            url=f"{_WEIGHTS}/nat_{size}.pth",
            hf_hub_id=f"shi-labs/nat-{size}-in1k-224",
            first_conv="patch_embed.proj.0",
            paper_ids="arXiv:2204.07143",
        )
        for size in ("mini", "tiny", "small", "base")
    }
)


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini, 20 M parameters."""
    return create(NAT, "nat_mini", pretrained, **{**SIZES["mini"], **kwargs})


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny, 28 M parameters."""
    return create(NAT, "nat_tiny", pretrained, **{**SIZES["tiny"], **kwargs})


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small, 51 M parameters."""
    args = {**SIZES["small"], "layer_scale": 1e-5, "drop_path_rate": 0.3}
    return create(NAT, "nat_small", pretrained, **{**args, **kwargs})


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base, 90 M parameters."""
    args = {**SIZES["base"], "layer_scale": 1e-5, "drop_path_rate": 0.5}
    return create(NAT, "nat_base", pretrained, **{**args, **kwargs})
