"""Neighborhood attention as a module: projections around the operator."""

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neighborhood_attention.backends import check_name
from neighborhood_attention.checks import checked_scale, make_neighborhood

T = TypeVar("T")


class NeighborhoodAttention2D(nn.Module):
    """Multi-head 2-D neighborhood attention over a channels-last map [B, H, W, embed_dim].

    Parameters are named as in the published NAT and DiNAT checkpoints: `qkv`, `proj`, `rpb`.

    Args:
        embed_dim: Channels; num_heads must divide it.
        num_heads: Attention heads.
        kernel_size: Window size, for both axes or for each.
        stride: Queries that share one window.
        dilation: Distance between neighboring keys.
        is_causal: Attend to no key behind the query, for both axes or for each.
        qkv_bias: Whether the query, key and value projection has a bias.
        qk_scale: Factor of the dot products; default 1 / sqrt(embed_dim / num_heads).
        rel_pos_bias: Whether to learn a relative positional bias.
        attn_drop: Not supported yet: must be 0.
        proj_drop: Dropout probability of the output.
        pad_small_inputs: Accept maps smaller than kernel_size * dilation. They are padded with
            zeros, right and bottom, before the projection, and cropped after attention; the padding
            is attended to. The published models' rule.
        backend: "reference" or "fused"; default: chosen at each call, see `na2d`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A size or name breaks one of the rules above.
        TypeError: An argument has the wrong type.
        NotImplementedError: attn_drop is not 0.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    is_causal: tuple[bool, bool]
    window: list[int]
    backend: str | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        dilation: int | tuple[int, int] = 1,
        is_causal: bool | tuple[bool, bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        rel_pos_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        pad_small_inputs: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"{num_heads=}: expected a divisor of {embed_dim=}")
        if attn_drop:
            raise NotImplementedError(f"{attn_drop=}: attention dropout is not supported yet")
        check_name(backend)
        window = make_neighborhood(2, kernel_size, stride, dilation, is_causal)
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = float(checked_scale("qk_scale", qk_scale, self.head_dim))
        self.stride = _pair(window.stride)
        self.is_causal = _pair(window.is_causal)
        self.set_window(kernel_size, dilation)
        self.pad_small_inputs = pad_small_inputs
        self.backend = backend
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.rpb = (
            nn.Parameter(torch.empty(num_heads, *window.bias_shape, device=device, dtype=dtype))
            if rel_pos_bias
            else None
        )
        self.proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def set_window(
        self, kernel_size: int | tuple[int, int], dilation: int | tuple[int, int]
    ) -> None:
        """Change the window; a relative positional bias must be replaced with the kernel size."""
        window = make_neighborhood(2, kernel_size, self.stride, dilation, self.is_causal)
        self.kernel_size = _pair(window.kernel_size)
        self.dilation = _pair(window.dilation)
        self.window = list(window.flat)

    def reset_parameters(self) -> None:
        """Truncated normal weights and relative positional bias (std 0.02), zero biases."""
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02, a=-2.0, b=2.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, embed_dim] to the same shape."""
        if x.dim() != 4:
            raise ValueError(f"x: expected [B, H, W, embed_dim], got shape {x.shape}")
        B, H, W, C = x.shape
        pad_h = max(0, self.kernel_size[0] * self.dilation[0] - H)
        pad_w = max(0, self.kernel_size[1] * self.dilation[1] - W)
        if pad_h > 0 or pad_w > 0:
            if not self.pad_small_inputs:
                raise ValueError(
                    f"x: expected at least kernel_size {self.kernel_size} * dilation "
                    f"{self.dilation} tokens, got shape {x.shape}; see pad_small_inputs"
                )
            x = F.pad(x, [0, 0, 0, pad_w, 0, pad_h])
        qkv = self.qkv(x).unflatten(-1, [3, self.num_heads, self.head_dim])
        # The operator itself, not `na2d_qkvpacked`: TorchScript can compile this call.
        x, _ = torch.ops.neighborhood_attention.attention_qkvpacked(
            qkv, self.rpb, self.window, self.scale, self.backend
        )
        x = x[:, :H, :W].reshape(B, H, W, C)
        x = self.proj_drop(self.proj(x))
        return x

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, is_causal={self.is_causal}, "
            f"rel_pos_bias={self.rpb is not None}"
        )


def _pair(values: tuple[T, ...]) -> tuple[T, T]:
    first, second = values
    return first, second
