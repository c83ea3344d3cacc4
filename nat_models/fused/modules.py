"""Modules that run fused; parameters and results are those of the modules that they replace."""

from typing import Any

import torch
from timm import layers
from torch import Tensor, nn
from torch.nn import functional as F

from nat_models.fused.functional import Branch, Norm, add_norm_mlp, layer_norm, mlp
from nat_models.fused.use import mlp_is_used, norm_is_used


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last axis, with weight and bias.

    Shape: [..., C] -> [..., C].
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        if not torch.jit.is_scripting() and self._is_fused(x):
            x = layer_norm(x, Norm(self.weight, self.bias, self.eps))
        else:
            x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x

    @torch.jit.ignore
    def _is_fused(self, x: Tensor) -> bool:
        return norm_is_used(x)


class Mlp(layers.Mlp):
    """timm's MLP: a linear layer, GELU, a linear layer, each with dropout after it.

    Shape: [..., C] -> [..., C].
    """

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token."""
        if not torch.jit.is_scripting() and self.is_fused(x):
            x = self._fused_forward(x)
        else:
            x = self.drop1(self.act(self.fc1(x)))
            x = self.fc2(x)
        x = self.drop2(x)
        return x

    @torch.jit.ignore
    def is_fused(self, x: Tensor) -> bool:
        """Whether a map runs fused: none of the modules checked here is called then."""
        first, activation, drop, second = self._layers()
        return (
            type(first) is type(second) is nn.Linear
            and mlp_is_used(x, first.weight, second.weight)
            and first.bias is not None
            and type(activation) is nn.GELU
            and activation.approximate == "none"
            and not any(map(is_observed, (first, activation, drop, second)))
            and (drop.p == 0 or not self.training)
        )

    @torch.jit.ignore
    def _fused_forward(self, x: Tensor) -> Tensor:
        return mlp(x, *self._weights())

    @torch.jit.ignore
    def forward_from_sum(
        self, x: Tensor, branch: Branch | None, norm: Norm
    ) -> tuple[Tensor, Tensor]:
        """`add_layer_norm` and this MLP of the norm, where `is_fused`; returns the sum too."""
        total, values = add_norm_mlp(x, branch, norm, *self._weights())
        return total, self.drop2(values)

    def _weights(self) -> tuple[Any, ...]:
        first, _, _, second = self._layers()
        return first.weight, first.bias, second.weight, second.bias

    def _layers(self) -> list[Any]:
        """What is fused; so the host finds them in a third of the time of `self.fc1`."""
        modules = self._modules
        return [modules["fc1"], modules["act"], modules["drop1"], modules["fc2"]]


def is_observed(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward: then it must be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl
    )
