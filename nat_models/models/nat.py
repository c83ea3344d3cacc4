"""Neighborhood Attention Transformer (NAT).

Paper: "Neighborhood Attention Transformer", Hassani et al., CVPR 2023, https://arxiv.org/abs/2204.07143
Original code and weights: https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (MIT)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices  # not public, but part of timm's contract
from torch import Tensor, nn

from nat_models.checkpoints import checkpoint_filter_fn
from nat_models.models.layers import (
    ConvDownsampler,
    ConvTokenizer,
    Stage,
    neighborhood_attention_block,
)
from neighborhood_attention import NeighborhoodAttention2D, list_backends

__all__ = ["NAT"]


class NAT(nn.Module):
    """Hierarchical transformer whose tokens attend to their nearest neighbors.

    A stem, then stages of blocks; all stages but the first halve the map and double the channels.
    Any image size is taken: a map smaller than a block's `kernel_size * dilation` is zero-padded to
    it for the attention.

    Args:
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier, 0 for none.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", "" for none, ...
        embed_dim: Channels of the first stage.
        depths: Number of blocks, per stage.
        num_heads: Attention heads, per stage.
        kernel_size: Side of the attention window, for all stages or per stage.
        dilations: Spacing of a window's tokens, per stage and block; 1 everywhere if None.
        stem_strides: Strides of the stem's two convolutions.
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
        ValueError: A per-stage argument does not fit `depths`, or a backend is unknown.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        kernel_size: int | Sequence[int] = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        stem_strides: Sequence[int] = (2, 2),
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.2,
        attention_backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_stages = len(depths)
        if isinstance(kernel_size, int):
            kernel_size = [kernel_size] * num_stages
        if dilations is None:
            dilations = [[1] * depth for depth in depths]
        _check_stages(depths, num_heads, kernel_size, dilations)
        if len(stem_strides) != 2:
            raise ValueError(f"stem_strides needs two entries, got {stem_strides=}")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.num_features = embed_dim * 2 ** (num_stages - 1)
        self.feature_info = [
            {
                "num_chs": embed_dim * 2**i,
                "reduction": math.prod(stem_strides) * 2**i,
                "module": f"levels.{i}",
            }
            for i in range(num_stages)
        ]

        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_embed = ConvTokenizer(in_chans, embed_dim, stem_strides, **dd)
        drop_path: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        stages = []
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            downsample = ConvDownsampler(dim // 2, **dd) if i > 0 else nn.Identity()
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
        self.levels = nn.Sequential(*stages)
        self.norm: nn.Module = nn.LayerNorm(self.num_features, **dd)
        self.head = ClassifierHead(
            self.num_features,
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            input_fmt=self.output_fmt,
            **dd,
        )
        self.head_hidden_size = self.head.num_features
        self.init_weights(needs_reset=False)

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the initial parameters; linear layers and bias tables: normal, std 0.02, truncated.

        Args:
            needs_reset: Also reset the layers that initialise themselves when created, as is needed
                after `to_empty()`.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif needs_reset and (reset := getattr(module, "reset_parameters", None)):
                reset()

    @torch.jit.ignore
    def set_attention_backend(self, name: str | None) -> None:
        """Choose the attention's implementation in all blocks; None chooses by the device.

        Raises:
            ValueError: There is no backend of that name.
        """
        if name is not None and name not in list_backends():
            raise ValueError(f"name must be one of {[*list_backends()]} or None, got {name!r}")
        for module in self.modules():
            if isinstance(module, NeighborhoodAttention2D):
                module.backend = name

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of storing them."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters to exempt from weight decay: the relative positional biases."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters by depth, e.g. for layer-wise learning-rate decay."""
        return {
            "stem": r"^patch_embed",
            "blocks": r"^levels\.(\d+)"
            if coarse
            else [
                (r"^levels\.(\d+)\.downsample", (0,)),
                (r"^levels\.(\d+)\.blocks\.(\d+)", None),
                (r"^norm", (99999,)),  # with the group before it
            ],
        }

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Final linear layer, an identity if there is no classifier."""
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; 0 classes for none, `global_pool=None` keeps the pooling."""
        self.num_classes = num_classes
        # A head without parameters cannot tell its own device and dtype.
        dd = get_device_dtype(self)
        self.head.reset(num_classes, pool_type=global_pool, in_features=self.num_features, **dd)
        self.head_hidden_size = self.head.num_features
        if global_pool is not None:
            self.global_pool = global_pool

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Outputs of the stages.

        Args:
            x: Images, [B, in_chans, H, W].
            indices: Stages to return: the last n, those listed, or all if None.
            norm: Apply the final norm to the last stage's output.
            stop_early: Skip the stages after the last one wanted, and the final norm with them.
            output_fmt: Layout of the returned maps, "NCHW" or "NHWC".
            intermediates_only: Return the stages' maps alone.

        Returns:
            The final features, [B, H', W', C], and the list of maps; the list alone with
            `intermediates_only`.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got '{output_fmt}'")
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        last_index = len(self.levels) - 1
        # TorchScript cannot slice a Sequential.
        if torch.jit.is_scripting() or not stop_early:
            levels = self.levels
        else:
            levels = self.levels[: max_index + 1]

        intermediates: list[Tensor] = []
        x = self.patch_embed(x)
        i = 0
        for i, stage in enumerate(levels):
            x = stage(x)
            if i in take_indices:
                feature = self.norm(x) if norm and i == last_index else x
                if output_fmt == "NCHW":
                    feature = feature.permute(0, 3, 1, 2).contiguous()
                intermediates.append(feature)

        if intermediates_only:
            return intermediates
        if i == last_index:
            x = self.norm(x)
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what is not needed for the given stages' outputs.

        Args:
            indices: Stages to keep the outputs of: the last n, or those listed.
            prune_norm: Drop the final norm.
            prune_head: Drop pooling and classifier.

        Returns:
            Indices of the stages, counted from the first.
        """
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        shortened = max_index < len(self.levels) - 1
        self.levels = self.levels[: max_index + 1]
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_norm or shortened:  # the final norm fits the last stage only
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to the last stage's normalised map [B, H', W', C]."""
        x = self.patch_embed(x)
        x = self.levels(x)
        x = self.norm(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map [B, H', W', C] to logits [B, num_classes], or with `pre_logits` to pooled [B, C]."""
        x = self.head(x, pre_logits=pre_logits)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))


def _check_stages(
    depths: Sequence[int],
    num_heads: Sequence[int],
    kernel_size: Sequence[int],
    dilations: Sequence[Sequence[int]],
) -> None:
    """Raise `ValueError` unless the arguments describe the same stages."""
    if len(num_heads) != len(depths):
        raise ValueError(f"num_heads needs one entry a stage, got {num_heads=}, {depths=}")
    if len(kernel_size) != len(depths):
        raise ValueError(f"kernel_size needs one entry a stage, got {kernel_size=}, {depths=}")
    if [len(stage) for stage in dilations] != list(depths):
        raise ValueError(f"dilations needs one entry a block, got {dilations=}, {depths=}")


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "fixed_input_size": False,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_ids": "arXiv:2204.07143",
        **kwargs,
    }


_WEIGHTS = "https://shi-labs.com/projects/nat/checkpoints/CLS"

default_cfgs = generate_default_cfgs(
    {
        f"nat_{size}.shi_in1k": _cfg(
            url=f"{_WEIGHTS}/nat_{size}.pth", hf_hub_id=f"shi-labs/nat-{size}-in1k-224"
        )
        for size in ("mini", "tiny", "small", "base")
    }
)


def _create_nat(variant: str, pretrained: bool, **kwargs: Any) -> NAT:
    return build_model_with_cfg(
        NAT,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **kwargs,
    )


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini, 20 M parameters."""
    args = {"embed_dim": 64, "depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16)}
    return _create_nat("nat_mini", pretrained, **{**args, **kwargs})


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny, 28 M parameters."""
    args = {"embed_dim": 64, "depths": (3, 4, 18, 5), "num_heads": (2, 4, 8, 16)}
    return _create_nat("nat_tiny", pretrained, **{**args, **kwargs})


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small, 51 M parameters."""
    args = {
        "embed_dim": 96,
        "depths": (3, 4, 18, 5),
        "num_heads": (3, 6, 12, 24),
        "mlp_ratio": 2.0,
        "layer_scale": 1e-5,
        "drop_path_rate": 0.3,
    }
    return _create_nat("nat_small", pretrained, **{**args, **kwargs})


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base, 90 M parameters."""
    args = {
        "embed_dim": 128,
        "depths": (3, 4, 18, 5),
        "num_heads": (4, 8, 16, 32),
        "mlp_ratio": 2.0,
        "layer_scale": 1e-5,
        "drop_path_rate": 0.5,
    }
    return _create_nat("nat_base", pretrained, **{**args, **kwargs})
