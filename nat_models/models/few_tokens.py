"""A transformer block's inference with few tokens, where a launch costs more than its work.

Five launches: norm and qkv; attention; projection and addition; norm, fc1 and GELU; fc2 and
addition. Modules are read from their dictionaries, in a third of the time of an attribute.
"""

from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from nat_models import fused
from neighborhood_attention import NeighborhoodAttention2D

_BRANCH_END = (nn.Identity, LayerScale), (nn.Identity, DropPath)
_BLOCK = (
    (fused.LayerNorm,), (NeighborhoodAttention2D,), *_BRANCH_END,
    (fused.LayerNorm,), (fused.Mlp,), *_BRANCH_END,
)  # fmt: skip
_ATTENTION = (nn.Linear,), (nn.Dropout,), (nn.Linear,), (nn.Dropout,)
_MLP = (nn.Linear,), (nn.GELU,), (nn.Dropout,), (nn.Identity,), (nn.Linear,), (nn.Dropout,)


def is_used(block: nn.Module, x: Tensor) -> bool:
    """Whether `forward` takes a block and its map [B, H, W, C].

    It calls none of the block's modules, so that each must be of a known type, in evaluation mode
    and without hooks.
    """
    if block.training or not fused.small_linear_is_used(x):
        return False
    layers = _layers(block)
    attn, mlp = layers["attn"], layers["mlp"]
    if not (_are_known(block, _BLOCK) and _are_known(attn, _ATTENTION) and _are_known(mlp, _MLP)):
        return False
    attention, perceptron = _layers(attn), _layers(mlp)
    channels, width = x.shape[-1], perceptron["fc1"].out_features
    return (
        perceptron["act"].approximate == "none"
        and _is_affine(layers["norm1"])
        and _is_affine(layers["norm2"])
        and not attn.is_padded(x.shape[1:3])
        and _takes(attention["qkv"], x.dtype, channels)
        and _takes(attention["proj"], x.dtype, channels)
        and _takes(perceptron["fc1"], x.dtype, channels)
        and _takes(perceptron["fc2"], x.dtype, width)
    )


def forward(block: nn.Module, x: Tensor) -> Tensor:
    """The block of a map, where `is_used`."""
    layers = _layers(block)
    attention, perceptron = _layers(layers["attn"]), _layers(layers["mlp"])
    qkv = fused.small_linear(x, *_affine(attention["qkv"]), norm=_norm(layers["norm1"]))
    x = fused.small_linear(
        layers["attn"].attend(qkv), *_affine(attention["proj"]),
        gamma=_gamma(layers["ls1"]), residual=x,
    )  # fmt: skip
    hidden = fused.small_linear(
        x, *_affine(perceptron["fc1"]), norm=_norm(layers["norm2"]), has_gelu=True
    )
    return fused.small_linear(
        hidden, *_affine(perceptron["fc2"]), gamma=_gamma(layers["ls2"]), residual=x
    )


def _layers(parent: nn.Module) -> dict[str, Any]:
    return parent._modules


def _are_known(parent: nn.Module, types: tuple[tuple[type, ...], ...]) -> bool:
    children = _layers(parent).values()
    if len(children) != len(types):
        return False
    for child, accepted in zip(children, types, strict=True):
        if type(child) not in accepted or child.training or fused.is_observed(child):
            return False
    return True


def _takes(linear: nn.Linear, dtype: torch.dtype, channels: int) -> bool:
    weight, _ = _affine(linear)
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.dtype == dtype
        and weight.shape[1] == channels
        and weight.shape[0] % 16 == 0
    )


def _is_affine(norm: nn.LayerNorm) -> bool:
    weight, bias = _affine(norm)
    return weight is not None and bias is not None


def _affine(module: nn.Module) -> tuple[Any, Any]:
    """Weight and bias."""
    parameters = module._parameters
    return parameters["weight"], parameters["bias"]


def _norm(norm: nn.LayerNorm) -> fused.Norm:
    return fused.Norm(*_affine(norm), norm.eps)


def _gamma(scale: nn.Module) -> Tensor | None:
    return scale._parameters.get("gamma")
