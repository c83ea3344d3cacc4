"""What the model families have in common: timm's contract for models, and their registration."""

from collections.abc import Sequence
from math import ceil
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, get_device_dtype, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices  # not public, but part of timm's contract
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from nat_models.checkpoints import convert_before_loading, pretrained_filter_fn
from nat_models.models.layers import TransformerBlock
from neighborhood_attention import NeighborhoodAttention2D, list_backends

__all__ = ["Dilation", "VisionModel", "create", "pretrained_cfg"]

Dilation = int | tuple[int, int]
Model = TypeVar("Model", bound="VisionModel")


class VisionModel(nn.Module):
    """Tokens, levels, norm and classifier: `head(norm(levels(patch_embed(images))))`.

    Maps are channels-last. A family's class builds the tokenizer and the levels; each level's
    output is a feature map.

    Args:
        patch_embed: Tokenizer, images [B, in_chans, H, W] to a map [B, H', W', C].
        levels: Parts of the trunk, applied in turn.
        channels: Channels of each level's output.
        reductions: Pixels that a token of each level's output stands for, per side.
        in_chans: Channels of the image.
        num_classes: Outputs of the classifier, 0 for none.
        global_pool: Pooling before the classifier: "avg", "max", "avgmax", "" for none, ...
        drop_rate: Dropout probability before the classifier.
        stage_norms: Whether each level's output gets a LayerNorm of its own as a feature map.
        device: Where to create the parameters.
        dtype: Type of the parameters.
    """

    def __init__(
        self,
        patch_embed: nn.Module,
        levels: Sequence[nn.Module],
        channels: Sequence[int],
        reductions: Sequence[int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        drop_rate: float,
        stage_norms: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.output_fmt = "NHWC"
        self.num_features = channels[-1]
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": channels[i], "reduction": reductions[i], "module": f"levels.{i}"}
            for i in range(len(levels))
        ]
        self.patch_embed = patch_embed
        self.levels = nn.Sequential(*levels)
        self.dilated = [a.dilation != (1, 1) for a in neighborhood_attentions(self.levels)]
        self.stage_norms = nn.ModuleList(
            nn.LayerNorm(width, **dd) if stage_norms else nn.Identity() for width in channels
        )
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
        self.register_load_state_dict_pre_hook(convert_before_loading)  # type: ignore[no-untyped-call]

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
        for attention in neighborhood_attentions(self):
            attention.backend = name

    @torch.jit.ignore
    def set_input_size(
        self, img_size: int | tuple[int, int], rescale_dilations: bool = False
    ) -> None:
        """Change the nominal size of the images, (H, W); any other is still taken.

        Args:
            img_size: The new size.
            rescale_dilations: Give every dilated window the largest dilation that fits its level's
                map: `floor(side / kernel_size)`, at least 1, the rule of the published models.
        """
        size = to_2tuple(img_size)
        update_model_input_size(self, size)  # refuses what is no size
        if rescale_dilations:
            update_model_input_size(self, size, dilations=self._rescale_dilations(size))

    @torch.jit.ignore
    def _rescale_dilations(self, img_size: tuple[int, int]) -> Sequence[Any]:
        """Set the dilations for a size; all of them, as the model's argument states them."""
        dilations = []
        dilated = iter(self.dilated)
        for level, info in zip(self.levels, self.feature_info, strict=False):
            height, width = (ceil(side / info["reduction"]) for side in img_size)
            attentions = neighborhood_attentions(level)
            for attention in attentions:
                if next(dilated):
                    rows, columns = attention.kernel_size
                    fitting = max(1, height // rows), max(1, width // columns)
                    attention.set_window(attention.kernel_size, fitting)
            dilations.append([attention.dilation for attention in attentions])
        return dilations

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks' activations in the backward pass instead of storing them."""
        for module in self.modules():
            if isinstance(module, TransformerBlock):
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
                (r"^levels\.(\d+)", None),  # a level that is a block
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
        """Outputs of the levels, each after its own norm if the model was created with them.

        Args:
            x: Images, [B, in_chans, H, W].
            indices: Levels to return: the last n, those listed, or all if None.
            norm: Apply the final norm to the last level's output.
            stop_early: Skip the levels after the last one wanted, and the final norm with them.
            output_fmt: Layout of the returned maps, "NCHW" or "NHWC".
            intermediates_only: Return the levels' maps alone.

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
        for i, (level, stage_norm) in enumerate(zip(levels, self.stage_norms)):  # noqa: B905 (TorchScript)
            x = level(x)
            if i in take_indices:
                feature = stage_norm(self.norm(x) if norm and i == last_index else x)
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
        """Drop what is not needed for the given levels' outputs.

        Args:
            indices: Levels to keep the outputs of: the last n, or those listed.
            prune_norm: Drop the final norm.
            prune_head: Drop pooling and classifier.

        Returns:
            Indices of the levels, counted from the first.
        """
        take_indices, max_index = feature_take_indices(len(self.levels), indices)
        shortened = max_index < len(self.levels) - 1
        self.levels = self.levels[: max_index + 1]
        self.stage_norms = nn.ModuleList(
            norm if i in take_indices else nn.Identity()
            for i, norm in enumerate(self.stage_norms[: max_index + 1])
        )
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]["num_chs"]
        if prune_norm or shortened:  # the final norm fits the last level only
            self.norm = nn.Identity()
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, in_chans, H, W] to the last level's normalised map [B, H', W', C]."""
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


def neighborhood_attentions(module: nn.Module) -> list[NeighborhoodAttention2D]:
    """The neighborhood attentions in a module, in order."""
    return [m for m in module.modules() if isinstance(m, NeighborhoodAttention2D)]


def create(
    model_class: type[Model],
    variant: str,
    pretrained: bool,
    feature_levels: Sequence[int] = (0, 1, 2, 3),
    **kwargs: Any,
) -> Model:
    """Create a registered model, or with `features_only=True` its feature extractor.

    Args:
        model_class: The family's class.
        variant: Name of the registered function.
        pretrained: Load the published weights.
        feature_levels: Levels that a feature extractor returns by default.
        **kwargs: Arguments of the class, and timm's own.

    Raises:
        ValueError: `stage_norms` with a `feature_cls` that would leave them out.
    """
    feature_cfg: dict[str, Any] = {"out_indices": feature_levels, "flatten_sequential": True}
    if kwargs.get("stage_norms"):  # they are beside the sequence that other extractors follow
        feature_cfg["feature_cls"] = "getter"
        if (feature_cls := kwargs.get("feature_cls", "getter")) != "getter":
            raise ValueError(f"stage_norms needs feature_cls='getter', got {feature_cls=}")
    model: Model = build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_filter_fn=pretrained_filter_fn,
        feature_cfg=feature_cfg,
        **kwargs,
    )
    return model


def pretrained_cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    """Configuration of published weights: ImageNet at 224x224 unless `kwargs` say otherwise."""
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
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "mit",
        "origin_url": "https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
        "paper_ids": "arXiv:2209.15001",
        **kwargs,
    }
