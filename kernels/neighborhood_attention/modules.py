"""Neighborhood attention as modules: projections around the operator."""

import logging
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neighborhood_attention import ops, portable
from neighborhood_attention.backends import check_name
from neighborhood_attention.checks import SPATIAL, checked_scale, make_neighborhood

_Init = TypeVar("_Init", bound=Callable[..., None])

_log = logging.getLogger("neighborhood_attention")


def _with_old_keyword(init: _Init) -> _Init:
    """Accept `dim`, the old name of `embed_dim`."""

    @wraps(init)
    def renamed(self: Any, *args: Any, **kwargs: Any) -> None:
        if "dim" in kwargs:
            if args or "embed_dim" in kwargs:
                raise TypeError(f"dim={kwargs['dim']}: expected embed_dim or dim, not both")
            kwargs["embed_dim"] = kwargs.pop("dim")
        init(self, *args, **kwargs)

    return renamed  # type: ignore[return-value]


@cache
def _log_unfused() -> None:
    _log.warning("attn_drop > 0: training computes attention unfused, with all probabilities")


class _NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood attention for any number of axes; its subclasses fix that."""

    dims: ClassVar[int]

    @_with_old_keyword
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        dilation: int | tuple[int, ...] = 1,
        is_causal: bool | tuple[bool, ...] = False,
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
        for name, count in (("embed_dim", embed_dim), ("num_heads", num_heads)):
            if not isinstance(count, int):
                raise TypeError(f"{name}={count!r}: expected an int")
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"{num_heads=}: expected a divisor of {embed_dim=}")
        for name, probability in (("attn_drop", attn_drop), ("proj_drop", proj_drop)):
            if not isinstance(probability, (int, float)):
                raise TypeError(f"{name}={probability!r}: expected a probability")
            if not 0 <= probability <= 1:
                raise ValueError(f"{name}={probability}: expected a probability")
        check_name(backend)
        window = make_neighborhood(self.dims, kernel_size, stride, dilation, is_causal)
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.scale = float(checked_scale("qk_scale", qk_scale, self.head_dim))
        self.stride = window.stride
        self.is_causal = window.is_causal
        self.pad_small_inputs = pad_small_inputs
        self.layout = f"[B, {SPATIAL[self.dims]}, {embed_dim=}]"
        self.backend = backend
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias, device=device, dtype=dtype)
        self.rpb = (
            nn.Parameter(torch.empty(num_heads, *window.bias_shape, device=device, dtype=dtype))
            if rel_pos_bias
            else None
        )
        self.set_window(window.kernel_size, window.dilation)
        if attn_drop > 0:
            _log_unfused()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def set_window(
        self, kernel_size: int | tuple[int, ...], dilation: int | tuple[int, ...]
    ) -> None:
        """Change the window; for another kernel size replace a relative positional bias first.

        Raises:
            ValueError: The bias is that of another kernel size, or as at construction.
            TypeError: As at construction.
        """
        window = make_neighborhood(self.dims, kernel_size, self.stride, dilation, self.is_causal)
        if self.rpb is not None and self.rpb.shape[1:] != window.bias_shape:
            raise ValueError(
                f"kernel_size={window.kernel_size}: expected that of rpb, whose shape "
                f"{tuple(self.rpb.shape)} is (num_heads, 2 * kernel_size - 1, ...)"
            )
        self.kernel_size = window.kernel_size
        self.dilation = window.dilation
        self.extent = window.extent
        self.window = window.flat

    def reset_parameters(self) -> None:
        """Truncated normal weights and relative positional bias (std 0.02), zero biases."""
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02, a=-2.0, b=2.0)

    def forward(self, x: Tensor) -> Tensor:
        """[B, *spatial, embed_dim] to the same shape."""
        extent = list(self.extent)  # TorchScript indexes no tuple
        dims = len(extent)
        if x.dim() != dims + 2 or x.shape[-1] != self.num_heads * self.head_dim:
            raise ValueError(f"x: expected {self.layout}, got shape {x.shape}")
        sizes = x.shape[1:-1]
        padding = [0, 0]
        for axis in range(dims):
            missing = max(0, extent[dims - 1 - axis] - sizes[dims - 1 - axis])
            padding += [0, missing]
        if sum(padding) == 0:
            return self.project(self.attend(self.qkv(x)))
        if not self.pad_small_inputs:
            raise ValueError(
                f"x: expected at least kernel_size {self.kernel_size} * dilation "
                f"{self.dilation} tokens, got shape {x.shape}; see pad_small_inputs"
            )
        x = self.attend(self.qkv(F.pad(x, padding)))
        for axis in range(dims):
            x = x.narrow(axis + 1, 0, sizes[axis])
        return self.project(x)

    def attend(self, qkv: Tensor) -> Tensor:
        """What `forward` does between `self.qkv` and `self.proj`, for a map that is large enough.

        Args:
            qkv: Result of `self.qkv`, [B, *spatial, 3 * embed_dim].

        Returns:
            [B, *spatial, embed_dim].
        """
        x = self._attend(qkv.unflatten(-1, [3, self.num_heads, self.head_dim]))
        return x.flatten(-2)

    def project(self, x: Tensor) -> Tensor:
        """What `forward` ends with: the output projection of `attend`'s result, and dropout."""
        x = self.proj_drop(self.proj(x))
        return x

    def is_padded(self, sizes: Sequence[int]) -> bool:
        """Whether a map of these sizes is smaller than kernel_size * dilation."""
        return any(size < extent for size, extent in zip(sizes, self.extent, strict=True))

    def _attend(self, qkv: Tensor) -> Tensor:
        if self.training and self.attn_drop.p > 0:
            query, key, value = qkv.unbind(-3)
            scores = torch.ops.neighborhood_attention.scores(
                query, key, self.rpb, self.window, self.scale
            )
            probabilities = self.attn_drop(scores.softmax(-1))
            x: Tensor = torch.ops.neighborhood_attention.apply(probabilities, value, self.window)
        elif torch.jit.is_scripting():  # it can call the operators alone
            x, _ = torch.ops.neighborhood_attention.attention_qkvpacked(
                qkv, self.rpb, self.window, self.scale, self.backend
            )
        elif torch.onnx.is_in_onnx_export():  # ONNX has no such operator
            x = portable.attention_qkvpacked(qkv, self.rpb, self.window, self.scale)
        else:
            x, _ = ops.attention_qkvpacked(qkv, self.rpb, self.window, self.scale, self.backend)
        return x

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return (
            f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"dilation={self.dilation}, is_causal={self.is_causal}, "
            f"rel_pos_bias={self.rpb is not None}"
        )


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """Multi-head 1-D neighborhood attention over [B, L, embed_dim].

    Otherwise as `NeighborhoodAttention2D`.
    """

    dims = 1
    backend: str | None


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Multi-head 2-D neighborhood attention over a channels-last map [B, H, W, embed_dim].

    Parameters are named as in the published NAT and DiNAT checkpoints: `qkv`, `proj`, `rpb`.

    Args:
        embed_dim: Channels; num_heads must divide it. `dim` is accepted as its old name.
        num_heads: Attention heads.
        kernel_size: Window size, for all axes or for each.
        stride: Queries that share one window.
        dilation: Distance between neighboring keys.
        is_causal: Attend to no key behind the query, for all axes or for each.
        qkv_bias: Whether the query, key and value projection has a bias.
        qk_scale: Factor of the dot products; default 1 / sqrt(embed_dim / num_heads).
        rel_pos_bias: Whether to learn a relative positional bias.
        attn_drop: Dropout probability of the attention probabilities. Where it is not 0, training
            computes them all (see `neighborhood_scores`), on any backend; one warning says so.
        proj_drop: Dropout probability of the output.
        pad_small_inputs: Accept maps smaller than kernel_size * dilation. They are padded with
            zeros, right and bottom, before the projection, and cropped after attention; the padding
            is attended to. The published models' rule.
        backend: One of `list_backends()`; default: chosen at each call, see `na2d`.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: A size or name breaks one of the rules above.
        TypeError: An argument has the wrong type.
    """

    dims = 2
    backend: str | None


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """Multi-head 3-D neighborhood attention over [B, D, H, W, embed_dim].

    Otherwise as `NeighborhoodAttention2D`.
    """

    dims = 3
    backend: str | None
