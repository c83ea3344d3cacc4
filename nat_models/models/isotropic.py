"""Isotropic models: NAT and DiNAT at a single resolution, and their baseline ViT-RPB.

All are one vision transformer without class token or absolute positions. Its tokens attend to
neighborhoods (NAT), every second time dilated ones (DiNAT), or to one that is the whole map
(ViT-RPB).

Paper: "Dilated Neighborhood Attention Transformer", Hassani and Shi, https://arxiv.org/abs/2209.15001
Original code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT)
"""

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from timm.layers import calculate_drop_path_rates, resize_rel_pos_bias_table_simple, to_2tuple
from timm.models import generate_default_cfgs, register_model
from torch import nn

from nat_models.models import dilations as presets
from nat_models.models.base import (
    Dilation,
    VisionModel,
    create,
    neighborhood_attentions,
    pretrained_cfg,
)
from nat_models.models.layers import PatchTokenizer, neighborhood_attention_block

__all__ = ["IsotropicNAT"]


class IsotropicNAT(VisionModel):
    """Vision transformer whose tokens attend to their nearest neighbors.

    Any image size is taken: the image is zero-padded, right and bottom, to whole patches, and a map
    smaller than a block's `kernel_size * dilation` to it for the attention. (The original code
    takes 224x224 only.) Each block is a level, whose output can be had as a feature map.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier, 0 for none.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", "" for none, ...
        img_size: Nominal size of the images, noted for timm; any other is taken too. The
            size (H, W) that images must have, if `kernel_size` is None.
        patch_size: Side of the patches that become tokens.
        embed_dim: Channels.
        depth: Number of blocks.
        num_heads: Attention heads.
        kernel_size: Side of the attention window; None for attention to the whole map (ViT-RPB).
        dilations: Spacing of a window's tokens, per block; or the name of a list in
            `nat_models.models.dilations`; 1 everywhere if None.
        mlp_ratio: Hidden width of the MLPs as a multiple of the channels.
        qkv_bias: Whether queries, keys and values have a learned bias.
        layer_scale: Initial value of the layer scales, None for no layer scale.
        drop_rate: Dropout probability before the classifier.
        proj_drop_rate: Dropout probability after the attention and in the MLPs.
        attn_drop_rate: Dropout probability of the attention weights.
        drop_path_rate: Probability of dropping a branch for a sample, rising linearly from 0 at the
            first block to this at the last.
        attention_backend: Name of the attention's implementation; None chooses by the device.
        device: Where to create the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: `dilations` does not fit `depth`, a name is unknown, or attention to the whole
            map lacks `img_size`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] | None = None,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 12,
        kernel_size: int | None = 7,
        dilations: str | Sequence[Dilation] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        attention_backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if dilations is None:
            dilations = [1] * depth
        elif isinstance(dilations, str):
            dilations = presets.resolve_dilations(dilations, [depth], presets.ISOTROPIC)[0]
        if len(dilations) != depth:
            raise ValueError(f"dilations needs one entry a block, got {dilations=}, {depth=}")
        window: int | tuple[int, int]
        if kernel_size is not None:
            window, required_size = kernel_size, None
        elif img_size is not None:
            required_size = to_2tuple(img_size)
            window = _grid(required_size, patch_size)
        else:
            raise ValueError("img_size is needed for attention to the whole map")
        stem = PatchTokenizer(in_chans, embed_dim, patch_size, required_size, **dd)
        drop_path: Any = calculate_drop_path_rates(drop_path_rate, depth)
        blocks = [
            neighborhood_attention_block(
                embed_dim,
                num_heads,
                window,
                dilation=dilations[i],
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                layer_scale=layer_scale,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path[i],
                attention_backend=attention_backend,
                **dd,
            )
            for i in range(depth)
        ]
        super().__init__(
            stem,
            blocks,
            channels=[embed_dim] * depth,
            reductions=[patch_size] * depth,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            **dd,
        )

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | tuple[int, int], rescale_dilations: bool = False
    ) -> None:
        """Change the nominal size of the images, (H, W).

        Where attention is to the whole map, images must have this size, and the bias tables are
        resized to it.

        Args:
            img_size: The new size.
            rescale_dilations: As in `VisionModel`.
        """
        super().set_input_size(img_size, rescale_dilations)
        stem: Any = self.patch_embed
        if stem.img_size is None:
            return
        stem.img_size = to_2tuple(img_size)
        grid = _grid(stem.img_size, stem.patch_size)
        for attention in neighborhood_attentions(self):
            rpb = attention.get_parameter("rpb")
            shape = attention.num_heads, 2 * grid[0] - 1, 2 * grid[1] - 1
            table = resize_rel_pos_bias_table_simple(rpb.detach(), grid, shape)
            attention.rpb = nn.Parameter(table, rpb.requires_grad)
            attention.set_window(grid, attention.dilation)

    @torch.jit.ignore
    def _rescale_dilations(self, img_size: tuple[int, int]) -> Sequence[Any]:
        return [dilation for level in super()._rescale_dilations(img_size) for dilation in level]


def _grid(img_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Size of the map of an image."""
    height, width = (ceil(side / patch_size) for side in img_size)
    return height, width


def _cfg(file: str, **kwargs: Any) -> dict[str, Any]:
    url = f"https://shi-labs.com/projects/dinat/checkpoints/isotropic/{file}_in1k_224.pth"
    return pretrained_cfg(url, pool_size=(14, 14), **kwargs)


default_cfgs = generate_default_cfgs(
    {
        f"{family}_{size}.shi_in1k": _cfg(f"{family}_{size}", fixed_input_size=family == "vitrpb")
        for family in ("nat_isotropic", "dinat_isotropic", "vitrpb")
        for size in ("small", "base")
    }
)

_SMALL = {"embed_dim": 384, "num_heads": 12, "drop_path_rate": 0.1}
_BASE = {"embed_dim": 768, "num_heads": 24, "drop_path_rate": 0.4}


def _create_isotropic(
    variant: str, pretrained: bool, depth: int = 12, **kwargs: Any
) -> IsotropicNAT:
    quarters = [depth * i // 4 - 1 for i in (1, 2, 3, 4)]
    return create(IsotropicNAT, variant, pretrained, quarters, depth=depth, **kwargs)


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """Isotropic NAT-Small, 22 M parameters."""
    return _create_isotropic("nat_isotropic_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """Isotropic NAT-Base, 86 M parameters."""
    return _create_isotropic("nat_isotropic_base", pretrained, **{**_BASE, **kwargs})


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """Isotropic DiNAT-Small, 22 M parameters: every second window is dilated by 2."""
    args = {**_SMALL, "dilations": "imagenet", **kwargs}
    return _create_isotropic("dinat_isotropic_small", pretrained, **args)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """Isotropic DiNAT-Base, 86 M parameters: every second window is dilated by 2."""
    args = {**_BASE, "dilations": "imagenet", **kwargs}
    return _create_isotropic("dinat_isotropic_base", pretrained, **args)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """ViT-RPB-Small, 22 M parameters: attention to the whole map of images of one size."""
    args = {**_SMALL, "kernel_size": None, **kwargs}
    return _create_isotropic("vitrpb_small", pretrained, **args)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> IsotropicNAT:
    """ViT-RPB-Base, 87 M parameters: attention to the whole map of images of one size."""
    args = {**_BASE, "kernel_size": None, **kwargs}
    return _create_isotropic("vitrpb_base", pretrained, **args)
