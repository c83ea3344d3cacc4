"""A transformer block's inference with few tokens, where a launch costs more than its work.

Five launches: norm and qkv; attention, if it needs no table; projection and addition; norm, fc1
and GELU; fc2 and addition. Modules are read from their dictionaries, in a third of the time of an
attribute.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from nat_models import fused
from neighborhood_attention import NeighborhoodAttention2D

# Types of the modules in a block, its attention and its MLP, by name.
_SCALE, _DROP = (nn.Identity, LayerScale), (nn.Identity, DropPath)
_BLOCK = {
    "norm1": (fused.LayerNorm,), "attn": (NeighborhoodAttention2D,),
    "ls1": _SCALE, "drop_path1": _DROP,
    "norm2": (fused.LayerNorm,), "mlp": (fused.Mlp,),
    "ls2": _SCALE, "drop_path2": _DROP,
}  # fmt: skip
_ATTENTION = {"qkv": (nn.Linear,), "proj": (nn.Linear,), "proj_drop": (nn.Dropout,)}
_MLP = {
    "fc1": (nn.Linear,), "act": (nn.GELU,), "drop1": (nn.Dropout,),
    "fc2": (nn.Linear,), "drop2": (nn.Dropout,),
}  # fmt: skip
_RANDOM = nn.Dropout, DropPath


def is_used(block: nn.Module, x: Tensor) -> bool:
    """Whether `forward` takes a block without hooks in it, and its map [B, H, W, C].

    It calls none of the block's modules, so that each must be of a known type, and nothing random.
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
        and x.dim() == 4
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


def has_hooks(block: nn.Module) -> bool:
    """Whether a call of a module in a block does more than its forward."""
    layers = _layers(block)
    parts = layers["attn"], layers["mlp"]
    modules = [*layers.values(), *(m for part in parts for m in _layers(part).values())]
    return any(map(fused.is_observed, modules))


def _layers(parent: nn.Module) -> dict[str, Any]:
    return parent._modules


def _are_known(parent: nn.Module, types: Mapping[str, tuple[type, ...]]) -> bool:
    layers = _layers(parent)
    for name, accepted in types.items():
        layer = layers[name]
        kind = type(layer)
        if kind not in accepted or (kind in _RANDOM and layer.training):
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
