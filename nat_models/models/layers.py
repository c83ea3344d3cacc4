"""Building blocks shared by the model families. Feature maps are channels-last: [B, H, W, C]."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from timm.models import checkpoint, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F

from nat_models import fused
from nat_models.models import few_tokens
from neighborhood_attention import NeighborhoodAttention2D


class TransformerBlock(nn.Module):
    """Pre-norm block around a given attention: `x + attn(norm(x))`, then `x + mlp(norm(x))`.

    Each branch has its own layer scale (arXiv:2103.17239) and stochastic depth (arXiv:1603.09382).

    Args:
        dim: Channels C of the map.
        attn: Attention, [B, H, W, C] -> [B, H, W, C].
        mlp_ratio: Hidden width of the MLP as a multiple of `dim`, rounded down.
        layer_scale: Initial value of the layer scales, None for no layer scale.
        proj_drop: Dropout probability inside the MLP.
        drop_path: Probability of dropping a branch for a sample.
        device: Where to create the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: `drop_path` is no probability.

    Shape: [B, H, W, C] -> [B, H, W, C].
    """

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= drop_path <= 1:
            raise ValueError(f"drop_path must be a probability, got {drop_path=}")

        def scale() -> nn.Module:
            if layer_scale is None:
                return nn.Identity()
            return LayerScale(dim, layer_scale, device=device, dtype=dtype)

        def stochastic_depth() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.norm1 = fused.LayerNorm(dim, device=device, dtype=dtype)
        self.attn = attn
        self.ls1 = scale()
        self.drop_path1 = stochastic_depth()

        self.norm2 = fused.LayerNorm(dim, device=device, dtype=dtype)
        self.mlp = fused.Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, device=device, dtype=dtype)
        self.ls2 = scale()
        self.drop_path2 = stochastic_depth()
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint(self._transform, x)
        else:
            x = self._transform(x)
        return x

    def _transform(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.has_few_tokens(x):
            x = self._few_tokens_forward(x)
        elif not torch.jit.is_scripting() and self.is_fused(x):
            x = fused.add(*self.fused_forward(x))
        else:
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x

    @torch.jit.ignore
    def has_few_tokens(self, x: Tensor) -> bool:
        """Whether `few_tokens` computes the block."""
        return few_tokens.is_used(self, x) and not self._has_hooks()

    @torch.compiler.assume_constant_result  # as of all hooks in compiled code
    def _has_hooks(self) -> bool:
        return few_tokens.has_hooks(self)

    @torch.jit.ignore
    def _few_tokens_forward(self, x: Tensor) -> Tensor:
        return few_tokens.forward(self, x)

    @torch.jit.ignore
    def is_fused(self, x: Tensor) -> bool:
        """Whether `fused_forward` is to be used: it calls none of the modules checked here."""
        between = self.ls1, self.ls2, self.drop_path1, self.drop_path2
        return (
            fused.norm_is_used(x, with_layers=True)
            and type(self.norm1) is type(self.norm2) is fused.LayerNorm
            and all(type(module) in (nn.Identity, LayerScale, DropPath) for module in between)
            and not any(map(fused.is_observed, (self.norm1, self.norm2, *between)))
        )

    @torch.jit.ignore
    def fused_forward(
        self, x: Tensor, branch: fused.Branch | None = None
    ) -> tuple[Tensor, fused.Branch]:
        """The block, its last addition left to the norm after it.

        Args:
            x: Map [B, H, W, C].
            branch: What the block before has left to add.

        Returns:
            The map, and what is left to add.
        """
        x, values = _attend(x, branch, self.norm1, self.attn)
        branch = _branch(values, self.ls1, self.drop_path1)
        x, values = _feed_forward(x, branch, self.norm2, self.mlp)
        return x, _branch(values, self.ls2, self.drop_path2)


def _attend(
    x: Tensor, branch: fused.Branch | None, norm: nn.LayerNorm, attn: nn.Module
) -> tuple[Tensor, Tensor]:
    """The sum, and the attention after its norm."""
    parameters = fused.Norm(norm.weight, norm.bias, norm.eps)
    if (
        type(attn) is NeighborhoodAttention2D
        and not attn.is_padded(x.shape[1:3])
        and not fused.is_observed(attn)
        and type(attn.qkv) is nn.Linear
        and not fused.is_observed(attn.qkv)
    ):
        x, qkv = fused.add_norm_linear(x, branch, parameters, attn.qkv.weight, attn.qkv.bias)
        return x, attn.project(attn.attend(qkv))
    x, normalized = fused.add_layer_norm(x, branch, parameters)
    return x, attn(normalized)


def _feed_forward(
    x: Tensor, branch: fused.Branch | None, norm: nn.LayerNorm, mlp: nn.Module
) -> tuple[Tensor, Tensor]:
    """The sum, and the MLP after its norm."""
    parameters = fused.Norm(norm.weight, norm.bias, norm.eps)
    if type(mlp) is fused.Mlp and not fused.is_observed(mlp) and mlp.is_fused(x):
        total, values = mlp.forward_from_sum(x, branch, parameters)
        return total, values
    x, normalized = fused.add_layer_norm(x, branch, parameters)
    return x, mlp(normalized)


def _branch(values: Tensor, scale: nn.Module, drop_path: nn.Module) -> fused.Branch:
    """Samples are dropped as DropPath does."""
    gamma = scale.gamma if isinstance(scale, LayerScale) else None
    keep = None
    if isinstance(drop_path, DropPath) and drop_path.training:
        probability = 1 - drop_path.drop_prob
        keep = values.new_empty(len(values)).bernoulli_(probability)
        if probability > 0 and drop_path.scale_by_keep:
            keep /= probability
    return fused.Branch(values, gamma, keep)


def neighborhood_attention_block(
    dim: int,
    num_heads: int,
    kernel_size: int | tuple[int, int],
    dilation: int | tuple[int, int] = 1,
    mlp_ratio: float = 4.0,
    qkv_bias: bool = True,
    layer_scale: float | None = None,
    proj_drop: float = 0.0,
    attn_drop: float = 0.0,
    drop_path: float = 0.0,
    attention_backend: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> TransformerBlock:
    """Transformer block with the published models' neighborhood attention.

    It has a relative positional bias, and a map smaller than `kernel_size * dilation` is padded.

    Arguments are those of `TransformerBlock` and `NeighborhoodAttention2D`.
    """
    attn = NeighborhoodAttention2D(
        dim,
        num_heads,
        kernel_size,
        dilation=dilation,
        qkv_bias=qkv_bias,
        rel_pos_bias=True,
        attn_drop=attn_drop,
        proj_drop=proj_drop,
        pad_small_inputs=True,
        backend=attention_backend,
        device=device,
        dtype=dtype,
    )
    return TransformerBlock(
        dim, attn, mlp_ratio, layer_scale, proj_drop, drop_path, device=device, dtype=dtype
    )


class Stage(nn.Module):
    """Blocks at one resolution, after the layer that brings the map to it.

    The downsampler comes first, so that a stage's output is the feature map of its resolution, as
    timm's feature extraction expects. (The original code downsamples at the end of a level.)

    Args:
        downsample: Layer applied before the blocks, `nn.Identity()` in the first stage.
        blocks: The transformer blocks.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Transform a map."""
        x = self.downsample(x)
        if not torch.jit.is_scripting() and self._is_fused(x):
            blocks: Any = self.blocks
            branch = None
            for block in blocks:
                x, branch = block.fused_forward(x, branch)
            x = fused.add(x, branch)
        else:
            x = self.blocks(x)
        return x

    @torch.jit.ignore
    def _is_fused(self, x: Tensor) -> bool:
        """Whether a block's last addition is fused with the next block's norm."""
        return (
            fused.norm_is_used(x, with_layers=True)
            and not fused.is_observed(self.blocks)
            and all(
                type(block) is TransformerBlock
                and not block.grad_checkpointing
                and not fused.is_observed(block)
                and block.is_fused(x)
                and not block.has_few_tokens(x)
                for block in self.blocks
            )
        )


class ConvTokenizer(nn.Module):
    """Overlapping stem of NAT: two 3x3 convolutions, then a LayerNorm.

    Args:
        in_chans: Channels of the image.
        embed_dim: Channels C of the map, half of them after the first convolution.
        patch_size: Pixels that a token stands for, per side: 4, 2 or 1. Sides are divided by it,
            rounding up.
        device: Where to create the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: There is no such `patch_size`.

    Shape: image [B, in_chans, H, W] -> map [B, H', W', C].
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        patch_size: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if patch_size not in (1, 2, 4):
            raise ValueError(f"patch_size must be 4, 2 or 1, got {patch_size=}")
        half, first, second = embed_dim // 2, min(2, patch_size), max(1, patch_size // 2)
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, half, 3, first, padding=1, device=device, dtype=dtype),
            nn.Conv2d(half, embed_dim, 3, second, padding=1, device=device, dtype=dtype),
        )
        self.norm = fused.LayerNorm(embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Turn images into maps."""
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return x


class ConvDownsampler(nn.Module):
    """Overlapping downsampler of NAT: 3x3 convolution of stride 2, then a LayerNorm.

    Args:
        dim: Channels C of the incoming map; the outgoing one has twice as many.
        device: Where to create the parameters.
        dtype: Type of the parameters.

    Shape: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2C].
    """

    def __init__(
        self,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(
            dim, 2 * dim, 3, 2, padding=1, bias=False, device=device, dtype=dtype
        )
        self.norm = fused.LayerNorm(2 * dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Halve a map, double its channels."""
        # Permuting is free: the convolution runs in channels-last memory format.
        x = self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x


class PatchTokenizer(nn.Module):
    """Stem of vision transformers: one convolution over patches that tile the image, a LayerNorm.

    Args:
        in_chans: Channels of the image.
        embed_dim: Channels C of the map.
        patch_size: Side of a patch. The image is zero-padded, right and bottom, to whole patches.
        img_size: Size (H, W) that images must have; any size if None.
        device: Where to create the parameters.
        dtype: Type of the parameters.

    Shape: image [B, in_chans, H, W] -> map [B, ceil(H / patch_size), ceil(W / patch_size), C].
    """

    img_size: tuple[int, int] | None

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        patch_size: int = 4,
        img_size: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.img_size = img_size
        self.proj = nn.Conv2d(
            in_chans, embed_dim, patch_size, patch_size, device=device, dtype=dtype
        )
        self.norm = fused.LayerNorm(embed_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Turn images into maps."""
        height, width = x.shape[2:]
        expected = self.img_size
        if expected is not None and expected != (height, width):
            raise ValueError(
                f"images must have the size {expected}, got {(height, width)}; see set_input_size"
            )
        if height % self.patch_size or width % self.patch_size:
            x = F.pad(x, [0, -width % self.patch_size, 0, -height % self.patch_size])
        x = self.norm(self.proj(x).permute(0, 2, 3, 1))
        return x


class PatchMerging(nn.Module):
    """Downsampler of Swin (arXiv:2103.14030): 2x2 tokens side by side, a LayerNorm, a linear layer.

    Args:
        dim: Channels C of the incoming map; the outgoing one has twice as many.
        device: Where to create the parameters.
        dtype: Type of the parameters.

    Shape: [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), 2C].
    """

    def __init__(
        self,
        dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = fused.LayerNorm(4 * dim, device=device, dtype=dtype)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Halve a map, double its channels."""
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, [0, 0, 0, width % 2, 0, height % 2])
        # The four tokens' order: top left, bottom left, top right, bottom right.
        x = x.unflatten(2, [-1, 2]).unflatten(1, [-1, 2]).permute(0, 1, 3, 4, 2, 5).flatten(3)
        x = self.reduction(self.norm(x))
        return x


# What these do depends on the size of the image or map: symbolic tracing must not look inside.
register_notrace_module(NeighborhoodAttention2D)
register_notrace_module(PatchTokenizer)
register_notrace_module(PatchMerging)
